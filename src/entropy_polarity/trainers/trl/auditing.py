"""From a trainer's callbacks to the audit of every update it makes, and to a forecast of what each will do."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import TrainerCallback

from entropy_polarity.diagnostics.audit import Audit, audited
from entropy_polarity.diagnostics.entropy import Sequences
from entropy_polarity.diagnostics.forecast import EVERY, MEMORY, SHARE, Forecast, Forecaster, subsample
from entropy_polarity.tokens import Tokens
from entropy_polarity.trainers.trl.loss import averaged, importance
from entropy_polarity.trainers.trl.sequences import joined, sequences_of
from entropy_polarity.trainers.trl.trainer import PolarityTrainer


class UpdateAuditor(TrainerCallback):
    """Attach with `UpdateAuditor(watch, ...).attach(trainer)`. The run is the one it would be without.

    `watch(step, audit)` is called after each optimiser step; `held_out(step)` gives the other states to look at, or
    is None. Loss terms beside the policy's (entropy bonus, penalties) have no local formula; all other levels see them.
    """

    def __init__(self, watch: Callable[[int, Audit], None], held_out: Callable[[int], Sequences] | None = None) -> None:
        self.watch, self.held_out = watch, held_out
        self.forecaster = Forecaster()
        self._seen: list[tuple[Sequences, Tensor]] = []
        self._open = ExitStack()
        self._audit: Audit | None = None

    def attach(self, trainer: PolarityTrainer) -> None:
        self.trainer = _alone(trainer, "the audit")
        trainer.add_callback(self)
        trainer.on_loss = self._collect

    def _collect(self, inputs: dict[str, Any], tokens: Tokens) -> None:
        """One micro-batch: its sequences, and the factor on ∇ log π of each of its tokens in the objective."""
        sequences = sequences_of(inputs, tokens)
        tokens = tokens.detach()
        factor = importance(self.trainer, tokens, inputs.get("importance_sampling_ratio")) * tokens.advantages
        with torch.enable_grad():
            share = torch.ones_like(factor, requires_grad=True)
            (share_of_loss,) = torch.autograd.grad(averaged(self.trainer, share, tokens, inputs), share)
        pressure = tokens.unpack(factor * share_of_loss, tuple(inputs["completion_ids"].shape))
        self._seen.append((sequences, pad(pressure, (inputs["prompt_ids"].size(1), 0))))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        parts, pressures = zip(*self._seen, strict=True)
        self._seen = []
        sequences = joined(parts)
        if not sequences.mask.any():
            return  # every token was dropped: there is no prediction to look at
        states = None if self.held_out is None else self.held_out(state.global_step)
        block = audited(
            self.trainer.accelerator.unwrap_model(self.trainer.model),
            self.trainer.optimizer,
            sequences,
            torch.cat(pressures),
            held_out=states,
            forecaster=self.forecaster,
            temperature=self.trainer.temperature,
        )
        self._audit = self._open.enter_context(block)

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self._audit is None:
            return
        self._open.close()
        found, self._audit = self._audit, None
        self.watch(state.global_step + 1, found)


class UpdateForecaster(TrainerCallback):
    """Attach with `UpdateForecaster().attach(trainer)`: logs "polarity/forecast_entropy_change" of every update.

    In nats, by a `Forecaster` of the same settings. The run is the one it would be without.
    """

    def __init__(self, share: float = SHARE, memory: float = MEMORY, every: int = EVERY) -> None:
        self.forecaster, self.share = Forecaster(1.0, memory, every), share
        self._seen: list[Sequences] = []
        self._open = ExitStack()
        self._forecast: Forecast | None = None

    def attach(self, trainer: PolarityTrainer) -> None:
        self.trainer = _alone(trainer, "the forecast")
        trainer.add_callback(self)
        trainer.on_loss = self._collect

    def _collect(self, inputs: dict[str, Any], tokens: Tokens) -> None:
        if len(tokens.response):
            self._seen.append(subsample(sequences_of(inputs, tokens), self.share))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self._seen:
            return
        sequences, self._seen = joined(self._seen), []
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        block = self.forecaster.forecasting(model, sequences, temperature=self.trainer.temperature)
        self._forecast = self._open.enter_context(block)

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self._forecast is not None:
            self._open.close()
            self.trainer._metrics["train"]["polarity/forecast_entropy_change"].append(self._forecast.change)
            self._forecast = None


def _alone(trainer: PolarityTrainer, who: str) -> PolarityTrainer:
    """The trainer, if nobody else watches its losses. Raises ValueError."""
    if trainer.accelerator.num_processes > 1:
        raise ValueError(f"{who} looks at one process; this run has several")
    if trainer.on_loss is not None:
        raise ValueError(
            f"{who} needs the trainer's on_loss, which is taken: attach one UpdateAuditor, which forecasts as well, or "
            "one UpdateForecaster"
        )
    return trainer
