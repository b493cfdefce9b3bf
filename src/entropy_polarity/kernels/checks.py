"""The checks of the public kernels: each error says in one line what was given and what was expected."""

import math
from numbers import Integral, Real

import torch
from torch import Tensor

from entropy_polarity.kernels.state import Head, accumulation_dtype
from entropy_polarity.tokens import TokenStats

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
IDS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


def check_head(who: str, head: Head, logits: torch.dtype) -> None:
    """Temperature, cap, scale and their quotients must be positive numbers that the sums' type holds to all digits."""
    given = {"temperature": head.temperature, "softcap": head.softcap, "logit_scale": head.logit_scale}
    for name, value in given.items():
        if value is not None and not (_is(value, Real) and value > 0 and math.isfinite(value)):
            raise ValueError(f"{who}: {name} is {value}; expected a positive number")
    given |= {"logit_scale / temperature": head.slope}
    if head.softcap is not None:
        given |= {"logit_scale / softcap": head.logit_scale / head.softcap, "softcap / temperature": head.scale}
    dtype = accumulation_dtype(logits)
    least = torch.finfo(dtype).tiny
    for name, value in given.items():
        if value is not None and not least <= value <= 1 / least:
            short = str(dtype).removeprefix("torch.")
            raise ValueError(f"{who}: {name} is {value:g}; {short} takes {least:.1e} to {1 / least:.1e}")


def check_bytes(who: str, name: str, value: int | None) -> None:
    if value is not None and not (_is(value, Integral) and value > 0):
        raise ValueError(f"{who}: {name} is {value}; expected a positive whole number of bytes, or None")


def check_factors(
    who: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab_size: int | None, tokens: Tensor,
    mask: Tensor | None,
) -> None:  # fmt: skip
    """Hidden states and an output head that fit each other, and one id for each state that the mask keeps."""
    for name, x in {"hidden": hidden, "weight": weight, "bias": bias}.items():
        if x is not None and x.dtype not in DTYPES:
            raise ValueError(f"{who}: {name} is {x.dtype}; expected floats of 16, 32 or 64 bits")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{who}: hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}; "
            "expected (N, D) and (V, D) with the same D"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{who}: bias has shape {tuple(bias.shape)}; expected ({weight.shape[0]},)")
    check_ids(who, hidden.shape[:1], len(weight), vocab_size, tokens, mask)


def check_ids(
    who: str, rows: torch.Size, vocabulary: int, vocab_size: int | None, tokens: Tensor, mask: Tensor | None
) -> None:
    """One id of the vocabulary for each row that the mask keeps."""
    if tokens.shape != rows:
        raise ValueError(
            f"{who}: {tuple(rows)} states but token ids of shape {tuple(tokens.shape)}; expected one id per state"
        )
    if tokens.dtype not in IDS:
        raise ValueError(f"{who}: token ids are {tokens.dtype}; expected an integer type (torch.long)")
    if mask is not None and (mask.shape != rows or mask.dtype != torch.bool):
        raise ValueError(
            f"{who}: the mask is {mask.dtype} of shape {tuple(mask.shape)}; expected torch.bool of shape {tuple(rows)}"
        )
    if vocabulary == 0:
        raise ValueError(f"{who}: the vocabulary is empty (the last dimension of the logits is 0)")
    width = vocabulary if vocab_size is None else vocab_size
    if not (_is(width, Integral) and 0 < width <= vocabulary):
        raise ValueError(f"{who}: vocab_size is {width}; expected 1 to {vocabulary}, the last dimension of the logits")
    ids = tokens.long()  # in a short type the vocabulary's size would wrap around, and unsigned ones lack comparisons
    outside = ((ids < 0) | (ids >= width)) & (True if mask is None else mask)
    if outside.any():
        where = tuple(outside.nonzero()[0].tolist())
        raise ValueError(
            f"{who}: token id {tokens[where].item()} at index {where} is outside the vocabulary [0, {width}); "
            "leave ignored positions (-100) out with a mask"
        )


def check_rows(who: str, stats: TokenStats) -> None:
    """NaN or +inf in a row, or a row of all -inf, has made its entropy NaN, so the logits need not be read again."""
    bad = stats.entropy.isnan()
    if bad.any():
        where = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"{who}: {int(bad.sum())} of {bad.numel()} rows hold NaN or +inf or are all -inf, the first at index "
            f"{where}; -inf is allowed for single tokens only. Pass check=False to get NaN for such rows"
        )


def _is(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
