# pyright: reportOperatorIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false
"""The Triton engine: the same six numbers per row, and the same gradient, at the speed of the GPU's memory.

One program reads one row of logits, 16 or 32 bit, once. Every lane keeps its own four sums of the logits below the
maximum, so that nothing is reduced inside the loop but the block's maximum. Blocks that reach that maximum are few: in
them the sums are rescaled, and logits equal to it are counted instead of summed. So the mode is never in the sums, no
tail is added to 1 and rounded away, and a logit that is summed is not too near the maximum for `_line`. The
instructions of the inner loop are counted in docs/performance.md.
"""

import functools
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from entropy_polarity.kernels.engine import Engine, Tile
from entropy_polarity.kernels.state import Head

# A row's block and its warps: four loads of 8 elements a thread, which share one search for the maximum. Registers for
# five such programs on a multiprocessor; the compiler would take more than it needs.
BLOCK, WARPS, REGISTERS = 4096, 4, 96
# A soft cap's tanh and its derivative want more registers: twice the threads for a gradient.
GRADIENT_BLOCK, GRADIENT_WARPS, CAPPED_GRADIENT_WARPS = 4096, 4, 8

# A tile of logits made from hidden states: 256 MiB, and as many rows as fit one chunk of most training steps.
PRODUCT_BYTES, PRODUCT_ROWS = 2**28, 8192

_LOWEST = tl.constexpr(-1e4)  # as maths.LOWEST
_LOWEST_FLOAT = tl.constexpr(-3.4028234663852886e38)
_LN2 = tl.constexpr(0.6931471805599453)
_NAN_STAYS = tl.constexpr(tl.PropagateNan.ALL)
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))  # which has no machine to run assembly on


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
    """`Head.folded`, but -inf stays: it is no logit (`_within`)."""
    if HAS_CAP:
        folded, _ = _tanh(x, cap)
        return tl.where(x == -float("inf"), x, folded)
    else:
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
def _wide(z):
    """z in float32; bfloat16 is the upper half of it."""
    if z.dtype == tl.bfloat16:
        return (z.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return z.to(tl.float32)


@triton.jit
def _larger(a, b):
    """The larger numbers of two blocks, 16-bit ones two at a time; NaN loses."""
    if _INTERPRETED or a.dtype == tl.float32:
        return tl.maximum(_wide(a), _wide(b))
    elif a.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise("max.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.bfloat16, is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise("max.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.float16, is_pure=True, pack=2)


@triton.jit
def _raised(z, low):
    """z in float32, no lower than `low`; NaN stays. Two bfloat16 are raised at a time, then shifted or masked."""
    if _INTERPRETED or z.dtype != tl.bfloat16:
        return tl.maximum(_wide(z), low, propagate_nan=_NAN_STAYS)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 pair; max.NaN.bf16x2 pair, $2, $3; shl.b32 $0, pair, 16; and.b32 $1, pair, 0xffff0000; }",
            "=f,=f,r,r", [z, low.to(tl.bfloat16)], tl.float32, is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def _load(logits_ptr, columns, n_cols, IS_TAIL: tl.constexpr, HAS_CAP: tl.constexpr, FUSED: tl.constexpr):
    """Logits, -inf beyond the end of the row: as they are where distances are FUSED, else in float32."""
    if IS_TAIL:
        x = tl.load(logits_ptr + columns, mask=columns < n_cols, other=-float("inf"))
    else:
        x = tl.load(logits_ptr + columns)
    if not FUSED:
        x = _within(_wide(x), HAS_CAP)
        if IS_TAIL and HAS_CAP:
            x = tl.where(columns < n_cols, x, -float("inf"))
    return x


@triton.jit
def _product(maximum, bits):
    """maximum · bits, rounded here and now: a plain product might become half of another operation, unrounded."""
    return tl.fma(maximum, bits, 0.0)


