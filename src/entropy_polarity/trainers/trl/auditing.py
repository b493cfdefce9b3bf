"""From a trainer's callbacks to the audit of every update it makes, and to a forecast of what each will do."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import TrainerCallback

from entropy_polarity.diagnostics.audit import Audit, audited
from entropy_polarity.diagnostics.entropy import Sequences
from entropy_polarity.diagnostics.forecast import EVERY, MEMORY, SHARE, Forecaster, subsample
from entropy_polarity.tokens import Tokens
from entropy_polarity.trainers.trl.loss import averaged, importance
from entropy_polarity.trainers.trl.sequences import concatenate_sequences, sequences_of
from entropy_polarity.trainers.trl.trainer import PolarityTrainer


class _UpdateWatcher(TrainerCallback):
    """Looks at every update of a run, which is the one it would be without.

    `_part` is what is kept of each micro-batch of an update; the optimiser's step after so many others is made inside
    the block of `_around(steps, parts)`.
    """

    _part: Callable[..., Any]
    _around: Callable[..., AbstractContextManager[None]]

    def __init__(self) -> None:
        self._seen: list[Any] = []
        self._open = ExitStack()

    def attach(self, trainer: PolarityTrainer) -> None:
        """Raises ValueError where the trainer has several processes, or another watcher."""
        if trainer.accelerator.num_processes > 1:
            raise ValueError(f"{type(self).__name__} looks at one process; this run has several")
        if trainer.on_loss is not None:
            raise ValueError(
                f"{type(self).__name__} needs the trainer's on_loss, which is taken: attach one UpdateAuditor, which "
                "forecasts as well, or one UpdateForecaster"
            )
        self.trainer = trainer
        trainer.add_callback(self)
        trainer.on_loss = self._collect

    def _collect(self, inputs: dict[str, Any], tokens: Tokens) -> None:
        if len(tokens.response):  # else every token was dropped: there is no prediction to look at
            self._seen.append(self._part(inputs, tokens))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        seen, self._seen = self._seen, []
        if seen:
            self._open.enter_context(self._around(state.global_step, seen))

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._open.close()


class UpdateAuditor(_UpdateWatcher):
    """Attach with `UpdateAuditor(watch, ...).attach(trainer)`.

    `watch(step, audit)` is called after each optimiser step; `held_out(step)` gives the other states to look at, or
    is None. Loss terms beside the policy's (entropy bonus, penalties) have no local formula; all other levels see them.
    """

    def __init__(self, watch: Callable[[int, Audit], None], held_out: Callable[[int], Sequences] | None = None) -> None:
        super().__init__()
        self.watch, self.held_out = watch, held_out
        self.forecaster = Forecaster()

    def _part(self, inputs: dict[str, Any], tokens: Tokens) -> tuple[Sequences, Tensor]:
        """The sequences, and the factor on ∇ log π of each of its tokens in the objective."""
        sequences = sequences_of(inputs, tokens)
        tokens = tokens.detach()
        factor = importance(self.trainer, tokens, inputs.get("importance_sampling_ratio")) * tokens.advantages
        with torch.enable_grad():
            share = torch.ones_like(factor, requires_grad=True)
            (share_of_loss,) = torch.autograd.grad(averaged(self.trainer, share, tokens, inputs), share)
        pressure = tokens.unpack(factor * share_of_loss, tuple(inputs["completion_ids"].shape))
        return sequences, pad(pressure, (inputs["prompt_ids"].size(1), 0))

    @contextmanager
    def _around(self, steps: int, parts: list[tuple[Sequences, Tensor]]) -> Iterator[None]:
        sequences, pressures = zip(*parts, strict=True)
        with audited(
            self.trainer.accelerator.unwrap_model(self.trainer.model),
            self.trainer.optimizer,
            concatenate_sequences(sequences),
            torch.cat(pressures),
            held_out=None if self.held_out is None else self.held_out(steps),
            forecaster=self.forecaster,
            temperature=self.trainer.temperature,
        ) as audit:
            yield
        self.watch(steps + 1, audit)


class UpdateForecaster(_UpdateWatcher):
    """Attach with `UpdateForecaster().attach(trainer)`: logs "polarity/forecast_entropy_change" of every update, in
    nats, by a `Forecaster` with this `memory` and `every`, which looks at an evenly spaced
    `share` of the sequences of each micro-batch."""

    def __init__(self, share: float = SHARE, memory: float = MEMORY, every: int = EVERY) -> None:
        super().__init__()
        self.forecaster, self.share = Forecaster(1.0, memory, every), share

    def _part(self, inputs: dict[str, Any], tokens: Tokens) -> Sequences:
        return subsample(sequences_of(inputs, tokens), self.share)

    @contextmanager
    def _around(self, steps: int, parts: list[Sequences]) -> Iterator[None]:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        with self.forecaster.forecasting(
            model, concatenate_sequences(parts), temperature=self.trainer.temperature
        ) as forecast:
            yield
        self.trainer._metrics["train"]["polarity/forecast_entropy_change"].append(forecast.change)
