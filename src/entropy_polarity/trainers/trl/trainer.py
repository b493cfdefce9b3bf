"""TRL's GRPOTrainer with the advantages rewritten token by token.

One rollout, top to bottom: TRL generates and rewards it, its model tokens are packed, a method decides on their
advantages, TRL's loss trains on them, the batch is measured and recorded. A method decides at one of three times:

    rewards       as soon as the batch is rewarded
    whole batch   then too, from the statistics of a pass without gradient; where TRL makes one for old log-probs, it
                  is that
    each token    in the loss itself, micro-batch by micro-batch, from the statistics of its forward pass

The advantages enter TRL at three places, and none of its logic is copied:

1. `_generate_and_score_completions` returns TRL's batch with what was decided from rewards or the whole batch;
2. `_compute_loss` works on a copy of that batch, so that nothing put into it is served again;
3. `_get_per_token_logps_and_entropies`, which TRL calls just before it reads the advantages, puts those decided for
   each token into that copy, from the statistics of the current forward pass. No second forward pass is made.

The statistics are of our output head, which stands in for TRL's fused one while we ask for it (`head.StatisticsHead`).
`head._SEAMS` lists everything private that is overridden, hence the version check.
"""

import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from trl import GRPOTrainer
from trl.trainer import grpo_trainer

from entropy_polarity.controllers import Metrics
from entropy_polarity.methods import make_transform
from entropy_polarity.policy import resolve_model
from entropy_polarity.tokens import Tokens
from entropy_polarity.trainers.trl.checkpoints import CheckpointedTrainer, RolloutBoundaries
from entropy_polarity.trainers.trl.config import PolarityConfig, polarity_config
from entropy_polarity.trainers.trl.evaluation import EvaluatedTokens
from entropy_polarity.trainers.trl.head import Request, StatisticsHead, loading_whole
from entropy_polarity.trainers.trl.loss import averaged, importance
from entropy_polarity.trainers.trl.packing import (
    COLUMNS,
    advantages_for_trl,
    as_decided,
    at,
    for_the_loss,
    gather_columns,
    gather_tokens,
    in_order,
    made_columns,
    own_part,
    packed,
    without_dropped,
)
from entropy_polarity.trainers.trl.rollout import MicroBatch, Rollout, Statistics
from entropy_polarity.trainers.trl.sequences import exact_sensitivity_of
from entropy_polarity.transforms import Monitor, loss_terms


