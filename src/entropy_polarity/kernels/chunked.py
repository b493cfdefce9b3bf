"""The engine for every device: statistics and gradients of logits, tile by tile, in one pass over them.

A tile is a few rows by all columns of the vocabulary: small enough to stay in a core's cache while five numbers a row
are taken of it. Two buffers of a tile are all the memory it needs. 16-bit logits are accumulated in float32.

On a CPU every tile is the work of one thread, and NumPy does it: torch would share each small operation between the
threads, which then wait at its end for whichever of them has lost its core to another process. Everywhere else torch
does it, a tile after the other, or a compiled form of the same lines.
"""

import functools
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from entropy_polarity.kernels.engine import Engine
from entropy_polarity.kernels.state import AT_TOKEN, MAXIMUM, Head, finish, merge, merge_sums
from entropy_polarity.polarity import LOWEST

# Elements of a tile: two buffers of 0.5 MiB in float32; a row of up to twice as many is one tile.
TILE_ELEMENTS = 2**17
# On other devices: enough to fill them.
DEVICE_TILE_ELEMENTS = 2**23
TILE_COLUMNS = 2**18
WORKERS = 8
# A tile that is also a matrix product wants more rows, and its buffer is the product's: 8 MiB in float32.
PRODUCT_ELEMENTS = 2**21
PRODUCT_ROWS = 256
# Rows whose statistics are made from their sums at once.
FINISH_ROWS = 2**12
# Keeps buffers from lying a power of two apart, where they would share the same places of a cache.
APART = 1040
# Columns of which BLAS makes one sum: its few accumulators lose digits over more.
DOT = 2**12
# Fewer elements than torch shares between threads.
SERIAL = 2**15 - 1


