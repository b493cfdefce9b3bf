"""A forecast of what an update does to the mean entropy, cheap enough for every update of a training.

    <ḡ, δ>      δ the step that the optimiser made, ḡ an average over updates of ĝ, the gradient of the mean entropy
                over a few of the sequences trained on

ĝ of few sequences is noisy, and the gradient it estimates changes slowly: averaging over updates costs nothing. δ holds
what momentum, clipping and weight decay made of the step, which is most of it. Source: ours.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from entropy_polarity.diagnostics.exact import CHUNK_BYTES, Parameters, Sequences, entropy_gradient

SHARE, MEMORY, EVERY = 1 / 16, 0.9, 2


@dataclass
class Forecast:
    """The forecast change of the mean entropy, in nats; NaN until the step is made."""

    change: float = math.nan


class Forecaster:
    """Forecasts update after update; keep one for a run.

        with forecaster.foretold(model, sequences) as forecast:
            optimizer.step()
        forecast.change

    ĝ looks at a `share` of the sequences of the first update and of each `every`-th after it, and
    ḡ ← memory ḡ + (1 - memory) ĝ, without the bias of its start; `memory` 0 is ĝ alone. To first order in the step, up
    to the sampling error of ḡ. Costs one backward over that share of the sequences, and memory for θ, ĝ and ḡ.
    Parameters, gradients, modes and the random state are left to the bit. Raises ValueError for a share outside (0, 1],
    a memory outside [0, 1) or an `every` below 1. Source: ours.
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
    def foretold(
        self, model: nn.Module, sequences: Sequences, *, temperature: float = 1.0, chunk_bytes: int = CHUNK_BYTES
    ) -> Iterator[Forecast]:
        """Forecast the optimiser step inside the block. Raises ValueError where `entropy_gradient` does."""
        self.look(model, sequences, temperature=temperature, chunk_bytes=chunk_bytes)
        forecast = Forecast()
        with followed(model) as step:
            yield forecast
        forecast.change = inner(self._average, step) / self._weight

    def look(
        self, model: nn.Module, sequences: Sequences, *, temperature: float = 1.0, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        """Take an update's sequences into ḡ, where it is the turn of one: what `foretold` does first."""
        if self._updates % self.every == 0:
            few = spaced(sequences, self.share)
            _, g = entropy_gradient(model, few, temperature=temperature, chunk_bytes=chunk_bytes)
            self._weight = self.memory * self._weight + 1 - self.memory
            for name, part in g.items():
                old = self._average.get(name)
                self._average[name] = part * (1 - self.memory) if old is None else old.lerp(part, 1 - self.memory)
        self._updates += 1

    @property
    def slope(self) -> Parameters:
        """ḡ."""
        return {name: part / self._weight for name, part in self._average.items()}


def spaced(sequences: Sequences, share: float) -> Sequences:
    """About that share of those sequences in which something was sampled, evenly spaced; at least one."""
    check_share(share)
    rows = sequences.mask.any(1).nonzero().flatten()[:: round(1 / share)]
    return Sequences(*(None if column is None else column[rows] for column in sequences))  # type: ignore[arg-type]


def check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; expected a part of the sequences, above 0 and at most 1")


@contextmanager
def followed(model: nn.Module) -> Iterator[Parameters]:
    """The change of the parameters inside the block, known once it is left."""
    start = {name: parameter.detach().clone() for name, parameter in moving(model)}
    step: Parameters = {}
    yield step
    step |= {name: parameter.detach() - start[name] for name, parameter in moving(model)}


def moving(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def inner(a: Parameters, b: Parameters) -> float:
    return sum(dot(a[name], b[name]) for name in a)


def dot(a: Tensor, b: Tensor) -> float:
    return (a.double() * b.double()).sum().item()
