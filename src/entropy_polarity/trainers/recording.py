"""From a trainer's callbacks to the run directory: metrics a step, sampled rollouts with their token columns."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from entropy_polarity.record import RunWriter
from entropy_polarity.trainers.trl import PolarityTrainer, Rollout
from entropy_polarity.transforms import token_polarity

# Hugging Face's closing log line has these; they are about the whole run and go nowhere near the steps.
_CLOSING = "train_runtime"


class RunRecorder(TrainerCallback):
    """Attach with `RunRecorder(writer, ...).attach(trainer)`. `watch(row)` is called with each metrics row."""

    def __init__(
        self,
        writer: RunWriter,
        completions: int,
        judge: Callable[[str, str], str],
        watch: Callable[[dict], None],
    ) -> None:
        self.writer, self.completions, self.judge, self.watch = writer, completions, judge, watch

    def attach(self, trainer: PolarityTrainer) -> None:
        self.trainer = trainer
        trainer.add_callback(self)
        if trainer.accelerator.is_main_process:
            trainer.on_rollout = self.record_rollout

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs):
        if logs and state.is_world_process_zero and _CLOSING not in logs:
            row = {"step": state.global_step, **logs}
            self.writer.metrics(row)
            self.watch(row)

    def record_rollout(self, rollout: Rollout) -> None:
        """A few completions, evenly spread over the batch and moving on each step, so that all prompts get a turn."""
        step, tokens = self.trainer.state.global_step + 1, rollout.tokens
        count = min(self.completions, len(tokens.mask))
        if not count:
            return
        stride = len(tokens.mask) // count
        picked = [i * stride + step % stride for i in range(count)]
        decode: Callable[..., str] = self.trainer.processing_class.decode  # type: ignore[union-attr,assignment]
        polarity = token_polarity(tokens)
        rows: list[dict[str, Any]] = []
        columns: dict[str, list[Any]] = {
            name: []
            for name in (
                "rollout",
                "position",
                "token",
                "logp",
                "entropy",
                "sensitivity",
                "polarity",
                "weight",
            )
        }
        for number, row in enumerate(picked):
            ids = rollout.inputs["completion_ids"][row]
            kept = tokens.mask[row].nonzero().flatten()
            prompt = decode(_unpadded(rollout.inputs, "prompt", row), skip_special_tokens=True)
            completion = decode(_unpadded(rollout.inputs, "completion", row), skip_special_tokens=True)
            rows.append(
                {
                    "step": step,
                    "rollout": number,
                    "prompt": prompt,
                    "completion": completion,
                    "reward": tokens.known("reward")[row].item(),
                    "advantage": tokens.advantages[row, 0].item(),
                    "verdict": self.judge(prompt, completion),
                }
            )
            columns["rollout"] += [number] * len(kept)
            columns["position"] += kept.tolist()
            columns["token"] += [decode([i]) for i in ids[kept].tolist()]
            for name, values in (
                ("logp", tokens.known("logp")),
                ("entropy", tokens.known("entropy")),
                ("sensitivity", tokens.known("sensitivity")),
                ("polarity", polarity),
                ("weight", rollout.weight),
            ):
                columns[name] += values[row, kept].tolist()
        self.writer.rollouts(rows, columns)


def _unpadded(inputs: dict[str, Any], part: str, row: int) -> torch.Tensor:
    return inputs[f"{part}_ids"][row][inputs[f"{part}_mask"][row].bool()]
