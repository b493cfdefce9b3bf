"""A forecast of what an update does to the mean entropy, cheap enough for every update of a training.

    <ḡ, δ>      δ is the step that the optimiser made, ḡ an average over updates of ĝ, the gradient of the mean entropy
                over a few of the sequences trained on

ĝ of a few sequences is noisy, but the gradient that it estimates changes slowly: averaging over updates costs nothing.
δ contains what momentum, clipping and weight decay made of the step, which is most of it.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from entropy_polarity.diagnostics.entropy import (
    CHUNK_BYTES,
    Parameters,
    Sequences,
    entropy_gradient,
    trainable_parameters,
)

SHARE, MEMORY, EVERY = 1 / 16, 0.9, 2


@dataclass
class Forecast:
    """The forecast change of the mean entropy, in nats; NaN until the step is made."""

    change: float = math.nan


class Forecaster:
    """Forecasts update after update; keep one for a run.

        with forecaster.forecasting(model, sequences) as forecast:
            optimizer.step()
        forecast.change

    ĝ is taken over a `share` of the sequences of the first update and of each `every`-th after it, and
    ḡ ← memory ḡ + (1 - memory) ĝ, without the bias of its start; `memory` 0 is ĝ alone. The forecast holds to first
    order in the step, up to the sampling error of ḡ. It costs one backward over that share of the sequences, and memory
    for θ, ĝ and ḡ. Parameters, gradients, modes and the random state are left to the bit. Raises ValueError for a share
    outside (0, 1], a memory outside [0, 1) or an `every` below 1. Source: ours.
    """

    def __init__(self, share: float = SHARE, memory: float = MEMORY, every: int = EVERY) -> None:
        check_share(share)
        if not 0 <= memory < 1:
            raise ValueError(f"Forecaster: memory is {memory}; expected at least 0 and below 1")
        if every < 1:
            raise ValueError(f"Forecaster: every is {every}; expected a number of updates, at least 1")
        self.share, self.memory, self.every = share, memory, every
        self._average: Parameters = {}
        self._weight = 0.0
        self._updates = 0

    @contextmanager
    def forecasting(
        self, model: nn.Module, sequences: Sequences, *, temperature: float = 1.0, chunk_bytes: int = CHUNK_BYTES
    ) -> Iterator[Forecast]:
        """Forecast the optimiser step inside the block. Raises ValueError where `entropy_gradient` does."""
        self.observe(model, sequences, temperature=temperature, chunk_bytes=chunk_bytes)
        forecast = Forecast()
        with parameter_change(model) as step:
            yield forecast
        forecast.change = inner_product(self._average, step) / self._weight

    def observe(
        self, model: nn.Module, sequences: Sequences, *, temperature: float = 1.0, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        """Take an update's sequences into ḡ if it is one of those `every` so many; `forecasting` does so first."""
        if self._updates % self.every == 0:
            few = subsample(sequences, self.share)
            _, g = entropy_gradient(model, few, temperature=temperature, chunk_bytes=chunk_bytes)
            self._weight = self.memory * self._weight + 1 - self.memory
            for name, part in g.items():
                old = self._average.get(name)
                self._average[name] = part * (1 - self.memory) if old is None else old.lerp(part, 1 - self.memory)
        self._updates += 1

    @property
    def average_gradient(self) -> Parameters:
        """ḡ, by the names of the parameters."""
        return {name: part / self._weight for name, part in self._average.items()}


def subsample(sequences: Sequences, share: float) -> Sequences:
    """About that share of the sequences in which something was sampled, evenly spaced; at least one. Raises ValueError
    for a share outside (0, 1]."""
    check_share(share)
    return sequences.rows(sequences.mask.any(1).nonzero().flatten()[:: round(1 / share)])


def check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; expected a part of the sequences, above 0 and at most 1")


@contextmanager
def parameter_change(model: nn.Module) -> Iterator[Parameters]:
    """The change of the trainable parameters inside the block, by name; filled in when the block is left."""
    start = {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}
    change: Parameters = {}
    yield change
    change |= {name: parameter.detach() - start[name] for name, parameter in trainable_parameters(model).items()}


def inner_product(a: Parameters, b: Parameters) -> float:
    """The inner product of two vectors that are given by parameters, summed in float64."""
    return sum(dot(a[name], b[name]) for name in a)


def dot(a: Tensor, b: Tensor) -> float:
    """The inner product of one parameter's parts, summed in float64."""
    return (a.double() * b.double()).sum().item()
