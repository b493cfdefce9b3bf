"""The engine for every device: statistics and gradients of logits in torch, some rows at a time, in one pass over them.

A chunk is a few rows of the whole tile, and a few tensors of its size are all the memory the engine needs. Logits of 16
bits are accumulated in float32. On a CPU `cpu.py` does the same work with NumPy.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from entropy_polarity.kernels.engine import Engine, Tile, spans
from entropy_polarity.kernels.state import AT_TOKEN, Head, finish, merge
from entropy_polarity.maths import LOWEST

# Elements of a chunk: enough to fill a device.
CHUNK_ELEMENTS = 2**23
# A tile that is also a matrix product wants more rows; its buffer is the product's: 12 MiB in float32.
PRODUCT_ELEMENTS = 3 * 2**20
PRODUCT_ROWS = 256
# Rows whose statistics are made from their sums at once.
FINISH_ROWS = 2**12


class Chunked(Engine):
    def product_tile(self, rows: int, vocabulary: int, itemsize: int, tile_bytes: int | None) -> tuple[int, int]:
        elements = PRODUCT_ELEMENTS if tile_bytes is None else max(1, tile_bytes // itemsize)
        height = max(1, min(rows, max(PRODUCT_ROWS, elements // vocabulary), elements))
        return height, max(1, min(vocabulary, elements // height))

    def statistics(self, tile: Tile, state: Tensor, stats: Tensor) -> None:
        self._sums(tile, state[:AT_TOKEN], in_place=False)
        for rows in spans(len(tile.tokens), FINISH_ROWS):
            state[AT_TOKEN, rows] = at_token(tile, rows, state.dtype)
            stats[:, rows] = finish(state[:, rows], tile.head)
        if tile.mask is not None:
            stats[:, ~tile.mask] = 0

    def fold(self, tile: Tile, state: Tensor, stats: Tensor | None, keep: bool) -> None:
        parts = torch.stack([state, state])
        parts[1, AT_TOKEN] = at_token(tile, slice(None), state.dtype)
        self._sums(tile, parts[1, :AT_TOKEN], in_place=not keep)
        state.copy_(merge(parts, tile.head))
        if stats is not None:
            stats.copy_(finish(state, tile.head))

    def gradient(self, tile: Tile, maximum: Tensor, coefficients: Tensor, out: Tensor) -> None:
        for rows in row_chunks(tile, CHUNK_ELEMENTS):
            out[rows] = _gradient(tile, rows, maximum[rows], coefficients[:, rows])
        if tile.mask is not None:
            out[~tile.mask] = 0

    def _sums(self, tile: Tile, out: Tensor, in_place: bool) -> None:
        """`torch_sums` of all rows. `in_place` allows the logits to be overwritten, which a subclass makes use of."""
        for rows in row_chunks(tile, CHUNK_ELEMENTS):
            out[:, rows] = torch_sums(tile.logits[rows].to(out.dtype), tile.head)


def torch_sums(x: Tensor, head: Head) -> Tensor:
    """The state (5, n) of a tile (n, W), but for the sampled token."""
    maximum, mode = x.max(-1, keepdim=True)
    maximum = head.within(maximum)
    d = head.below(x, maximum)
    e = d.clamp_(min=LOWEST).exp().scatter_(-1, mode, 0.0)
    r = e.sum(-1)
    rd = d.mul_(e).sum(-1)
    qd = d.mul_(e).sum(-1)
    return torch.stack([maximum[:, 0], r, rd, e.square_().sum(-1), qd])


def _gradient(tile: Tile, rows: slice, maximum: Tensor, coefficients: Tensor) -> Tensor:
    """The gradient along some rows of a tile (`state.gradient_coefficients`)."""
    head, (alpha, beta, gamma) = tile.head, coefficients[:, :, None]
    x = tile.logits[rows].to(maximum.dtype)
    d = head.below(x, maximum[:, None]).clamp_(min=LOWEST)
    e = d.exp()
    d.mul_(beta).add_(alpha).mul_(e)
    inside, place = _place_of_token(tile, rows)
    d.scatter_(-1, place, torch.where(inside, gamma, d.gather(-1, place)))
    return d if head.softcap is None else d.mul_(head.bend(x))


def at_token(tile: Tile, rows: slice, dtype: torch.dtype) -> Tensor:
    """The sampled tokens' x in some rows of a tile; -inf where the token is outside its vocabulary slice."""
    inside, place = _place_of_token(tile, rows)
    x = tile.logits[rows].gather(-1, place).to(dtype)
    return torch.where(inside, tile.head.within(x), -torch.inf)[:, 0]


def _place_of_token(tile: Tile, rows: slice) -> tuple[Tensor, Tensor]:
    """Whether the sampled tokens lie in the tile's vocabulary slice, and where in it (anywhere if not); (n, 1) each."""
    place = (tile.tokens[rows] - tile.start)[:, None]
    width = tile.logits.shape[1]
    return (place >= 0) & (place < width), place.clamp(0, width - 1)


def row_chunks(tile: Tile, elements: int) -> Iterator[slice]:
    """Slices of the rows that the mask keeps, of so many elements at most. Short gaps, cheaper to compute than to go
    around, are part of them."""
    rows, width = tile.logits.shape
    height = max(1, elements // width)
    if tile.mask is None:
        yield from spans(rows, height)
        return
    kept = tile.mask.nonzero()[:, 0]
    if len(kept):
        breaks = ((kept.diff() - 1) * width >= 2**15).nonzero()[:, 0] + 1
        for run in kept.tensor_split(breaks.cpu()):
            yield from spans(int(run[-1]) + 1, height, start=int(run[0]))
