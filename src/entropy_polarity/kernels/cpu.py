"""The CPU engine: NumPy on tiles that stay in a core's cache, each of them the work of one thread.

Torch would share every small operation between the threads, which then wait at its end for the one that lost its core
to another process. The sums are BLAS's dot products of the exponentials e, their squares, the distances d and ones.
"""

import functools
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from entropy_polarity.kernels.chunked import Chunked, row_chunks
from entropy_polarity.kernels.dispatch import spans
from entropy_polarity.kernels.state import Head, merge_sums
from entropy_polarity.maths import LOWEST

# Elements of a tile: two buffers of 0.5 MiB in float32; a row of up to TILE_COLUMNS is one tile.
TILE_ELEMENTS = 2**17
TILE_COLUMNS = 2**18
# Threads: between any two operations they meet at Python's lock, so that more of them gain little.
WORKERS = 4
# Columns of which BLAS makes one sum: over more its accumulators lose digits, and it would start threads of its own.
DOT = 2**12
# Fewer elements than torch shares between threads.
SERIAL = 2**15 - 1

Array = np.ndarray


class Buffer:
    """Room for a tile (n, W), in blocks of columns that BLAS sums, (n, k, DOT), zero beyond the last column."""

    def __init__(self, room: Array, rows: int, columns: int) -> None:
        width = min(columns, DOT)
        count = -(-columns // width)
        self.blocks = room[: rows * count * width].reshape(rows, count, width)
        self.blocks.reshape(rows, -1)[:, columns:] = 0
        self.array = self.blocks.reshape(rows, -1)[:, :columns]


class Cpu(Chunked):
    """`Chunked` with its two loops in NumPy."""

    def _sums(self, logits, mask, head, out, in_place) -> None:
        z, sums = _array(logits), out.numpy()
        pieces = spans(logits.shape[1], TILE_COLUMNS)
        in_place = in_place and logits.dtype == out.dtype

        def work(rows: slice, buffers: Callable[[int, int], tuple[Buffer, Buffer]]) -> None:
            parts = (
                sums[None, :, rows] if len(pieces) == 1 else np.empty((len(pieces), *sums[:, rows].shape), sums.dtype)
            )
            for part, piece in zip(parts, pieces, strict=True):
                tile = z[rows, piece]
                d, e = buffers(*tile.shape)
                if in_place and tile.flags.c_contiguous and tile.shape[1] % DOT == 0:
                    d = Buffer(tile.reshape(-1), *tile.shape)  # a buffer less to go through
                _tile_sums(_widened(tile, d.array), head, d, e, part)
            if len(pieces) > 1:
                sums[:, rows] = merge_sums(torch.from_numpy(parts), head).numpy()

        _in_threads(work, row_chunks(mask, len(z), z.shape[1], TILE_ELEMENTS), out.dtype)

    def gradient(self, tile, tokens, mask, start, head, maximum, coefficients, out) -> None:
        z, ids, top, rates = _array(tile), (tokens - start).numpy(), maximum.numpy(), coefficients.numpy()
        in_place = out.dtype == maximum.dtype

        def work(rows: slice, buffers: Callable[[int, int], tuple[Buffer, Buffer]]) -> None:
            for piece in spans(z.shape[1], TILE_COLUMNS):
                logits = z[rows, piece]
                d, e = (buffer.array for buffer in buffers(*logits.shape))
                d = out[rows, piece].numpy() if in_place else d
                _tile_gradient(_widened(logits, d), ids[rows] - piece.start, head, top[rows], rates[:, rows], d, e)
                if not in_place:
                    _copy_serially(torch.from_numpy(d), out[rows, piece])

        _in_threads(work, row_chunks(mask, len(z), z.shape[1], TILE_ELEMENTS), maximum.dtype)
        if mask is not None:
            out[~mask] = 0


def _tile_sums(x: Array, head: Head, d: Buffer, e: Buffer, out: Array) -> None:
    """The state (5, n) of a tile, but for the sampled token, like `chunked.torch_sums`."""
    rows, mode = np.arange(len(x)), x.argmax(-1)  # of a row with NaN, a NaN
    out[0] = x[rows, mode]
    if head.softcap is not None:  # as Head.within
        np.maximum(out[0], np.finfo(out.dtype).min, out=out[0])
    _distances(x, out[0], head, d.array)
    _exp(d.array, e.array)
    e.array[rows, mode] = 0
    out[1], out[2] = _dot(e), _dot(e, d)
    if np.isnan(out[2]).any():  # 0 · (-inf), if nothing worse: a masked vocabulary
        np.maximum(d.array, LOWEST, out=d.array)
        out[2] = _dot(e, d)
    np.multiply(e.array, e.array, out=e.array)
    out[3], out[4] = _dot(e), _dot(e, d)


def _tile_gradient(
    x: Array, tokens: Array, head: Head, maximum: Array, coefficients: Array, d: Array, e: Array
) -> None:
    """`chunked._gradient` in `d`, which may be the tile."""
    alpha, beta, gamma = coefficients[:, :, None]
    bend = None if head.softcap is None else _bend(x, head, e)
    _distances(x, maximum, head, d)
    if beta.any():  # NaN counts
        np.maximum(d, LOWEST, out=d)
        _exp(d, e)
        np.multiply(d, beta, out=d)
        d += alpha
        d *= e
    else:
        _exp(d, d)
        d *= alpha
    inside = np.flatnonzero((tokens >= 0) & (tokens < d.shape[1]))
    d[inside, tokens[inside]] = gamma[inside, 0]
    if bend is not None:
        d *= bend


def _array(logits: Tensor) -> Array:
    """NumPy's view of logits; of bfloat16, which it lacks, the bits."""
    logits = logits.detach()
    return logits.view(torch.uint16).numpy() if logits.dtype == torch.bfloat16 else logits.numpy()


def _widened(x: Array, buffer: Array) -> Array:
    """x itself, or in the buffer if that has another type."""
    if x.dtype == np.uint16:  # the upper half of a float32
        bits = buffer.view(np.uint32)
        np.copyto(bits, x)
        np.left_shift(bits, 16, out=bits)
        return buffer
    if x.dtype != buffer.dtype:
        np.copyto(buffer, x)
        return buffer
    return x


def _folded(x: Array, head: Head, out: Array | None = None) -> Array:
    """`Head.folded` under a cap. NumPy's tanh depends on its argument alone, so that equal logits stay equal."""
    assert head.softcap is not None
    out = np.multiply(x, head.logit_scale / head.softcap, out=out)
    return np.tanh(out, out=out)


def _distances(x: Array, maximum: Array, head: Head, out: Array) -> None:
    """`Head.below` in `out`, which may be x."""
    if head.softcap is None:
        finite = np.maximum(maximum, np.finfo(out.dtype).min)  # a tile of all -inf: e = 0, not NaN
        np.subtract(x, finite[:, None], out=out)
    else:
        np.subtract(_folded(x, head, out), _folded(maximum, head)[:, None], out=out)
    if head.scale != 1:
        np.multiply(out, head.scale, out=out)


def _bend(x: Array, head: Head, scratch: Array) -> Array:
    """`Head.bend`, by way of a buffer."""
    assert head.softcap is not None
    u = np.abs(x)
    np.multiply(u, -2 * head.logit_scale / head.softcap, out=u)
    _exp(u, u)
    np.add(u, 1, out=scratch)
    np.multiply(scratch, scratch, out=scratch)
    np.multiply(u, 4, out=u)
    return np.divide(u, scratch, out=u)


def _exp(d: Array, out: Array) -> None:
    """Torch's is faster, but one of several threads must not use it: it would share its work."""
    if torch.get_num_threads() == 1:
        torch.exp(torch.from_numpy(d), out=torch.from_numpy(out))
    else:
        np.exp(d, out=out)


def _dot(a: Buffer, b: Buffer | None = None) -> Array:
    """Σ a b along the rows, or Σ a."""
    other = _ones(a.blocks.shape[2], a.blocks.dtype) if b is None else b.blocks
    return np.add.reduce(np.vecdot(a.blocks, other), -1)


@functools.cache
def _ones(columns: int, dtype: np.dtype) -> Array:
    return np.ones(columns, dtype)


def _copy_serially(source: Tensor, out: Tensor) -> None:
    """Copy and round in pieces too small for torch to share between threads."""
    for columns in spans(out.shape[1], max(1, SERIAL // len(out))):
        out[:, columns] = source[:, columns]


def _in_threads(
    work: Callable[[slice, Callable[[int, int], tuple[Buffer, Buffer]]], None],
    chunks: Iterator[slice],
    dtype: torch.dtype,
) -> None:
    """Call `work` for every chunk of rows, with a function that gives two buffers of a shape."""
    left = deque(chunks)

    def worker() -> None:
        @functools.lru_cache(maxsize=2)
        def buffers(rows: int, columns: int) -> tuple[Buffer, Buffer]:
            room = torch.empty(2, rows * (columns + DOT), dtype=dtype).numpy()
            return Buffer(room[0], rows, columns), Buffer(room[1], rows, columns)

        with np.errstate(all="ignore"):  # infinities and NaN go through
            while left:
                try:
                    rows = left.popleft()
                except IndexError:  # another worker took the last
                    return
                work(rows, buffers)

    workers = min(torch.get_num_threads(), WORKERS, len(left))
    if workers <= 1:
        return worker()
    for done in [_pool().submit(worker) for _ in range(workers)]:
        done.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(WORKERS, thread_name_prefix="entropy_polarity")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of its parent's threads
