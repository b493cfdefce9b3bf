"""The CPU engine: NumPy on pieces of a tile that stay in a core's cache, each of them the work of one thread.

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
from entropy_polarity.kernels.engine import Tile, spans
from entropy_polarity.kernels.state import Head, merge_sums
from entropy_polarity.maths import LOWEST

# Elements of a piece of a tile: two buffers of 0.5 MiB in float32; a row of up to PIECE_WIDTH is one piece.
PIECE_ELEMENTS = 2**17
PIECE_WIDTH = 2**18
# Threads meet at Python's lock between any two operations, so that more of them gain little.
WORKERS = 4
# Elements of which BLAS makes one sum: over more its accumulators lose digits, and it would start threads of its own.
DOT = 2**12
# Fewer elements than torch shares between threads.
SERIAL = 2**15 - 1

Array = np.ndarray


class Buffer:
    """Memory for a piece (n, W), in blocks of its rows that BLAS sums, (n, k, DOT), with zeros beyond a row's end."""

    def __init__(self, memory: Array, rows: int, width: int) -> None:
        block = min(width, DOT)
        count = -(-width // block)
        self.blocks = memory[: rows * count * block].reshape(rows, count, block)
        self.blocks.reshape(rows, -1)[:, width:] = 0
        self.array = self.blocks.reshape(rows, -1)[:, :width]


Buffers = Callable[[int, int], tuple[Buffer, Buffer]]


class Cpu(Chunked):
    """`Chunked` with its two loops in NumPy."""

    def _sums(self, tile: Tile, out: Tensor, in_place: bool) -> None:
        z, sums = _array(tile.logits), out.numpy()
        pieces = spans(z.shape[1], PIECE_WIDTH)
        in_place = in_place and tile.logits.dtype == out.dtype

        def work(rows: slice, buffers: Buffers) -> None:
            target = sums[:, rows]
            parts = target[None] if len(pieces) == 1 else np.empty((len(pieces), *target.shape), sums.dtype)
            for part, piece in zip(parts, pieces, strict=True):
                x = z[rows, piece]
                d, e = buffers(*x.shape)
                if in_place and x.flags.c_contiguous and x.shape[1] % DOT == 0:
                    d = Buffer(x.reshape(-1), *x.shape)  # a buffer less to go through
                _piece_sums(_widened(x, d.array), tile.head, d, e, part)
            if len(pieces) > 1:
                target[:] = merge_sums(torch.from_numpy(parts), tile.head).numpy()

        _in_threads(work, row_chunks(tile, PIECE_ELEMENTS), out.dtype)

    def gradient(self, tile: Tile, maximum: Tensor, coefficients: Tensor, out: Tensor) -> None:
        z, ids = _array(tile.logits), (tile.tokens - tile.start).numpy()
        top, rates = maximum.numpy(), coefficients.numpy()
        in_place = out.dtype == maximum.dtype

        def work(rows: slice, buffers: Buffers) -> None:
            for piece in spans(z.shape[1], PIECE_WIDTH):
                x = z[rows, piece]
                d, e = (buffer.array for buffer in buffers(*x.shape))
                d = out[rows, piece].numpy() if in_place else d
                _piece_gradient(_widened(x, d), ids[rows] - piece.start, tile.head, top[rows], rates[:, rows], d, e)
                if not in_place:  # rounded in parts too small for torch to share between threads
                    for part in spans(d.shape[1], max(1, SERIAL // len(d))):
                        out[rows, piece][:, part] = torch.from_numpy(d)[:, part]

        _in_threads(work, row_chunks(tile, PIECE_ELEMENTS), maximum.dtype)
        if tile.mask is not None:
            out[~tile.mask] = 0


def _piece_sums(x: Array, head: Head, d: Buffer, e: Buffer, out: Array) -> None:
    """The state (5, n) of a piece, but for the sampled token, like `chunked.torch_sums`."""
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


def _piece_gradient(
    x: Array, tokens: Array, head: Head, maximum: Array, coefficients: Array, d: Array, e: Array
) -> None:
    """`chunked._gradient` in `d`, which may be x. The ids in `tokens` count from the first token of the piece."""
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
    """x itself, or a copy of it in the buffer where that has another type."""
    if x.dtype == np.uint16:  # the upper half of a float32
        bits = buffer.view(np.uint32)
        np.copyto(bits, x)
        np.left_shift(bits, 16, out=bits)
        return buffer
    if x.dtype == buffer.dtype:
        return x
    np.copyto(buffer, x)
    return buffer


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
    """e^d. Torch's is faster, but one of several threads must not use it: it would share its work."""
    if torch.get_num_threads() == 1:
        torch.exp(torch.from_numpy(d), out=torch.from_numpy(out))
    else:
        np.exp(d, out=out)


def _dot(a: Buffer, b: Buffer | None = None) -> Array:
    """Σ a b along the rows, or Σ a."""
    other = _ones(a.blocks.shape[2], a.blocks.dtype) if b is None else b.blocks
    return np.add.reduce(np.vecdot(a.blocks, other), -1)


@functools.cache
def _ones(width: int, dtype: np.dtype) -> Array:
    return np.ones(width, dtype)


def _in_threads(work: Callable[[slice, Buffers], None], chunks: Iterator[slice], dtype: torch.dtype) -> None:
    """Call `work` for every chunk of rows, with a function that gives two buffers of a shape."""
    left = deque(chunks)

    def worker() -> None:
        @functools.lru_cache(maxsize=2)
        def buffers(rows: int, width: int) -> tuple[Buffer, Buffer]:
            memory = torch.empty(2, rows * (width + DOT), dtype=dtype).numpy()
            return Buffer(memory[0], rows, width), Buffer(memory[1], rows, width)

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