class Buffer:
    """Room for a tile, as torch sees it, as NumPy does, and in blocks of DOT columns, (n, k, DOT) and (n, 1, rest)."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @functools.cached_property
    def array(self) -> np.ndarray:
        return self.tensor.numpy()

    @functools.cached_property
    def blocks(self) -> list[np.ndarray]:
        whole = self.tensor.shape[1] // DOT * DOT
        views = [self.tensor[:, :whole].unflatten(1, (-1, DOT))] if whole else []
        return [view.numpy() for view in (*views, self.tensor[:, None, whole:]) if view.shape[2]]


class Tile(NamedTuple):
    """Logits (n, W), the sampled ids counted from its first column, and two buffers (n, W); `d` may be the logits."""

    logits: Tensor
    tokens: Tensor
    d: Buffer
    e: Buffer


# ---- sums of a tile: its state (5, n), without the sampled token ---------------------------------------------------


def numpy_sums(tile: Tile, head: Head, out: Tensor) -> None:
    """r, rd, q, qd as dot products of the exponentials e, their squares, the distances d and ones."""
    d, e, sums = tile.d.array, tile.e.array, out.numpy()
    z = _numpy_logits(tile.logits, head, d)
    rows, mode = np.arange(len(z)), z.argmax(-1)  # of a row with NaN, a NaN
    sums[0] = z[rows, mode]
    _distances(z, sums[0], head, d)
    _serially(torch.exp, tile.d.tensor, tile.e.tensor)  # twice as fast as NumPy's
    e[rows, mode] = 0
    sums[1], sums[2] = _dot(tile.e), _dot(tile.e, tile.d)
    if np.isnan(sums[2]).any():  # 0 · (-inf), if nothing worse: a masked vocabulary
        np.maximum(d, LOWEST, out=d)
        sums[2] = _dot(tile.e, tile.d)
    np.multiply(e, e, out=e)
    sums[3], sums[4] = _dot(tile.e), _dot(tile.e, tile.d)


def torch_sums(tile: Tile, head: Head, out: Tensor) -> None:
    """The same in torch."""
    d, e = tile.d.tensor, tile.e.tensor
    z = _torch_logits(tile.logits, head, d)
    maximum, mode = z.max(-1, keepdim=True)
    out[MAXIMUM] = maximum[:, 0]
    torch.sub(z, maximum.clamp(min=torch.finfo(d.dtype).min), out=d)  # a tile of all -inf: e = 0, not NaN
    d.mul_(head.scale).clamp_(min=LOWEST)
    torch.exp(d, out=e).scatter_(-1, mode, 0.0)
    out[1] = e.sum(-1)
    out[2] = d.mul_(e).sum(-1)
    out[4] = d.mul_(e).sum(-1)
    out[3] = e.square_().sum(-1)


@functools.cache
def compiled_sums() -> Callable[[Tile, Head, Tensor], None]:
    """The same through torch.compile: two loops instead of ten. Needs a C++ compiler, and seconds the first time."""

    def one_pass(logits: Tensor, head: Head, dtype: torch.dtype) -> Tensor:
        z = logits.to(dtype) if head.softcap is None else capped(logits.to(dtype), head)
        maximum = z.amax(-1, keepdim=True)
        is_mode = z == maximum
        d = ((z - maximum.clamp(min=torch.finfo(dtype).min)) * head.scale).clamp(min=LOWEST)
        e = d.exp().masked_fill(is_mode, 0.0)
        ee = e * e
        others = is_mode.to(dtype).sum(-1) - 1  # modes beside the one that is left out: cheaper than to find its column
        return torch.stack([maximum[:, 0], e.sum(-1) + others, (e * d).sum(-1), ee.sum(-1) + others, (ee * d).sum(-1)])

    compiled = torch.compile(one_pass, dynamic=True)

    def sums(tile: Tile, head: Head, out: Tensor) -> None:
        out.copy_(compiled(tile.logits, head, out.dtype))

    return sums


# ---- the gradient along a tile, in `d` (state.gradient_coefficients) -----------------------------------------------


def numpy_gradient(tile: Tile, head: Head, maximum: Tensor, coefficients: Tensor) -> None:
    d, e, tokens = tile.d.array, tile.e.array, tile.tokens.numpy()
    alpha, beta, gamma = coefficients.numpy()[:, :, None]
    z = _numpy_logits(tile.logits, head, d)
    bend = None if head.softcap is None else 1 - np.square(z / head.softcap)
    _distances(z, maximum.numpy(), head, d)
    if beta.any():  # NaN counts
        np.maximum(d, LOWEST, out=d)
        _serially(torch.exp, tile.d.tensor, tile.e.tensor)
        np.multiply(d, beta, out=d)
        d += alpha
        d *= e
    else:
        _serially(torch.exp, tile.d.tensor, tile.d.tensor)
        d *= alpha
    inside = np.flatnonzero((tokens >= 0) & (tokens < d.shape[1]))
    d[inside, tokens[inside]] = gamma[inside, 0]
    if bend is not None:
        d *= bend


def torch_gradient(tile: Tile, head: Head, maximum: Tensor, coefficients: Tensor) -> None:
    d, e = tile.d.tensor, tile.e.tensor
    alpha, beta, gamma = coefficients[:, :, None]
    z = _torch_logits(tile.logits, head, d)
    bend = None if head.softcap is None else 1 - (z / head.softcap).square_()
    torch.sub(z, maximum[:, None], out=d).mul_(head.scale).clamp_(min=LOWEST)
    torch.exp(d, out=e)
    d.mul_(beta).add_(alpha).mul_(e)
    inside = (tile.tokens >= 0) & (tile.tokens < d.shape[1])
    place = tile.tokens.clamp(0, d.shape[1] - 1)[:, None]
    d.scatter_(-1, place, torch.where(inside[:, None], gamma, d.gather(-1, place)))
    if bend is not None:
        d.mul_(bend)


# ---- pieces of both ------------------------------------------------------------------------------------------------


def capped(x: Tensor, head: Head, out: Tensor | None = None) -> Tensor:
    """c tanh(logit_scale x / c), for a head that has a cap c."""
    assert head.softcap is not None
    return torch.mul(x, head.logit_scale / head.softcap, out=out).tanh_().mul_(head.softcap)


def _torch_logits(logits: Tensor, head: Head, buffer: Tensor) -> Tensor:
    z = logits if logits.dtype == buffer.dtype else buffer.copy_(logits)
    return z if head.softcap is None else capped(z, head, out=buffer)


def _numpy_logits(logits: Tensor, head: Head, buffer: np.ndarray) -> np.ndarray:
    if logits.dtype == torch.bfloat16:  # unknown to NumPy: the upper half of a float32
        np.copyto(buffer.view(np.uint32), logits.view(torch.uint16).numpy())
        np.left_shift(buffer.view(np.uint32), 16, out=buffer.view(np.uint32))
        z = buffer
    else:
        z = logits.numpy()
        if z.dtype != buffer.dtype:
            np.copyto(buffer, z)
            z = buffer
    if head.softcap is None:
        return z
    np.multiply(z, head.logit_scale / head.softcap, out=buffer)
    np.tanh(buffer, out=buffer)
    np.multiply(buffer, head.softcap, out=buffer)
    return buffer


def _distances(z: np.ndarray, maximum: np.ndarray, head: Head, out: np.ndarray) -> None:
    finite = np.maximum(maximum, np.finfo(out.dtype).min)  # a tile of all -inf: e = 0, not NaN
    np.subtract(z, finite[:, None], out=out)
    if head.scale != 1:
        np.multiply(out, head.scale, out=out)


def _dot(a: Buffer, b: Buffer | None = None) -> np.ndarray:
    """Σ a b along the rows, or Σ a, from BLAS's sums over DOT columns."""
    others = [_ones(x.shape[2], x.dtype) for x in a.blocks] if b is None else b.blocks
    return sum(np.vecdot(x, y).sum(-1) for x, y in zip(a.blocks, others, strict=True))  # type: ignore[return-value]


