"""The torch engine: statistics and gradients of logits, tile by tile, in one pass over them, on any device.

A tile is a few rows by some thousand columns: small enough to stay in a cache while five sums are taken of it, large
enough for the threads of a CPU to share. Its six numbers a row are merged into the state (`state.merge`). Two buffers
of a tile are all the memory it needs. 16-bit logits are accumulated in float32.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from entropy_polarity.kernels.engine import Engine
from entropy_polarity.kernels.state import (
    AT_TOKEN,
    FIELDS,
    MAXIMUM,
    QD,
    RD,
    Head,
    Q,
    R,
    finish,
    merge,
)
from entropy_polarity.polarity import LOWEST

# Elements of a tile: 2 MiB in float32.
TILE_ELEMENTS = 2**19
TILE_COLUMNS = 2**14
# A tile that is also a matrix product wants more rows, and its buffer is the product's: 8 MiB in float32.
PRODUCT_ELEMENTS = 2**21
PRODUCT_ROWS = 512
# Columns side by side in the search for a row's mode: one vector register's worth and more.
LANES = 128


def spans(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def capped(x: Tensor, head: Head, out: Tensor | None = None) -> Tensor:
    """c tanh(logit_scale x / c), for a head that has a cap c."""
    assert head.softcap is not None
    return torch.mul(x, head.logit_scale / head.softcap, out=out).tanh_().mul_(head.softcap)


def _mode(z: Tensor) -> Tensor:
    """The column of one maximum of each row. `argmax` is ten times slower than `amax`: look only where it must be."""
    rows, columns = z.shape
    if columns % LANES:
        return z.argmax(-1, keepdim=True)
    grid = z.unflatten(1, (-1, LANES))
    lane = grid.amax(1).argmax(-1)  # the first lane that holds a maximum: over `columns / LANES` values of each
    block = grid[torch.arange(rows, device=z.device), :, lane].argmax(-1)
    return (block * LANES + lane)[:, None]


def tile_state(logits: Tensor, tokens: Tensor, start: int, head: Head, d: Tensor, e: Tensor) -> Tensor:
    """The state (6, n) of a tile (n, W) whose first column is the vocabulary's `start`.

    `d` and `e` are buffers of its shape; `d` may be the tile itself.
    """
    z = logits if logits.dtype == d.dtype else d.copy_(logits)
    if head.softcap is not None:
        z = capped(z, head, out=d)
    state = torch.empty(FIELDS, len(z), dtype=d.dtype, device=d.device)
    state[MAXIMUM] = z.amax(-1)
    maximum = state[MAXIMUM][:, None]
    mode = _mode(z)
    state[AT_TOKEN] = at_token(z, tokens, start)
    torch.sub(z, torch.where(maximum == -torch.inf, 0.0, maximum), out=d)
    d.mul_(head.bits).clamp_(min=LOWEST)  # NaN stays NaN
    torch.exp2(d, out=e).scatter_(-1, mode, 0.0)
    state[R] = e.sum(-1)
    state[RD] = d.mul_(e).sum(-1)
    state[QD] = d.mul_(e).sum(-1)
    state[Q] = torch.linalg.vector_norm(e, dim=-1).square()  # without writing the squares
    return state


def at_token(tile: Tensor, tokens: Tensor, start: int) -> Tensor:
    """The tile's value at the sampled token, -inf where that is in another tile."""
    local = tokens - start
    inside = (local >= 0) & (local < tile.shape[1])
    return torch.where(inside, tile.gather(-1, local.clamp(0, tile.shape[1] - 1)[:, None])[:, 0], -torch.inf)


@functools.cache
def compiled_tile_state() -> Callable[..., Tensor]:
    """`tile_state` through torch.compile: two loops instead of eleven. Needs a C++ compiler, seconds the first time."""

    def one_pass(logits: Tensor, tokens: Tensor, start: int, head: Head, dtype: torch.dtype) -> Tensor:
        z = logits.to(dtype) if head.softcap is None else capped(logits.to(dtype), head)
        maximum, mode = z.max(-1, keepdim=True)
        d = ((z - torch.where(maximum == -torch.inf, 0.0, maximum)) * head.bits).clamp(min=LOWEST)
        e = torch.exp2(d).masked_fill(torch.arange(z.shape[1], device=z.device) == mode, 0.0)
        ee = e * e
        sums = [e.sum(-1), (e * d).sum(-1), ee.sum(-1), (ee * d).sum(-1)]
        return torch.stack([maximum[:, 0], *sums, at_token(z, tokens, start)])

    compiled = torch.compile(one_pass, dynamic=True)
    return lambda logits, tokens, start, head, d, e: compiled(logits, tokens, start, head, e.dtype)


