"""What an engine is: it folds tiles of logits into the states of their rows, and turns them into gradients."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor

from entropy_polarity.kernels.state import Head


class Tile(NamedTuple):
    """Some rows of logits along a vocabulary slice of W tokens.

    logits   (n, W) as the product made them, before `head`; or (b, t, W) with any strides, where the engine takes them
    tokens   (n,) sampled ids, of the whole vocabulary
    head     what makes tempered logits of them
    start    the id of the slice's first token
    mask     (n,), False at rows that do not count, whatever they hold; None where all rows count
    """

    logits: Tensor
    tokens: Tensor
    head: Head
    start: int = 0
    mask: Tensor | None = None


class Engine(ABC):
    """One implementation: `state` (6, n) holds six numbers per row (`state.py`), `stats` (7, n) the TokenStats."""

    strided_batches = False  # whether `statistics` and `gradient` take logits (b, t, W) with any strides

    @abstractmethod
    def product_tile(self, rows: int, vocabulary: int, itemsize: int, tile_bytes: int | None) -> tuple[int, int]:
        """Height and width of the tiles in which the logits (rows, vocabulary) are made from hidden states."""

    @abstractmethod
    def statistics(self, tile: Tile, state: Tensor, stats: Tensor) -> None:
        """Fill `state` and `stats` from a tile of whole rows; `stats` is 0 where the mask is False."""

    @abstractmethod
    def fold(self, tile: Tile, state: Tensor, stats: Tensor | None, keep: bool) -> None:
        """Merge a tile without mask into `state`, the tiles of a row in order; with the last one `stats` is filled.
        The logits may be overwritten unless `keep` is True."""

    @abstractmethod
    def gradient(self, tile: Tile, maximum: Tensor, coefficients: Tensor, out: Tensor) -> None:
        """The gradient along a tile (`state.gradient_coefficients`) in `out`, which may be its logits; 0 where masked.
        `maximum` (n,) is that of the whole rows, `coefficients` are (3, n)."""


def spans(length: int, step: int, start: int = 0) -> list[slice]:
    """Slices of `step` that cover `start` to `length`."""
    return [slice(i, min(i + step, length)) for i in range(start, length, step)]