@triton.jit
def _line(maximum, bits, far, FUSED: tl.constexpr):
    """a and b of the distance in bits below the maximum: a z + b in one operation if FUSED, else (z - b) a.

    With C = maximum · bits rounded, bits · z - C is rounded once but lies δ = maximum · bits - C too high, and
    |δ| <= 2^-24 |C|. It is good for 16-bit z other than the maximum, which are 2^-12 |C| or more away (so δ, which
    `_fold_kernel` takes off the sums, is small against every distance), not for equal ones, whose distance is δ, not 0.
    At |C| >= 2^24 all others are 2^12 bits away and more: e^d is 0. Then no product may overflow: b alone makes it 0.
    """
    if FUSED:
        is_near = tl.abs(maximum) < far
        return tl.where(is_near, bits, 0.0), tl.where(is_near, -_product(maximum, bits), -1000.0)
    else:
        return bits, tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit
def _sums(z, a, b, r, rd, q, qd, FUSED: tl.constexpr):
    """Add the elements z, at distances d below the maximum, to the four sums of their lanes."""
    if FUSED:
        d = tl.fma(z, a, b)
    else:
        d = tl.maximum((z - b) * a, _LOWEST, propagate_nan=_NAN_STAYS)
    e = tl.exp2(d)
    return r + e, tl.fma(e, d, rd), tl.fma(e, e, q), tl.fma(e * e, d, qd)


@triton.jit
def _lower(delta, r, rd, q, qd):
    """The same four sums, measured from a maximum that lies -delta bits higher."""
    c = tl.exp2(delta)
    return c * r, c * tl.fma(delta, r, rd), c * c * q, c * c * tl.fma(delta, q, qd)


@triton.jit
def _finite(parts, low, FUSED: tl.constexpr):
    """Parts in float32 without -inf, whose e^d d would be 0 (-inf); unless FUSED, `_sums` sees to that."""
    if FUSED:
        return [_raised(x, low) for x in parts]
    else:
        return parts


@triton.jit
def _others(parts, maximum, low, FUSED: tl.constexpr):
    """`_finite` without the elements that equal the maximum."""
    if FUSED:
        return [tl.where(_wide(x) == maximum, low, _raised(x, low)) for x in parts]
    else:
        return [tl.where(x == maximum, low, x) for x in parts]


@triton.jit
def _take(
    parts, maximum, top, bits, far, cap, r0, rd0, q0, qd0, r, rd, q, qd, HAS_CAP: tl.constexpr, FUSED: tl.constexpr
):
    """Add parts of a row, (LANES,) each, to the sums of their lanes, or to the row's own: the tokens that tie.

    What ties is decided on the logits as they are; distances are between `_folded` ones, and `top` is the maximum's.
    """
    low = -64 * far if FUSED else -float("inf")  # e^d is 0 here, and d finite
    x = parts[0]
    for i in tl.static_range(1, len(parts)):
        x = _larger(x, parts[i])
    highest = tl.max(x, axis=0).to(tl.float32)
    if highest >= maximum:
        is_new = tl.where(highest > maximum, 1.0, 0.0)  # the mode so far is an ordinary token of the sums now
        rises_to = _folded(highest, cap, HAS_CAP)
        delta = tl.maximum((top - rises_to) * bits, _LOWEST)
        r0, rd0, q0, qd0 = _lower(delta, r0 + is_new, rd0, q0 + is_new, qd0)
        equal = tl.zeros_like(r)
        for i in tl.static_range(len(parts)):
            equal += tl.where(_wide(parts[i]) == highest, 1.0, 0.0)
        ties = tl.where(highest == -float("inf"), 0.0, tl.sum(equal, axis=0) - is_new)
        r0 += ties
        q0 += ties
        if FUSED:
            delta = tl.maximum(_product(maximum, bits) - _product(highest, bits), _LOWEST)
        r, rd, q, qd = _lower(delta, r, rd, q, qd)
        maximum = highest
        top = rises_to
        finite = _others(parts, maximum, low, FUSED)
    else:
        finite = _finite(parts, low, FUSED)
    a, b = _line(top, bits, far, FUSED)
    for i in tl.static_range(len(parts)):
        r, rd, q, qd = _sums(_folded(finite[i], cap, HAS_CAP), a, b, r, rd, q, qd, FUSED)
    return maximum, top, r0, rd0, q0, qd0, r, rd, q, qd


