"""From a trainer's callbacks to the run directory: metrics a step, sampled rollouts with their token columns."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback

from entropy_polarity.runs.record import TOKEN_COLUMNS, RunWriter
from entropy_polarity.support.text import valid, valid_parts
from entropy_polarity.trainers.trl.rollout import Rollout
from entropy_polarity.trainers.trl.trainer import PolarityTrainer
from entropy_polarity.transforms import token_polarity

# Hugging Face's closing log line has this; it is about the whole run and goes nowhere near the steps.
_CLOSING = "train_runtime"


class Judged(NamedTuple):
    """The texts of a completion, and the verdict on it."""

    prompt: str
    completion: str
    verdict: str


class RunRecorder(TrainerCallback):
    """Attach with `RunRecorder(writer, ...).attach(trainer)`.

    `completions` of each rollout batch are kept; `judged()` gives the texts of the last one, in order of generation;
    `watch(row)` is called with each metrics row, and which of how many updates on a rollout it is about: "update" of
    "updates".
    """

    def __init__(
        self,
        writer: RunWriter,
        completions: int,
        judged: Callable[[], list[Judged]],
        watch: Callable[[dict], None],
    ) -> None:
        self.writer, self.completions, self.judged, self.watch = writer, completions, judged, watch

    def attach(self, trainer: PolarityTrainer) -> None:
        self.trainer = trainer
        trainer.add_callback(self)
        trainer.on_rollout = self.record_rollout

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs):
        if logs and state.is_world_process_zero and _CLOSING not in logs:
            row = {"step": state.global_step, **logs}
            self.writer.metrics(row)
            if control.should_save:
                self.writer.sync()
            updates = max(1, self.trainer.micro_steps_per_rollout // args.gradient_accumulation_steps)
            self.watch(row | {"update": (state.global_step - 1) % updates + 1, "updates": updates})

    def record_rollout(self, rollout: Rollout) -> None:
        """A few completions, evenly spread over the batch and moving on each step, so that all prompts get a turn."""
        step, responses = self.trainer.state.global_step + 1, len(rollout.inputs["completion_ids"])
        count = min(self.completions, responses)
        if count < 1:
            return
        stride = responses // count
        picked = [number * stride + step % stride for number in range(count)]
        columns: dict[str, list[Any]] = {name: [] for name in TOKEN_COLUMNS.names}
        for number, row in enumerate(picked):
            for name, values in self._token_columns(rollout, row).items():
                columns[name] += values
            columns["rollout"] += [number] * (len(columns["token"]) - len(columns["rollout"]))
        judged = self.judged()
        rows = [
            {
                "step": step,
                "rollout": number,
                **valid_parts(judged[row]._asdict()),
                "reward": rollout.rewards[row].item(),
                "advantage": rollout.inputs["advantages"][row].item(),
            }
            for number, row in enumerate(picked)
        ]
        self.writer.rollouts(rows, columns)

    def _token_columns(self, rollout: Rollout, row: int) -> dict[str, list[Any]]:
        """The columns of one completion: its model tokens, and between them what an environment said."""
        tokens, inputs = rollout.tokens, rollout.inputs
        own = tokens.response == row
        learnt = torch.zeros_like(inputs["completion_mask"][row], dtype=torch.bool)
        learnt[tokens.position[own]] = True
        heard = torch.zeros_like(learnt)
        if "tool_mask" in inputs:
            heard = inputs["completion_mask"][row].bool() & ~inputs["tool_mask"][row].bool()
        kept = (learnt | heard).nonzero().flatten()
        decode: Callable[..., str] = self.trainer.processing_class.decode  # type: ignore[union-attr,assignment]
        values = {
            "logp": tokens.require("logp"),
            "entropy": tokens.require("entropy"),
            "sensitivity": tokens.require("sensitivity"),
            "polarity": token_polarity(tokens),
            "weight": rollout.weight,
        }

        def column(of_tokens: Tensor) -> list[float]:
            padded = of_tokens.new_full(learnt.shape, torch.nan)
            padded[learnt] = of_tokens[own]
            return padded[kept].tolist()

        return {
            "position": kept.tolist(),
            "token": [valid(decode([token])) for token in inputs["completion_ids"][row, kept].tolist()],
            **{name: column(of_tokens) for name, of_tokens in values.items()},
            "from_policy": learnt[kept].tolist(),
        }