class PolarityTrainer(CheckpointedTrainer):
    """GRPOTrainer whose advantages go through a method of `entropy_polarity.methods`.

    Takes GRPOTrainer's arguments; `args` is a PolarityConfig, or what `polarity_config` makes one of. With λ = 0 and
    `statistics_head="trl"` it is GRPOTrainer to the last bit; with our head, whose sums are more exact, to the rounding
    of float32. What it loads by name must have all its weights: ValueError otherwise. The state of the method is in
    every checkpoint (`polarity_state.json`); metrics appear under `polarity/` and `eval_polarity/`.

    `on_rollout`, if set, is called with each `Rollout` when the first pass over it was made; `on_loss` with each
    micro-batch as TRL trained on it, and its tokens as they went into the loss.
    """

    args: PolarityConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    model: Any  # pyright: ignore[reportIncompatibleVariableOverride]
    on_rollout: Callable[[Rollout], None] | None
    on_loss: Callable[[dict[str, Any], Tokens], None] | None
    rollout: Rollout  # from its generation to that of the next

    def __init__(self, *given: Any, **named: Any) -> None:
        call = inspect.signature(GRPOTrainer).bind(*given, **named)
        args = call.arguments["args"] = polarity_config(call.arguments.get("args"), call.arguments["model"])
        if isinstance(call.arguments["model"], str):
            call.arguments["model"] = resolve_model(call.arguments["model"])  # "embedded" is a folder of the package
        self.transform, self.monitor = make_transform(args.method, args.settings), Monitor()
        self.method_state = self.transform.init()
        self.on_rollout = self.on_loss = None
        self.rollout = Rollout()
        self._evaluated = EvaluatedTokens()
        with loading_whole():
            super().__init__(*call.args, **call.kwargs)
        if self.transform.several_updates and self.micro_steps_per_rollout <= args.gradient_accumulation_steps:
            warnings.warn(
                f"method {args.method!r} does nothing with a single update on each rollout, where the importance ratio "
                "is 1: use num_iterations or steps_per_generation above 1",
                stacklevel=2,
            )
        if self.transform.exact_every and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("sign_from='exact' needs whole parameters on every process: not with FSDP or DeepSpeed")
        self.add_callback(RolloutBoundaries(self))

    __init__.__signature__ = inspect.signature(GRPOTrainer.__init__)  # pyright: ignore[reportFunctionMemberAccess]

    # ---- generate, and decide where that needs no pass of the loss ----------------------------------------

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.model.training:
            total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
            total = torch.where(rewards.isnan().all(dim=1), torch.nan, total)  # nothing could judge it: TRL sets A = 0
            first = self.accelerator.process_index * len(prompts)
            self.rollout.rewards = total[first : first + len(prompts)]
        return rewards

    def _generate_and_score_completions(self, inputs):
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        self.rollout = rollout = Rollout()
        batch = super()._generate_and_score_completions(inputs)
        rows = len(batch["completion_ids"])
        sample_id = torch.arange(rows, device=batch["completion_ids"].device) + rows * self.accelerator.process_index
        own = {"reward": rollout.rewards, "group": sample_id // self.num_generations, "sample_id": sample_id}
        rollout.inputs = batch | {COLUMNS[name]: column for name, column in own.items()}
        if self.transform.decides_from == "each token":
            return rollout.inputs
        if self.transform.decides_from == "rewards":
            rollout.tokens = self._tokens(rollout.inputs)
        else:
            found, rollout.statistics = rollout.statistics, None
            # Where TRL needs no old log-probs, the pass that was seen is a reference model's: only the very tensor that
            # TRL keeps as old log-probs is the policy's.
            if found is None or found.logp is not batch.get("old_per_token_logps"):
                found = self._statistics_of(batch)
            tokens = self._tokens(rollout.inputs, *found)
            every = self.transform.exact_every
            done = self.state.global_step * self.args.gradient_accumulation_steps // self.micro_steps_per_rollout
            if every > 0 and done % every == 0:
                exact = exact_sensitivity_of(self.accelerator, self.model, rollout.inputs, tokens, self.temperature)
                tokens = replace(tokens, exact_sensitivity=exact)
            rollout.tokens = tokens
        return self._decided(rollout)

    def _decided(self, rollout: Rollout) -> dict[str, Any]:
        """Run the method once on the tokens of all processes; TRL's batch with what it decided.

        The state moves on when the last update on the rollout is made, not before: λ_k is fixed for all of them.
        """
        whole = gather_tokens(self.accelerator, rollout.tokens)
        after, rollout.following, metrics = self.transform.update(whole, self.method_state)
        rollout.decision, rollout.after = (whole, after, metrics), own_part(self.accelerator, whole, after)
        return for_the_loss(rollout.inputs, rollout.after, len(after.response))

    # ---- the loss, and decide in it what needs each token alone --------------------------------------------

    def _compute_loss(self, model, inputs):
        # TRL serves the same dict again: never rewrite it in place. TRL's loss only passes `model` on to
        # `_get_per_token_logps_and_entropies`; a MicroBatch in its place tells that method which micro-batch it serves.
        micro_batch = MicroBatch(model, dict(inputs))
        loss = super()._compute_loss(micro_batch, micro_batch.inputs)
        if not self.model.training:
            return loss
        tokens = micro_batch.tokens
        if (terms := loss_terms(tokens)) is not None:
            loss = loss + averaged(self, terms, tokens, inputs)
        if self.on_loss is not None:
            self.on_loss(inputs, tokens)
        step = self._step % self.micro_steps_per_rollout
        if step == self.steps_per_generation - 1:  # the first pass over the rollout is complete
            self._measure(self.rollout)
        if step == self.micro_steps_per_rollout - 1:
            self.method_state = self.rollout.following
        return loss

    def _get_per_token_logps_and_entropies(self, model, *args, compute_entropy=False, **kwargs):
        if isinstance(model, MicroBatch):
            return self._loss_pass(model, *args, **kwargs)
        # Of a rollout that is being generated, the first pass for log-probs alone is that of the old ones; another is a
        # reference model's.
        rollout = self.rollout
        asked = self.transform.decides_from == "whole batch" and self.model.training and not rollout.inputs
        if asked and rollout.statistics is None and not compute_entropy:
            result, rollout.statistics = self._with_statistics(model, *args, **kwargs)
            return rollout.statistics.logp, None, result[2]
        # The same head in every pass: old and new log-probs of one policy are equal then, and their ratio 1.
        with StatisticsHead.serving(self._request(statistics=False)):
            return super()._get_per_token_logps_and_entropies(model, *args, compute_entropy=compute_entropy, **kwargs)

    def _loss_pass(self, micro_batch: MicroBatch, *args, **kwargs):
        """The forward pass of the loss, and the advantages that TRL reads right after it, but in an evaluation."""
        model, inputs = micro_batch.model, micro_batch.inputs
        has_statistics = self.transform.decides_from == "whole batch" and self.model.training
        result, statistics = self._with_statistics(model, *args, sensitivity=not has_statistics, **kwargs)
        tokens = self._tokens(inputs, *statistics)
        if not self.model.training:
            self._evaluated.add(tokens, lambda sums: self.accelerator.reduce(sums, "sum"))  # type: ignore[arg-type]
            return result
        # Later visits to the rollout see a policy that was updated on it.
        first = self._step % self.micro_steps_per_rollout < self.steps_per_generation
        if first and not has_statistics:
            self.rollout.seen.append(tokens)
        if self.transform.local is not None:
            seen, tokens = tokens, self.transform.local(tokens, self.method_state)
            if tokens.advantages is not seen.advantages:
                inputs["advantages"] = advantages_for_trl(inputs, tokens)
            if first:
                self.rollout.made.append(tokens)
        tokens = without_dropped(inputs, tokens)
        micro_batch.tokens = replace(tokens, logp=at(tokens, result[0]), entropy=at(tokens, result[1]))
        return result

    # ---- forward passes as TRL makes them, with our statistics ---------------------------------------------

    def _request(self, statistics: bool) -> Request:
        entropy_grad = self._entropy_bonus_enabled or self.transform.entropy_gradient
        return Request(self.args.statistics_head, statistics, entropy_grad)

    def _with_statistics(self, model, *args, sensitivity: bool = True, **kwargs) -> tuple[tuple, Statistics]:
        """What TRL's function gives of a pass, entropies included, and the statistics in it and beside it."""
        keep, slots = args[2] if len(args) > 2 else kwargs["logits_to_keep"], []

        def watched(**model_inputs):
            output = model(**model_inputs)
            slots.append(output.mean_logits)
            return output

        with StatisticsHead.serving(self._request(sensitivity)):
            result = super()._get_per_token_logps_and_entropies(watched, *args, compute_entropy=True, **kwargs)
        beside = torch.cat([slot[:, -keep:] for slot in slots]) if sensitivity else None
        return result, Statistics(result[0].detach(), result[1].detach(), beside)

    def _statistics_of(self, batch: dict[str, Any]) -> Statistics:
        """Those of a batch that was generated, from a pass without gradient."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        accepted = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
        extra = {name: value for name, value in batch.items() if name in accepted}
        keep, size = batch["completion_ids"].size(1), self.args.per_device_train_batch_size
        checkpointing = grpo_trainer.disable_gradient_checkpointing
        # The fork keeps the pass from moving the random state: dropout afterwards is that of plain GRPO.
        quiet = checkpointing(self.model, self.args.gradient_checkpointing_kwargs)  # type: ignore[arg-type]
        with torch.no_grad(), torch.random.fork_rng(), quiet:
            return self._with_statistics(self.model, ids, attention, keep, batch_size=size, **extra)[1]

    # ---- measure and record --------------------------------------------------------------------------------

    def _first_pass(self, rollout: Rollout) -> tuple[Tokens, Tokens, Metrics]:
        """(tokens, what the method made of them, its metrics) of all processes; `rollout` gets those of this one."""
        decides_from = self.transform.decides_from
        if decides_from == "each token":
            assert self.transform.advance is not None
            rollout.tokens = in_order(rollout.seen)
            rollout.after = self._with_importance(in_order(rollout.made), rollout.inputs)
            before = gather_tokens(self.accelerator, rollout.tokens)
            after = replace(before, **gather_columns(self.accelerator, made_columns(rollout.after)))
            rollout.following, metrics = self.transform.advance(before, self.method_state)
        elif decides_from == "rewards":
            # The loss saw the rewritten advantages, and its w is theirs; for `before` TRL's own are put back.
            seen, (_, after, metrics) = in_order(rollout.seen), rollout.decision
            own = replace(seen, advantages=rollout.tokens.advantages)
            rollout.tokens, rollout.after = self._with_importance(own, rollout.inputs), as_decided(seen, rollout.after)
            before = gather_tokens(self.accelerator, rollout.tokens)
            after = as_decided(before, after)
            del rollout.decision  # it is as large as the batches of all processes
        else:
            before, after, metrics = rollout.decision
            rollout.after = self._with_importance(rollout.after, rollout.inputs)
            del rollout.decision
        w = gather_columns(self.accelerator, {"importance": rollout.after.require("importance")})
        return before, replace(after, **w), metrics

    def _measure(self, rollout: Rollout) -> None:
        """Measure a rollout after the first pass over it.

        Every token has been seen once. Where a rollout is split over several updates, later micro-batches were seen by
        a policy already updated on earlier ones: their ratios are not 1, and the clip looks at the sign of A. So
        `before` has the w of TRL's own advantages, and `after` that of the rewritten ones.
        """
        before, after, metrics = self._first_pass(rollout)
        rollout.seen, rollout.made = [], []
        rollout.metrics = self.monitor.measure(before, after) | metrics
        for name, value in rollout.metrics.items():
            if not math.isnan(value):  # where nothing was written there is no entropy: TRL would log None for it
                self._metrics["train"][name].append(value)
        if self.on_rollout is not None:
            self.on_rollout(rollout)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not self.model.training:
            for name, value in self._evaluated.take(flows=(self.num_generations_eval or 0) > 1).items():
                self._metrics["eval"][name].append(value)
        super().log(logs, start_time)

    def _tokens(self, inputs, logp=None, entropy=None, sensitivity=None) -> Tokens:
        """The model tokens of some rows; without statistics where no pass was made yet."""
        old_logp = inputs.get("old_per_token_logps", logp)
        tokens = packed(inputs, logp=logp, old_logp=old_logp, entropy=entropy, sensitivity=sensitivity)
        if logp is None:
            return tokens
        return self._with_importance(tokens, inputs)

    def _with_importance(self, tokens: Tokens, inputs: dict[str, Any]) -> Tokens:
        """The tokens with the w of the advantages that they have."""
        return replace(tokens, importance=importance(self, tokens, inputs.get("importance_sampling_ratio")))