@triton.jit
def _fold_kernel(
    logits_ptr, tokens_ptr, mask_ptr, state_ptr, stats_ptr,
    batch_stride, row_stride, rows_a_batch, mask_stride, state_stride, stats_stride,
    start, n_cols, bits, far, cap,
    IS_FIRST: tl.constexpr, IS_LAST: tl.constexpr, HAS_MASK: tl.constexpr, HAS_CAP: tl.constexpr, FUSED: tl.constexpr,
    BLOCK: tl.constexpr,
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
    LANES: tl.constexpr = BLOCK // 4
    lanes = tl.arange(0, LANES)
    r = tl.zeros((LANES,), tl.float32)
    rd = tl.zeros((LANES,), tl.float32)
    q = tl.zeros((LANES,), tl.float32)
    qd = tl.zeros((LANES,), tl.float32)

    whole = n_cols // BLOCK * BLOCK
    for first in range(whole, n_cols, LANES):  # before the loop, across which it would hold a register
        parts = (_load(logits_ptr, first + lanes, n_cols, True, HAS_CAP, FUSED),)
        maximum, top, r0, rd0, q0, qd0, r, rd, q, qd = _take(
            parts, maximum, top, bits, far, cap, r0, rd0, q0, qd0, r, rd, q, qd, HAS_CAP, FUSED
        )
    for first in tl.range(0, whole, BLOCK, num_stages=2):  # loads the next block while it works on one
        columns = (first + lanes, first + LANES + lanes, first + 2 * LANES + lanes, first + 3 * LANES + lanes)
        parts = [_load(logits_ptr, c, n_cols, False, HAS_CAP, FUSED) for c in columns]
        maximum, top, r0, rd0, q0, qd0, r, rd, q, qd = _take(
            parts, maximum, top, bits, far, cap, r0, rd0, q0, qd0, r, rd, q, qd, HAS_CAP, FUSED
        )
    r1 = tl.sum(r, axis=0)
    rd1 = tl.sum(rd, axis=0)
    q1 = tl.sum(q, axis=0)
    qd1 = tl.sum(qd, axis=0)
    if FUSED:
        excess = tl.fma(maximum, bits, -_product(maximum, bits))
        r1, rd1, q1, qd1 = _lower(tl.where(tl.abs(maximum) < far, -excess, 0.0), r1, rd1, q1, qd1)
    r0 += r1
    rd0 += rd1
    q0 += q1
    qd0 += qd1

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
        # maths.stats_from_sums, number by number
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
    first = program % blocks * BLOCK
    lanes = tl.arange(0, BLOCK)
    columns = first + lanes
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
    token = tl.load(tokens_ptr + row) - start - first
    x = _within(_wide(tl.load(logits_ptr + columns, mask=inside)), HAS_CAP)
    if HAS_CAP:
        z, bend = _tanh(x, cap)
        d = tl.where(x == maximum, 0.0, (z - _folded(maximum, cap, HAS_CAP)) * bits)
    else:
        d = (x - maximum) * bits
    d = tl.maximum(d, _LOWEST, propagate_nan=_NAN_STAYS)
    gradient = tl.exp2(d) * tl.fma(beta, d, alpha)
    if (token >= 0) & (token < BLOCK):  # one block of a row: the others compare nothing
        gamma = tl.load(coefficients_ptr + row + 2 * coefficients_stride)
        gradient = tl.where(lanes == token.to(tl.int32), gamma, gradient)
    if HAS_CAP:
        gradient *= bend  # pyright: ignore[reportPossiblyUnboundVariable]
    tl.store(out_ptr + columns, gradient.to(out_ptr.dtype.element_ty), mask=inside)


def _fusion(logits: Tensor, head: Head) -> dict[str, float | bool]:
    """Whether distances are one fused operation, and from where on the maximum is 2^24 bits away from 0 (`_line`)."""
    bits = head.scale / math.log(2)
    fits = logits.dtype in (torch.bfloat16, torch.float16) and head.softcap is None and 2.0**-64 < bits < 2.0**64
    fused = fits and _has_pairs(logits.device)
    # Only fused kernels are short of time; the others may have the registers that the compiler would like.
    return {"far": 2.0**24 / bits, "FUSED": fused, **({"maxnreg": REGISTERS} if fused else {})}


@functools.cache
def _has_pairs(device: torch.device) -> bool:
    """Whether 16-bit numbers can be compared two at a time: on NVIDIA's GPUs since Ampere, and in the interpreter."""
    return device.type != "cuda" or (torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0))