@functools.cache
def _ones(columns: int, dtype: np.dtype) -> np.ndarray:
    return np.ones(columns, dtype)


def at_token(logits: Tensor, tokens: Tensor, head: Head, dtype: torch.dtype) -> Tensor:
    """The folded value of the sampled token; `tokens` count from the first column; -inf where that is elsewhere."""
    inside = (tokens >= 0) & (tokens < logits.shape[1])
    z = logits.gather(-1, tokens.clamp(0, logits.shape[1] - 1)[:, None])[:, 0].to(dtype)
    return torch.where(inside, z if head.softcap is None else capped(z, head), -torch.inf)


def spans(length: int, step: int, start: int = 0) -> list[slice]:
    return [slice(i, min(i + step, length)) for i in range(start, length, step)]


def _serially(function: Callable[..., Any], source: Tensor, out: Tensor) -> None:
    """`function(source, out=out)` in pieces too small for torch to share between threads: this is one of several."""
    step = out.shape[1] if torch.get_num_threads() == 1 else max(1, SERIAL // len(out))
    for columns in spans(out.shape[1], step):
        function(source[:, columns], out=out[:, columns])


def _copy(source: Tensor, out: Tensor) -> None:
    out.copy_(source)


def _runs(mask: Tensor | None, rows: int, columns: int) -> Iterator[slice]:
    """Stretches of rows that the mask keeps; short gaps, cheaper to compute than to go around, are part of them."""
    if mask is None:
        yield slice(0, rows)
        return
    kept = mask.nonzero()[:, 0]
    if len(kept):
        breaks = ((kept.diff() - 1) * columns >= 2**15).nonzero()[:, 0] + 1
        for run in kept.tensor_split(breaks.cpu()):
            yield slice(int(run[0]), int(run[-1]) + 1)


# ---- the engine ----------------------------------------------------------------------------------------------------


class Chunked(Engine):
    """Tiles in threads of their own on a CPU, one after the other elsewhere and when compiled."""

    def __init__(self, compiled: bool = False) -> None:
        self.name = "compiled" if compiled else "chunked"

    def product_tile(self, rows: int, columns: int, itemsize: int, tile_bytes: int | None) -> tuple[int, int]:
        elements = PRODUCT_ELEMENTS if tile_bytes is None else max(1, tile_bytes // itemsize)
        height = max(1, min(rows, max(PRODUCT_ROWS, elements // columns), elements))
        return height, max(1, min(columns, elements // height))

    def statistics(self, logits, tokens, mask, head, state, columns) -> None:
        self._all_sums(logits, tokens, mask, head, state[:AT_TOKEN], in_place=False)
        for rows in spans(len(tokens), FINISH_ROWS):
            state[AT_TOKEN, rows] = at_token(logits[rows], tokens[rows], head, state.dtype)
            columns[:, rows] = finish(state[:, rows], head)
        if mask is not None:
            columns[:, ~mask] = 0

    def fold(self, tile, tokens, start, head, state, columns, keep) -> None:
        parts = torch.stack([state, state])
        parts[1, AT_TOKEN] = at_token(tile, tokens - start, head, state.dtype)
        self._all_sums(tile, tokens - start, None, head, parts[1, :AT_TOKEN], in_place=not keep)
        state.copy_(merge(parts, head))
        if columns is not None:
            columns.copy_(finish(state, head))

    def _all_sums(self, logits, tokens, mask, head, sums, in_place: bool) -> None:
        function = compiled_sums() if self.name == "compiled" else torch_sums
        function = numpy_sums if self._threaded(logits) else function
        pieces = spans(logits.shape[1], TILE_COLUMNS)

        def work(rows: slice, tile: Callable[[slice, slice], Tile]) -> None:
            parts = [torch.empty_like(sums[:, rows]) for _ in pieces]
            for part, piece in zip(parts, pieces, strict=True):
                function(tile(rows, piece), head, part)
            sums[:, rows] = parts[0] if len(parts) == 1 else merge_sums(torch.stack(parts), head)

        self._for_each_tile(work, logits, tokens, mask, sums.dtype, logits if in_place else None)

    def gradient(self, tile, tokens, mask, start, head, maximum, coefficients, out) -> None:
        function = numpy_gradient if self._threaded(tile) else torch_gradient

        def work(rows: slice, piece_of: Callable[[slice, slice], Tile]) -> None:
            for piece in spans(tile.shape[1], TILE_COLUMNS):
                one = piece_of(rows, piece)
                function(one, head, maximum[rows], coefficients[:, rows])
                if out.dtype != maximum.dtype:
                    _serially(_copy, one.d.tensor, out[rows, piece])

        self._for_each_tile(work, tile, tokens - start, mask, maximum.dtype, out)
        if mask is not None:
            out[~mask] = 0

    def _threaded(self, logits: Tensor) -> bool:
        return logits.device.type == "cpu" and self.name == "chunked"

    def _for_each_tile(
        self,
        work: Callable[[slice, Callable[[slice, slice], Tile]], None],
        logits: Tensor,
        tokens: Tensor,
        mask: Tensor | None,
        dtype: torch.dtype,
        place: Tensor | None,
    ) -> None:
        """Call `work` for rows after rows, with a function that makes their tiles.

        `place`, if of `dtype`, is where d of a tile is made.
        """
        logits = logits.detach()
        width = min(logits.shape[1], TILE_COLUMNS)
        threaded = self._threaded(logits)
        height = max(1, (TILE_ELEMENTS if logits.device.type == "cpu" else DEVICE_TILE_ELEMENTS) // width)
        runs = _runs(mask, len(logits), logits.shape[1])
        left = deque(rows for run in runs for rows in spans(run.stop, height, run.start))
        in_place = place is not None and place.dtype == dtype
        elements = max((rows.stop - rows.start for rows in left), default=0) * width

        def worker() -> None:
            room = torch.empty(1 if in_place else 2, elements + APART, dtype=dtype, device=logits.device)

            @functools.cache
            def buffer(i: int, shape: torch.Size) -> Buffer:
                return Buffer(room[i, : shape.numel()].view(shape))

            def tile(rows: slice, piece: slice) -> Tile:
                z = logits[rows, piece]
                d = Buffer(place[rows, piece]) if place is not None and in_place else buffer(1, z.shape)
                return Tile(z, tokens[rows] - piece.start, d, buffer(0, z.shape))

            with np.errstate(all="ignore"):  # infinities and NaN go through
                while left:
                    try:
                        rows = left.popleft()
                    except IndexError:  # another worker took the last
                        return
                    work(rows, tile)

        workers = min(torch.get_num_threads(), WORKERS, len(left)) if threaded else 1
        if workers <= 1:
            return worker()
        for done in [_pool().submit(worker) for _ in range(workers)]:
            done.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(WORKERS, thread_name_prefix="entropy_polarity")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of its parent's threads
