"""From a trainer's callbacks to the run directory: metrics of each step, sampled rollouts with their token columns."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from entropy_polarity.runs.record import RunWriter
from entropy_polarity.support.text import valid, valid_parts
from entropy_polarity.trainers.trl.packing import loss_mask
from entropy_polarity.trainers.trl.rollout import Rollout
from entropy_polarity.trainers.trl.trainer import PolarityTrainer
from entropy_polarity.transforms import token_polarity


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
        self, writer: RunWriter, completions: int, judged: Callable[[], list[Judged]], watch: Callable[[dict], None]
    ) -> None:
        self.writer, self.completions, self.judged, self.watch = writer, completions, judged, watch

    def attach(self, trainer: PolarityTrainer) -> None:
        self.trainer = trainer
        trainer.add_callback(self)
        trainer.on_rollout = self.record_rollout

    def on_train_begin(self, args, state, control, **kwargs):
        # A resumed run picks what an uninterrupted one would.
        micro_steps = state.global_step * args.gradient_accumulation_steps
        self._rollouts = micro_steps // self.trainer.micro_steps_per_rollout

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs):
        # The closing line has "train_runtime": it is about the whole run, and no row of a step.
        if logs and state.is_world_process_zero and "train_runtime" not in logs:
            row = {"step": state.global_step, **logs}
            self.writer.metrics(row)
            if control.should_save:
                self.writer.sync()
            updates = max(1, self.trainer.micro_steps_per_rollout // args.gradient_accumulation_steps)
            self.watch(row | {"update": (state.global_step - 1) % updates + 1, "updates": updates})

    def record_rollout(self, rollout: Rollout) -> None:
        """A few completions, evenly spread over the batch and moving on each rollout, so that each place of the batch
        gets its turn."""
        self._rollouts += 1
        step, responses = self.trainer.state.global_step + 1, len(rollout.inputs["completion_ids"])
        count = min(self.completions, responses)
        if count < 1:
            return
        stride = responses // count
        picked = [number * stride + self._rollouts % stride for number in range(count)]
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
        self.writer.rollouts(rows, self._token_columns(rollout, picked))

    def _token_columns(self, rollout: Rollout, picked: list[int]) -> dict[str, list[Any]]:
        """The columns of some completions: their model tokens, and between them what an environment said."""
        tokens, inputs = rollout.tokens, rollout.inputs
        shape = tuple(inputs["completion_ids"].shape)
        learnt = tokens.unpack(torch.ones_like(tokens.response, dtype=torch.bool), shape)
        heard = inputs["completion_mask"].bool() & ~loss_mask(inputs)
        number, position = (learnt | heard)[picked].nonzero().unbind(1)
        places = number.new_tensor(picked)[number], position
        decode: Callable[..., str] = self.trainer.processing_class.decode  # type: ignore[union-attr,assignment]
        values = {name: tokens.require(name) for name in ("logp", "entropy", "sensitivity")}
        values |= {"polarity": token_polarity(tokens), "weight": rollout.weight}
        return {
            "rollout": number.tolist(),
            "position": position.tolist(),
            "token": [valid(decode([token])) for token in inputs["completion_ids"][places].tolist()],
            **{name: tokens.unpack(column, shape, torch.nan)[places].tolist() for name, column in values.items()},
            "from_policy": learnt[places].tolist(),
        }
