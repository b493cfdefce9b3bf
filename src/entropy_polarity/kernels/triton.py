# pyright: reportOperatorIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""The Triton engine: the same six numbers a row, and the same gradient, at the speed of the GPU's memory.

One program reads one row of logits, 16 or 32 bit, once. Every lane keeps its own four sums, so that nothing is reduced
inside the loop but the block's maximum; sums are rescaled only when that maximum rises. The mode is in its lane's sums
until the end, when that one lane (1 / BLOCK of the row) is read again without it: no cost for each element, and no tail
is ever added to 1 and rounded away.

The instructions of its inner loop are counted in docs/performance.md.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from entropy_polarity.kernels.engine import Engine
from entropy_polarity.kernels.state import Head

# A row's block and its warps: 16 elements a thread, two loads of 16 bytes each for 16-bit logits.
BLOCK, WARPS = 2048, 4
GRADIENT_BLOCK, GRADIENT_WARPS = 4096, 8
# Lanes read at once when the mode's lane is summed again.
AGAIN = 128

# A tile of logits made from hidden states: 256 MiB, and as many rows as fit one chunk of most training steps.
PRODUCT_BYTES, PRODUCT_ROWS = 2**28, 8192

_LOWEST = tl.constexpr(-1e4)  # as polarity.LOWEST
_LOWEST_FLOAT = tl.constexpr(-3.4028234663852886e38)
_LN2 = tl.constexpr(0.6931471805599453)
_NAN_STAYS = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _tanh(x, cap):
    """tanh y and 1 - tanh² y for y = k x, cap = 2 k log2(e), from u = e^{-2 |y|}, or its series where that cancels."""
    y = x * (cap * (0.5 * _LN2))
    yy = y * y
    series = tl.fma(tl.fma(yy, 2.0 / 15.0, -1.0 / 3.0) * yy, y, y)
    u = tl.exp2(-tl.abs(x * cap))
    q = 1.0 / (1.0 + u)
    far = (1.0 - u) * q
    return tl.where(yy < 0.01, series, tl.where(x < 0.0, -far, far)), 4.0 * u * q * q


@triton.jit
def _folded(x, cap, HAS_CAP: tl.constexpr):
    """`Head.folded`."""
    if HAS_CAP:
        x, _ = _tanh(x, cap)
    return x


@triton.jit
def _within(x, HAS_CAP: tl.constexpr):
    """`Head.within`."""
    if HAS_CAP:
        return tl.maximum(x, _LOWEST_FLOAT, propagate_nan=_NAN_STAYS)
    else:
        return x


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0 to the last digits: what rounding took from 1 + x is put back (log(1 + 1e-8) is 0)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _sums(z, top, bits, r, rd, q, qd):
    """Add the folded elements z, at distances d below the maximum's, to the four sums of their lanes."""
    d = tl.maximum((z - top) * bits, _LOWEST, propagate_nan=_NAN_STAYS)  # subtract first: d of the mode is 0
    e = tl.exp2(d)
    ee = e * e
    return r + e, tl.fma(e, d, rd), q + ee, tl.fma(ee, d, qd)


@triton.jit
def _lower(delta, r, rd, q, qd):
    """The same four sums, measured from a maximum that lies -delta bits higher."""
    c = tl.exp2(delta)
    return c * r, c * tl.fma(delta, r, rd), c * c * q, c * c * tl.fma(delta, q, qd)


@triton.jit
def _take(x, first, maximum, top, mode_block, bits, cap, HAS_CAP: tl.constexpr, r0, rd0, q0, qd0, r, rd, q, qd):
    """Add a block x to its lanes, after lowering all sums where it holds a new maximum, whose folded value is `top`."""
    z = _folded(x, cap, HAS_CAP)
    if HAS_CAP:
        z = tl.where(x == -float("inf"), -float("inf"), z)  # beyond the last column
    highest = tl.max(x, axis=0)
    if highest > maximum:
        rises_to = highest
        if HAS_CAP:
            rises_to = tl.max(tl.where(x == highest, z, -float("inf")), axis=0)
        delta = tl.maximum((top - rises_to) * bits, _LOWEST)
        if mode_block < 0:  # the mode of the columns before these is an ordinary token of the sums now
            r0 += 1.0
            q0 += 1.0
        r0, rd0, q0, qd0 = _lower(delta, r0, rd0, q0, qd0)
        r, rd, q, qd = _lower(delta, r, rd, q, qd)
        maximum = highest
        top = rises_to
        mode_block = first
    shift = tl.where(top == -float("inf"), 0.0, top)
    r, rd, q, qd = _sums(z, shift, bits, r, rd, q, qd)
    return maximum, top, mode_block, r0, rd0, q0, qd0, r, rd, q, qd


