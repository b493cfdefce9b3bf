"""PolarityTrainer: TRL's GRPOTrainer with the advantages rewritten token by token. Nothing else differs.

Three seams of TRL are used, none of its logic is copied:

1. while we ask for it, TRL's fused output head is ours, which makes log-probs, entropy and all statistics from one
   product, the statistics in unused output slots (`trl_seam.StatisticsHead`);
2. `_compute_loss` works on a copy of the batch, so that TRL reads the advantages we put there;
3. `_get_per_token_logps_and_entropies`, which TRL calls just before it reads them, is where the statistics of
   the current forward pass appear and the advantages are rewritten. No second forward pass is made.

A method that needs only rewards is run when the batch is generated. One that looks at all tokens of the rollout gets
a pass without gradient then; where TRL makes one anyway, for old log-probs, it is that. Loss terms beside the policy's
are added after TRL's loss, averaged as TRL averages. All the seams are private to TRL, hence the version check.
"""

import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    from trl import GRPOTrainer
except ModuleNotFoundError as error:
    raise ImportError(f"PolarityTrainer needs TRL ({error}): pip install 'entropy-polarity[trl]'") from None
from trl.trainer import grpo_trainer

from entropy_polarity.methods import make_transform
from entropy_polarity.policy import resolve_model
from entropy_polarity.tokens import Tokens, concatenate
from entropy_polarity.trainers.trl.checkpoints import CheckpointedTrainer, RolloutBoundaries
from entropy_polarity.trainers.trl.config import PolarityConfig, polarity_config
from entropy_polarity.trainers.trl.evaluation import EvaluatedTokens
from entropy_polarity.trainers.trl.head import Request, StatisticsHead, loading_whole
from entropy_polarity.trainers.trl.loss import averaged, importance, restrict
from entropy_polarity.trainers.trl.sequences import exact_sensitivity_of
from entropy_polarity.transforms import loss_terms, measure

# Extra per-row columns that travel with TRL's batch through its shuffle and split.
REWARD, GROUP, SAMPLE_ID = "polarity_reward", "polarity_group", "polarity_sample_id"
# The trainer's own advantages, where a method changed them before the first pass; and its loss terms.
PLAIN, BONUS, PENALTY = "polarity_plain_advantages", "polarity_entropy_bonus", "polarity_ratio_penalty"
# The model tokens, where a method dropped some from the loss.
WRITTEN = "polarity_model_tokens"


class Rollout(NamedTuple):
    """One finished rollout batch of this process, in the order of generation, for whoever records it."""

    inputs: dict[str, Any]
    tokens: Tokens
    weight: Tensor
    metrics: dict[str, float]


class Decision(NamedTuple):
    """What a method made of this process's rows; `kept` is the number of model tokens left on all ranks, None where
    none was dropped."""

    tokens: Tokens
    metrics: dict[str, float]
    kept: Tensor | None


