"""The engine for every device: statistics and gradients of logits in torch, some rows at a time, in one pass over them.

A tile is a few rows by all columns of the vocabulary, and a few tensors of its size are all the memory it needs; 16-bit
logits are accumulated in float32. On a CPU `cpu.py` does the same work with NumPy.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from entropy_polarity.kernels.dispatch import Engine, spans
from entropy_polarity.kernels.state import AT_TOKEN, Head, finish, merge
from entropy_polarity.maths import LOWEST

# Elements of a tile: enough to fill a device.
TILE_ELEMENTS = 2**23
# A tile that is also a matrix product wants more rows; its buffer is the product's: 12 MiB in float32.
PRODUCT_ELEMENTS = 3 * 2**20
PRODUCT_ROWS = 256
# Rows whose statistics are made from their sums at once.
FINISH_ROWS = 2**12


class Chunked(Engine):
    """A chunk of rows after the other."""

    name = "chunked"

    def product_tile(self, rows: int, columns: int, itemsize: int, tile_bytes: int | None) -> tuple[int, int]:
        elements = PRODUCT_ELEMENTS if tile_bytes is None else max(1, tile_bytes // itemsize)
        height = max(1, min(rows, max(PRODUCT_ROWS, elements // columns), elements))
        return height, max(1, min(columns, elements // height))

    def statistics(self, logits, tokens, mask, head, state, columns) -> None:
        self._sums(logits, mask, head, state[:AT_TOKEN], in_place=False)
        for rows in spans(len(tokens), FINISH_ROWS):
            state[AT_TOKEN, rows] = at_token(logits[rows], tokens[rows], head, state.dtype)
            columns[:, rows] = finish(state[:, rows], head)
        if mask is not None:
            columns[:, ~mask] = 0

    def fold(self, tile, tokens, start, head, state, columns, keep) -> None:
        parts = torch.stack([state, state])
        parts[1, AT_TOKEN] = at_token(tile, tokens - start, head, state.dtype)
        self._sums(tile, None, head, parts[1, :AT_TOKEN], in_place=not keep)
        state.copy_(merge(parts, head))
        if columns is not None:
            columns.copy_(finish(state, head))

    def gradient(self, tile, tokens, mask, start, head, maximum, coefficients, out) -> None:
        for rows in row_chunks(mask, len(tile), tile.shape[1], TILE_ELEMENTS):
            out[rows] = _gradient(tile[rows], tokens[rows] - start, head, maximum[rows], coefficients[:, rows])
        if mask is not None:
            out[~mask] = 0

    def _sums(self, logits: Tensor, mask: Tensor | None, head: Head, out: Tensor, in_place: bool) -> None:
        """The state (5, N) of logits (N, V), but for the sampled token; `in_place` allows to overwrite them, which only
        a subclass makes use of."""
        for rows in row_chunks(mask, len(logits), logits.shape[1], TILE_ELEMENTS):
            out[:, rows] = torch_sums(logits[rows].to(out.dtype), head)


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


def _gradient(tile: Tensor, tokens: Tensor, head: Head, maximum: Tensor, coefficients: Tensor) -> Tensor:
    """The gradient along a tile (n, W) (`state.gradient_coefficients`); ids count from the first column."""
    alpha, beta, gamma = coefficients[:, :, None]
    x = tile.to(maximum.dtype)
    d = head.below(x, maximum[:, None]).clamp_(min=LOWEST)
    e = d.exp()
    d.mul_(beta).add_(alpha).mul_(e)
    inside = (tokens >= 0) & (tokens < d.shape[1])
    place = tokens.clamp(0, d.shape[1] - 1)[:, None]
    d.scatter_(-1, place, torch.where(inside[:, None], gamma, d.gather(-1, place)))
    return d if head.softcap is None else d.mul_(head.bend(x))


def at_token(tile: Tensor, tokens: Tensor, head: Head, dtype: torch.dtype) -> Tensor:
    """x of the sampled token; ids count from the first column; -inf where that is elsewhere."""
    inside = (tokens >= 0) & (tokens < tile.shape[1])
    x = tile.gather(-1, tokens.clamp(0, tile.shape[1] - 1)[:, None])[:, 0].to(dtype)
    return torch.where(inside, head.within(x), -torch.inf)


def row_chunks(mask: Tensor | None, rows: int, columns: int, elements: int) -> Iterator[slice]:
    """Slices of the rows that the mask keeps, of so many elements at most. Short gaps, cheaper to compute than to go
    around, are part of them."""
    height = max(1, elements // columns)
    if mask is None:
        yield from spans(rows, height)
        return
    kept = mask.nonzero()[:, 0]
    if len(kept):
        breaks = ((kept.diff() - 1) * columns >= 2**15).nonzero()[:, 0] + 1
        for run in kept.tensor_split(breaks.cpu()):
            yield from spans(int(run[-1]) + 1, height, start=int(run[0]))