@triton.jit
def _load(logits_ptr, columns, inside, HAS_CAP: tl.constexpr):
    """Logits in float32, -inf outside."""
    x = _within(tl.load(logits_ptr + columns, mask=inside, other=-float("inf")).to(tl.float32), HAS_CAP)
    return tl.where(inside, x, -float("inf")) if HAS_CAP else x


@triton.jit
def _fold_kernel(
    logits_ptr, tokens_ptr, mask_ptr, state_ptr, stats_ptr,
    batch_stride, row_stride, rows_a_batch, mask_stride, state_stride, stats_stride,
    start, n_cols, bits, cap,
    IS_FIRST: tl.constexpr, IS_LAST: tl.constexpr, HAS_MASK: tl.constexpr, HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    state_ptr += row
    stats_ptr += row
    if HAS_MASK:
        if tl.load(mask_ptr + row * mask_stride) == 0:
            if IS_LAST:
                for i in tl.static_range(7):  # pyright: ignore
                    tl.store(stats_ptr + i * stats_stride, 0.0)
            return
    logits_ptr += (row // rows_a_batch) * batch_stride + (row % rows_a_batch) * row_stride
    if IS_FIRST:
        maximum = -float("inf")
        top = -float("inf")
        x_a = -float("inf")
        r0 = 0.0
        rd0 = 0.0
        q0 = 0.0
        qd0 = 0.0
    else:
        maximum = tl.load(state_ptr)
        top = _folded(maximum, cap, HAS_CAP)
        r0 = tl.load(state_ptr + state_stride)
        rd0 = tl.load(state_ptr + 2 * state_stride) / _LN2  # distances are in bits here
        q0 = tl.load(state_ptr + 3 * state_stride)
        qd0 = tl.load(state_ptr + 4 * state_stride) / _LN2
        x_a = tl.load(state_ptr + 5 * state_stride)
    mode_block = -1  # where the maximum was found, if in these columns
    lanes = tl.arange(0, BLOCK)
    r = tl.zeros((BLOCK,), tl.float32)
    rd = tl.zeros((BLOCK,), tl.float32)
    q = tl.zeros((BLOCK,), tl.float32)
    qd = tl.zeros((BLOCK,), tl.float32)

    whole = n_cols // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):
        x = _within(tl.load(logits_ptr + first + lanes).to(tl.float32), HAS_CAP)
        maximum, top, mode_block, r0, rd0, q0, qd0, r, rd, q, qd = _take(
            x, first, maximum, top, mode_block, bits, cap, HAS_CAP, r0, rd0, q0, qd0, r, rd, q, qd
        )
    if whole < n_cols:
        x = _load(logits_ptr, whole + lanes, whole + lanes < n_cols, HAS_CAP)
        maximum, top, mode_block, r0, rd0, q0, qd0, r, rd, q, qd = _take(
            x, whole, maximum, top, mode_block, bits, cap, HAS_CAP, r0, rd0, q0, qd0, r, rd, q, qd
        )

    if mode_block >= 0:
        x = _load(logits_ptr, mode_block + lanes, mode_block + lanes < n_cols, HAS_CAP)
        mode_lane = tl.min(tl.where(x == maximum, lanes, BLOCK - 1), axis=0)
        is_lane = lanes == mode_lane
        r = tl.where(is_lane, 0.0, r)
        rd = tl.where(is_lane, 0.0, rd)
        q = tl.where(is_lane, 0.0, q)
        qd = tl.where(is_lane, 0.0, qd)
        again = tl.arange(0, AGAIN)
        r1 = tl.zeros((AGAIN,), tl.float32)
        rd1 = tl.zeros((AGAIN,), tl.float32)
        q1 = tl.zeros((AGAIN,), tl.float32)
        qd1 = tl.zeros((AGAIN,), tl.float32)
        for first in range(0, n_cols, AGAIN * BLOCK):
            columns = first + again * BLOCK + mode_lane
            inside = (columns < n_cols) & (columns != mode_block + mode_lane)
            others = _folded(_load(logits_ptr, columns, inside, HAS_CAP), cap, HAS_CAP)
            others = tl.where(inside, others, -float("inf")) if HAS_CAP else others
            r1, rd1, q1, qd1 = _sums(others, top, bits, r1, rd1, q1, qd1)
        r0 += tl.sum(r1, axis=0)
        rd0 += tl.sum(rd1, axis=0)
        q0 += tl.sum(q1, axis=0)
        qd0 += tl.sum(qd1, axis=0)
    r0 += tl.sum(r, axis=0)
    rd0 += tl.sum(rd, axis=0)
    q0 += tl.sum(q, axis=0)
    qd0 += tl.sum(qd, axis=0)

    rd0 *= _LN2
    qd0 *= _LN2
    token = tl.load(tokens_ptr + row) - start
    if (token >= 0) & (token < n_cols):
        x_a = _within(tl.load(logits_ptr + token).to(tl.float32), HAS_CAP)

    tl.store(state_ptr, maximum)
    tl.store(state_ptr + state_stride, r0)
    tl.store(state_ptr + 2 * state_stride, rd0)
    tl.store(state_ptr + 3 * state_stride, q0)
    tl.store(state_ptr + 4 * state_stride, qd0)
    tl.store(state_ptr + 5 * state_stride, x_a)
    if IS_LAST:
        # polarity.stats_from_sums, number by number
        r0 += top - top
        s = 1.0 + r0
        log_s = _log1p(r0)
        mean = rd0 / s
        d_a = (_folded(x_a, cap, HAS_CAP) - top) * (bits * _LN2)
        if HAS_CAP:
            d_a = tl.where(x_a == maximum, 0.0, d_a)  # whatever the last bit of either tanh
        d = tl.maximum(d_a, _LOWEST, propagate_nan=_NAN_STAYS)
        e = tl.exp(d)
        p = e / s
        ss = s * s
        is_mode = d_a == 0.0
        other_q = tl.where(is_mode, q0, 1.0 + q0 - e * e)
        other_qd = tl.where(is_mode, qd0, qd0 - e * e * d)
        not_p = tl.where(is_mode, r0, s - e) / s
        sum_p2 = (1.0 + q0) / ss
        tl.store(stats_ptr, d_a - log_s)
        tl.store(stats_ptr + stats_stride, log_s - mean)
        tl.store(stats_ptr + 2 * stats_stride, sum_p2)
        tl.store(stats_ptr + 3 * stats_stride, qd0 / ss - log_s * sum_p2)
        tl.store(stats_ptr + 4 * stats_stride, -p * not_p * (d - mean) + (other_qd - mean * other_q) / ss)
        tl.store(stats_ptr + 5 * stats_stride, p * (d - mean))
        tl.store(stats_ptr + 6 * stats_stride, (qd0 - mean * (1.0 + q0)) / ss)


@triton.jit
def _gradient_kernel(
    logits_ptr, out_ptr, tokens_ptr, mask_ptr, maximum_ptr, coefficients_ptr,
    batch_stride, row_stride, rows_a_batch, out_stride, mask_stride, coefficients_stride,
    start, n_cols, blocks, bits, cap,
    HAS_MASK: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    columns = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n_cols
    out_ptr += row * out_stride
    if HAS_MASK:
        if tl.load(mask_ptr + row * mask_stride) == 0:
            tl.store(out_ptr + columns, tl.zeros((BLOCK,), tl.float32).to(out_ptr.dtype.element_ty), mask=inside)
            return
    logits_ptr += (row // rows_a_batch) * batch_stride + (row % rows_a_batch) * row_stride
    maximum = tl.load(maximum_ptr + row)
    alpha = tl.load(coefficients_ptr + row)
    beta = tl.load(coefficients_ptr + row + coefficients_stride) * _LN2
    gamma = tl.load(coefficients_ptr + row + 2 * coefficients_stride)
    token = tl.load(tokens_ptr + row) - start
    x = _load(logits_ptr, columns, inside, HAS_CAP)
    if HAS_CAP:
        z, bend = _tanh(x, cap)
        d = tl.where(x == maximum, 0.0, (z - _folded(maximum, cap, HAS_CAP)) * bits)
    else:
        d = (x - maximum) * bits
    d = tl.maximum(d, _LOWEST, propagate_nan=_NAN_STAYS)
    gradient = tl.exp2(d) * tl.fma(beta, d, alpha)
    gradient = tl.where(columns == token, gamma, gradient)
    if HAS_CAP:
        gradient *= bend  # pyright: ignore[reportPossiblyUnboundVariable]
    tl.store(out_ptr + columns, gradient.to(out_ptr.dtype.element_ty), mask=inside)


def _cap(head: Head) -> dict[str, float | bool]:
    """The kernels' arguments for a head: what turns distances into bits, and its soft cap."""
    cap = 0.0 if head.softcap is None else 2 * head.logit_scale / (head.softcap * math.log(2))
    return {"bits": head.scale / math.log(2), "cap": cap, "HAS_CAP": head.softcap is not None}


def _layout(logits: Tensor) -> tuple[Tensor, dict[str, int]]:
    """Logits (N, V) or (B, T, V) with any strides but along V, as the kernels read them."""
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    batch_stride = logits.stride(0) if logits.dim() == 3 else 0
    rows = logits.shape[-2]
    return logits, {"batch_stride": batch_stride, "row_stride": logits.stride(-2), "rows_a_batch": max(1, rows)}


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _mask(mask: Tensor | None, otherwise: Tensor) -> dict[str, Any]:
    if mask is None:
        return {"mask_ptr": otherwise, "mask_stride": 0, "HAS_MASK": False}
    return {"mask_ptr": mask.to(torch.int8), "mask_stride": 1, "HAS_MASK": True}


class Triton(Engine):
    """Kernels of this file on CUDA tensors, or on CPU tensors under TRITON_INTERPRET=1."""

    name = "triton"
    strided_batches = True

    def product_tile(self, rows: int, columns: int, itemsize: int, tile_bytes: int | None) -> tuple[int, int]:
        elements = max(1, (PRODUCT_BYTES if tile_bytes is None else tile_bytes) // itemsize)
        height = max(1, min(rows, PRODUCT_ROWS, elements // min(columns, BLOCK)))
        width = max(1, min(columns, elements // height))
        return height, width if width == columns else width // BLOCK * BLOCK or width

    def statistics(self, logits, tokens, mask, head, state, columns) -> None:
        logits, layout = _layout(logits)
        self._fold(logits, layout, tokens, mask, 0, head, state, columns)

    def fold(self, tile, tokens, start, head, state, columns, keep) -> None:
        self._fold(*_layout(tile), tokens, None, start, head, state, columns)

    @staticmethod
    def _fold(logits, layout, tokens, mask, start, head, state, columns) -> None:
        if state.shape[1] == 0:
            return
        stats = state if columns is None else columns
        with _on(state):
            _fold_kernel[(state.shape[1],)](
                logits_ptr=logits, tokens_ptr=tokens, state_ptr=state, stats_ptr=stats,
                state_stride=state.stride(0), stats_stride=stats.stride(0), start=start, n_cols=logits.shape[-1],
                IS_FIRST=start == 0, IS_LAST=columns is not None, BLOCK=BLOCK, AGAIN=AGAIN, num_warps=WARPS,
                **layout, **_mask(mask, tokens), **_cap(head),
            )  # fmt: skip

    def gradient(self, tile, tokens, mask, start, head, maximum, coefficients, out) -> None:
        rows, width = maximum.shape[0], tile.shape[-1]
        if rows == 0:
            return
        tile, layout = _layout(tile)
        blocks = triton.cdiv(width, GRADIENT_BLOCK)
        with _on(maximum):
            _gradient_kernel[(rows * blocks,)](
                logits_ptr=tile, out_ptr=out, tokens_ptr=tokens, maximum_ptr=maximum, coefficients_ptr=coefficients,
                out_stride=out.stride(0), coefficients_stride=coefficients.stride(0), start=start, n_cols=width,
                blocks=blocks, BLOCK=GRADIENT_BLOCK, num_warps=GRADIENT_WARPS,
                **layout, **_mask(mask, tokens), **_cap(head),
            )  # fmt: skip