def _arguments(tile: Tile) -> dict[str, Any]:
    """What both kernels take of a tile, whose logits (N, V) or (B, T, V) may have any strides but along V."""
    logits, mask, head = tile.logits, tile.mask, tile.head
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    return {
        "logits_ptr": logits,
        "batch_stride": logits.stride(0) if logits.dim() == 3 else 0,
        "row_stride": logits.stride(-2),
        "rows_a_batch": max(1, logits.shape[-2]),
        "n_cols": logits.shape[-1],
        "tokens_ptr": tile.tokens,
        "start": tile.start,
        "mask_ptr": tile.tokens if mask is None else mask.to(torch.int8),  # some pointer, never read without a mask
        "mask_stride": 0 if mask is None else 1,
        "HAS_MASK": mask is not None,
        "bits": head.scale / math.log(2),
        "cap": 0.0 if head.softcap is None else 2 * head.logit_scale / (head.softcap * math.log(2)),
        "HAS_CAP": head.softcap is not None,
    }


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


class Triton(Engine):
    """The kernels of this file, on CUDA tensors, or on CPU tensors under TRITON_INTERPRET=1."""

    strided_batches = True

    def product_tile(self, rows: int, vocabulary: int, itemsize: int, tile_bytes: int | None) -> tuple[int, int]:
        elements = max(1, (PRODUCT_BYTES if tile_bytes is None else tile_bytes) // itemsize)
        height = max(1, min(rows, PRODUCT_ROWS, elements // min(vocabulary, BLOCK)))
        width = max(1, min(vocabulary, elements // height))
        return height, width if width == vocabulary else width // BLOCK * BLOCK or width

    def statistics(self, tile: Tile, state: Tensor, stats: Tensor) -> None:
        self._fold(tile, state, stats)

    def fold(self, tile: Tile, state: Tensor, stats: Tensor | None, keep: bool) -> None:
        self._fold(tile, state, stats)

    @staticmethod
    def _fold(tile: Tile, state: Tensor, stats: Tensor | None) -> None:
        if state.shape[1] == 0:
            return
        columns = state if stats is None else stats
        with _on(state):
            _fold_kernel[(state.shape[1],)](
                state_ptr=state, stats_ptr=columns, state_stride=state.stride(0), stats_stride=columns.stride(0),
                IS_FIRST=tile.start == 0, IS_LAST=stats is not None, BLOCK=BLOCK, num_warps=WARPS,
                **_arguments(tile), **_fusion(tile.logits, tile.head),
            )  # fmt: skip

    def gradient(self, tile: Tile, maximum: Tensor, coefficients: Tensor, out: Tensor) -> None:
        if maximum.shape[0] == 0:
            return
        blocks = triton.cdiv(tile.logits.shape[-1], GRADIENT_BLOCK)
        warps = GRADIENT_WARPS if tile.head.softcap is None else CAPPED_GRADIENT_WARPS
        with _on(maximum):
            _gradient_kernel[(maximum.shape[0] * blocks,)](
                out_ptr=out, maximum_ptr=maximum, coefficients_ptr=coefficients, out_stride=out.stride(0),
                coefficients_stride=coefficients.stride(0), blocks=blocks, BLOCK=GRADIENT_BLOCK, num_warps=warps,
                **_arguments(tile),
            )  # fmt: skip