class Torch(Engine):
    """Plain torch. `tile_function` is `tile_state`, or its compiled form."""

    def __init__(self, tile_function: Callable[..., Tensor] = tile_state) -> None:
        self.name = "chunked" if tile_function is tile_state else "compiled"
        self._tile_state = tile_function

    def product_tile(self, rows: int, columns: int, itemsize: int, tile_bytes: int | None) -> tuple[int, int]:
        elements = PRODUCT_ELEMENTS if tile_bytes is None else max(1, tile_bytes // itemsize)
        height = max(1, min(rows, max(PRODUCT_ROWS, elements // columns), elements))
        return height, max(1, min(columns, elements // height))

    def scratch(self, elements: int, tile: Tensor, state: Tensor, keep: bool) -> tuple[Tensor, ...]:
        count = 2 if keep or tile.dtype != state.dtype else 1
        return torch.empty(count, elements, dtype=state.dtype, device=state.device).unbind()

    def statistics(self, logits, tokens, mask, head, state, columns) -> None:
        buffers = torch.empty(2, min(logits.numel(), TILE_ELEMENTS), dtype=state.dtype, device=state.device)
        for rows in _row_chunks(logits, mask):
            tiles = []
            for piece in _pieces(logits):
                tile = _take(logits, rows, piece)
                d, e = (buffer[: tile.numel()].view(tile.shape) for buffer in buffers)
                tiles.append(self._tile_state(tile, tokens[rows], piece.start, head, d, e))
            merged = merge(torch.stack(tiles), head)
            state[:, rows], columns[:, rows] = merged, finish(merged, head)
        if mask is not None:
            columns[:, ~mask] = 0

    def fold(self, tile, tokens, start, head, state, scratch, columns) -> None:
        e, *rest = (buffer[: tile.numel()].view(tile.shape) for buffer in scratch)
        d = rest[0] if rest else tile
        state.copy_(merge(torch.stack([state, self._tile_state(tile, tokens, start, head, d, e)]), head))
        if columns is not None:
            columns.copy_(finish(state, head))

    def gradient(self, tile, tokens, mask, start, head, maximum, coefficients, out) -> None:
        if mask is not None:
            out[~mask] = 0
        buffer = torch.empty(min(tile.numel(), TILE_ELEMENTS), dtype=maximum.dtype, device=tile.device)
        for rows in _row_chunks(tile, mask):
            for piece in _pieces(tile):
                logits = _take(tile, rows, piece)
                d = buffer[: logits.numel()].view(logits.shape)
                place = piece.start + start
                _tile_gradient(logits, tokens[rows], place, head, maximum[rows], coefficients[:, rows], d)
                out[rows, piece] = d


def _tile_gradient(
    logits: Tensor, tokens: Tensor, start: int, head: Head, maximum: Tensor, coefficients: Tensor, d: Tensor
) -> None:
    alpha, beta, gamma = coefficients[:, :, None]
    z = d.copy_(logits) if head.softcap is None else capped(d.copy_(logits), head)
    bend = None if head.softcap is None else 1 - (z / head.softcap).square_()
    torch.sub(z, maximum[:, None], out=d).mul_(head.bits).clamp_(min=LOWEST)
    if beta.any():  # NaN counts as True
        slope = d.mul(beta).add_(alpha)
        d.exp2_().mul_(slope)
    else:
        d.exp2_().mul_(alpha)
    local = tokens - start
    (inside,) = ((local >= 0) & (local < d.shape[1])).nonzero(as_tuple=True)
    d[inside, local[inside]] = gamma[inside, 0]
    if bend is not None:
        d.mul_(bend)


def _tile_width(logits: Tensor) -> int:
    return min(logits.shape[1], TILE_COLUMNS)


def _pieces(logits: Tensor) -> Iterator[slice]:
    return spans(logits.shape[1], _tile_width(logits))


def _row_chunks(logits: Tensor, mask: Tensor | None) -> Iterator[slice] | Iterator[Tensor]:
    """The rows that the mask keeps, as many at a time as a tile takes: slices, or indices where some are left out."""
    height = max(1, TILE_ELEMENTS // _tile_width(logits))
    return spans(len(logits), height) if mask is None else iter(mask.nonzero()[:, 0].split(height))


def _take(logits: Tensor, rows: slice | Tensor, piece: slice) -> Tensor:
    return logits[rows, piece] if isinstance(rows, slice) else logits[:, piece].index_select(0, rows)