class PolarityTrainer(CheckpointedTrainer):
    """GRPOTrainer whose advantages go through a method of `entropy_polarity.methods`.

    Takes GRPOTrainer's arguments; `args` is a PolarityConfig, or what `polarity_config` makes one of. With λ = 0 and
    `statistics_head="trl"` it is GRPOTrainer to the last bit; with our head, whose sums are more exact, to the
    rounding of float32. What it loads by name must have all its weights: ValueError otherwise. The state
    of the method is in every checkpoint (`polarity_state.json`); metrics appear under `polarity/`,
    those of an evaluation under `eval_polarity/`.
    `on_rollout`, if set, is called with each finished `Rollout`; `on_loss` with each micro-batch as TRL trained on it,
    and its tokens as they went into the loss.
    """

    args: PolarityConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    model: Any  # pyright: ignore[reportIncompatibleVariableOverride]
    on_rollout: Callable[[Rollout], None] | None
    on_loss: Callable[[dict[str, Any], Tokens], None] | None

    def __init__(self, *given: Any, **named: Any) -> None:
        call = inspect.signature(GRPOTrainer).bind(*given, **named)
        args = call.arguments["args"] = polarity_config(call.arguments.get("args"), call.arguments["model"])
        if isinstance(call.arguments["model"], str):
            call.arguments["model"] = resolve_model(call.arguments["model"])  # "embedded" is a folder of the package
        self.transform = make_transform(args.method, args.settings)
        self.method_state = self._next_state = self.transform.init()
        self.on_rollout = self.on_loss = None
        self._seen: list[Tokens] = []
        self._decision_metrics: dict[str, float] = {}
        self._passes: list[tuple[Tensor, tuple[Tensor, ...]]] | None = None
        self._loss_inputs: dict[str, Any] | None = None
        self._live: Tokens | None = None
        self._evaluated = EvaluatedTokens()
        self._rollout_inputs: dict[str, Any] = {}
        with loading_whole():
            super().__init__(*call.args, **call.kwargs)
        if "reuse" in self.transform.needs and self.micro_steps_per_rollout <= args.gradient_accumulation_steps:
            warnings.warn(
                f"method {args.method!r} does nothing with a single update on each rollout, where the importance ratio "
                "is 1: use num_iterations or steps_per_generation above 1",
                stacklevel=2,
            )
        if self.transform.exact_every and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("sign_from='exact' needs whole parameters on every process: not with FSDP or DeepSpeed")
        self.add_callback(RolloutBoundaries(self))

    __init__.__signature__ = inspect.signature(GRPOTrainer.__init__)  # pyright: ignore[reportFunctionMemberAccess]

    @property
    def micro_steps_per_rollout(self) -> int:
        return self._steps_per_generation * self.num_iterations

    @property
    def _steps_per_generation(self) -> int:
        assert self.args.steps_per_generation is not None  # GRPOConfig fills it in
        return self.args.steps_per_generation

    # ---- the rollout batch ------------------------------------------------------------------------------

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        total = torch.where(rewards.isnan().all(dim=1), torch.nan, total)  # nothing could judge it: TRL sets A = 0
        rank = self.accelerator.process_index
        self._last_rewards = total[rank * len(prompts) : (rank + 1) * len(prompts)]
        return rewards

    def _generate_and_score_completions(self, inputs):
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        self._passes = [] if self.transform.decides_from == "whole batch" else None
        try:
            batch = super()._generate_and_score_completions(inputs)
            passes = self._passes
        finally:
            self._passes = None
        rows = len(batch["completion_ids"])
        sample_id = torch.arange(rows, device=batch["completion_ids"].device)
        sample_id += rows * self.accelerator.process_index
        batch |= {REWARD: self._last_rewards, GROUP: sample_id // self.num_generations, SAMPLE_ID: sample_id}
        self._seen = []
        self._rollout_inputs = batch
        if self.transform.decides_from == "rewards":
            batch[PLAIN] = batch["advantages"]
            decision = self._run_method(self._tokens(batch))
            self._decision_metrics = decision.metrics
            self._put(batch, decision)
        elif self.transform.decides_from == "whole batch":
            # TRL's pass for old log-probs, if it made one, was served with statistics.
            made = [columns for logp, columns in passes or () if logp is batch.get("old_per_token_logps")]
            tokens = self._tokens(batch, *made[0]) if made else self._whole_batch_tokens(batch)
            if self._wants_exact:
                tokens = replace(tokens, exact_sensitivity=exact_sensitivity_of(self, batch, tokens.mask))
            decision = self._run_method(tokens)
            self._report(tokens, decision.tokens, decision.metrics)
            self._put(batch, decision)
        return batch

    @property
    def _wants_exact(self) -> bool:
        every = self.transform.exact_every
        done = self.state.global_step * self.args.gradient_accumulation_steps // self.micro_steps_per_rollout
        return every > 0 and done % every == 0

    def _put(self, batch: dict[str, Any], decision: Decision) -> None:
        """A decision into the batch that TRL trains on."""
        tokens = decision.tokens
        batch["advantages"] = self._for_the_loss(tokens)
        if tokens.entropy_bonus is not None:
            batch[BONUS] = tokens.entropy_bonus
        if tokens.ratio_penalty is not None:
            batch[PENALTY] = tokens.ratio_penalty
        if decision.kept is not None:
            batch[WRITTEN] = self._tokens(batch).mask
            restrict(batch, tokens.mask, decision.kept)

    def _for_the_loss(self, tokens: Tokens) -> Tensor:
        """The advantages as TRL reads them: one for each response where all its tokens have the same, as TRL's own are.
        Losses and metrics of whole sequences are then TRL's."""
        first = tokens.advantages[:, 0]
        return (
            first if torch.equal(first[:, None].expand_as(tokens.advantages), tokens.advantages) else tokens.advantages
        )

    def _whole_batch_tokens(self, batch: dict[str, Any]) -> Tokens:
        """The facts of this process's rows from one pass without gradient, before any update on them."""
        keep = batch["completion_ids"].size(1)
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        accepted = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
        extra = {name: value for name, value in batch.items() if name in accepted}
        checkpointing = grpo_trainer.disable_gradient_checkpointing
        # The fork keeps the pass from moving the random state: dropout afterwards is that of plain GRPO.
        quiet = checkpointing(self.model, self.args.gradient_checkpointing_kwargs)  # type: ignore[arg-type]
        with torch.no_grad(), torch.random.fork_rng(), quiet:
            size = self.args.per_device_train_batch_size
            result, captured = self._with_statistics(self.model, ids, attention, keep, batch_size=size, **extra)
        return self._tokens(batch, result[0], result[1], *captured)

    def _run_method(self, local: Tokens) -> Decision:
        """Run the method once on the global rollout batch.

        The state moves on when the last update on the rollout is made, not before: λ_k is fixed for all of them.
        """
        whole = self._gather(local)
        rewritten, self._next_state, metrics = self.transform.update(whole, self.method_state)
        rows, width = local.mask.shape
        first = rows * self.accelerator.process_index
        mine = rewritten.rows(slice(first, first + rows)).cut(width)
        dropped = not torch.equal(rewritten.mask, whole.mask)
        return Decision(mine, metrics, rewritten.mask.sum() if dropped else None)

    def _report(self, local: Tokens, decided: Tokens, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            if not math.isnan(value):  # where nothing was written there is no entropy: TRL would log None for it
                self._metrics["train"][name].append(value)
        if self.on_rollout is not None:
            weight = torch.where(local.advantages == 0, 1.0, decided.advantages / local.advantages)
            self.on_rollout(Rollout(self._rollout_inputs, local, weight, metrics))

    def _gather(self, tokens: Tokens) -> Tokens:
        if self.accelerator.num_processes == 1:
            return tokens
        columns = {f.name: getattr(tokens, f.name) for f in fields(tokens)}
        columns["mask"] = columns["mask"].to(torch.int32)  # not every backend gathers booleans
        for name, column in columns.items():
            if column is not None:
                padded = self.accelerator.pad_across_processes(column, dim=1) if column.dim() == 2 else column
                columns[name] = self.accelerator.gather(padded.contiguous())  # type: ignore[union-attr]
        return Tokens(**columns | {"mask": columns["mask"].bool()})  # type: ignore[arg-type]

    # ---- the loss ---------------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs):
        position = self._step % self.micro_steps_per_rollout
        self._loss_inputs = dict(inputs)  # TRL serves the same dict again: never rewrite it in place
        try:
            loss = super()._compute_loss(model, self._loss_inputs)
        finally:
            self._loss_inputs, live, self._live = None, self._live, None
        if not self.model.training:
            return loss
        if live is not None and (terms := loss_terms(live)) is not None:
            loss = loss + averaged(self, terms, live.mask, inputs)
        if live is not None and self.on_loss is not None:
            self.on_loss(inputs, live)
        if position == self._steps_per_generation - 1 and self._seen:  # the first pass over the rollout is complete
            tokens = concatenate(self._seen)
            self._first_pass(tokens.rows(tokens.require("sample_id").argsort()))
        if position == self.micro_steps_per_rollout - 1:
            self.method_state = self._next_state
        return loss

    def _first_pass(self, tokens: Tokens) -> None:
        """Every token was seen with the statistics of the policy that sampled it: decide, or measure the decision."""
        if self.transform.local is not None:
            decision = self._run_method(tokens)
            return self._report(tokens, decision.tokens, decision.metrics)
        inputs = self._rollout_inputs
        plain = inputs[PLAIN][:, None].expand_as(tokens.advantages)
        before = replace(tokens, advantages=plain, mask=inputs.get(WRITTEN, tokens.mask))
        seen, metrics = measure(self._gather(before), self._gather(tokens), {"entropy": self._next_state["entropy"]})
        self._next_state = self._next_state | seen
        self._report(before, tokens, metrics | self._decision_metrics)

    def _get_per_token_logps_and_entropies(self, model, *args, compute_entropy=False, **kwargs):
        if self._loss_inputs is not None and compute_entropy:
            return self._loss_pass(self._loss_inputs, model, *args, **kwargs)
        # The first pass for log-probs alone is that of the old ones; another is a reference model's.
        if self._passes is not None and not self._passes and not compute_entropy:
            result, captured = self._with_statistics(model, *args, **kwargs)
            self._passes.append((result[0], (result[0], result[1], *captured)))
            return result[0], None, result[2]
        # The same head in every pass: old and new log-probs of one policy are equal then, and their ratio 1.
        with StatisticsHead.serving(self._request(statistics=False)):
            return super()._get_per_token_logps_and_entropies(model, *args, compute_entropy=compute_entropy, **kwargs)

    def _loss_pass(self, inputs: dict[str, Any], model, *args, **kwargs):
        """The forward pass of the loss, and the advantages that TRL reads right after it, but in an evaluation."""
        if not self.model.training:
            result, captured = self._with_statistics(model, *args, **kwargs)
            self._evaluated.add(self._gather(self._tokens(inputs, result[0], result[1], *captured)))
            return result
        if self.transform.decides_from == "whole batch":  # decided when the rollout was generated
            with StatisticsHead.serving(self._request(statistics=False)):
                result = super()._get_per_token_logps_and_entropies(model, *args, compute_entropy=True, **kwargs)
            tokens = self._tokens(inputs)
        else:
            result, captured = self._with_statistics(model, *args, **kwargs)
            tokens = self._tokens(inputs, result[0].detach(), result[1].detach(), *captured)
            if self._in_first_pass:
                self._seen.append(tokens)  # later visits see an already updated policy
            if self.transform.local is not None:
                seen, tokens = tokens, self.transform.local(tokens, self.method_state)
                if tokens.advantages is not seen.advantages:
                    inputs["advantages"] = self._for_the_loss(tokens)
        old_logp = inputs.get("old_per_token_logps", result[0].detach())
        self._live = replace(tokens, logp=result[0], entropy=result[1], old_logp=old_logp)
        return result

    @property
    def _in_first_pass(self) -> bool:
        return self._step % self.micro_steps_per_rollout < self._steps_per_generation

    def _with_statistics(self, model, *args, **kwargs) -> tuple[tuple, tuple[Tensor, ...]]:
        """TRL's log-probs and entropies, and beside them Σp², T, Σp² log p of the completion tokens."""
        keep, outputs = args[2] if len(args) > 2 else kwargs["logits_to_keep"], []

        def watched(**model_inputs):
            outputs.append(model(**model_inputs))
            return outputs[-1]

        with StatisticsHead.serving(self._request(statistics=True)):
            result = super()._get_per_token_logps_and_entropies(watched, *args, compute_entropy=True, **kwargs)
        slots = ("log_sum_sq_probs", "mean_logits", "is_top1")
        return result, tuple(torch.cat([o[slot][:, -keep:] for o in outputs]) for slot in slots)

    def _request(self, statistics: bool) -> Request:
        entropy_grad = self._entropy_bonus_enabled or "entropy_grad" in self.transform.needs
        return Request(self.args.statistics_head, statistics, entropy_grad)

    def _tokens(self, inputs, logp=None, entropy=None, sum_p2=None, sensitivity=None, sum_p2_logp=None) -> Tokens:
        """The facts of some rows; without statistics where no pass was made yet."""
        mask = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        advantages = inputs["advantages"]
        tokens = Tokens(
            mask=mask,
            advantages=advantages[:, None].expand(mask.shape) if advantages.dim() == 1 else advantages,
            logp=logp,
            old_logp=inputs.get("old_per_token_logps", logp),
            entropy=entropy,
            sum_p2=sum_p2,
            sum_p2_logp=sum_p2_logp,
            sensitivity=sensitivity,
            reward=inputs.get(REWARD),
            group=inputs.get(GROUP),
            sample_id=inputs.get(SAMPLE_ID),
            entropy_bonus=inputs.get(BONUS),
            ratio_penalty=inputs.get(PENALTY),
        )
        if logp is None:
            return tokens
        return replace(tokens, importance=importance(self, tokens, inputs.get("importance_sampling_ratio")))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not self.model.training:
            for name, value in self._evaluated.take(flows=(self.num_generations_eval or 0) > 1).items():
                self._metrics["eval"][name].append(value)
        super().log(logs, start_time)
