"""Statistics chunk by chunk, in plain torch: one pass over the logits, one chunk of extra memory.

Rows are taken a few at a time, so that the temporaries of a chunk stay small whatever the number of rows.
Sums are shifted by the maximum and leave the mode out (see `polarity.stats_from_sums`); 16-bit input is
accumulated in float32.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from entropy_polarity.polarity import LOWEST, stats_from_sums
from entropy_polarity.tokens import TokenStats

# Elements of a chunk: 4 MiB in float32, a size that stays in cache.
CHUNK_ELEMENTS = 2**20
# A chunk that is also a matrix product needs enough rows to keep the product efficient.
LINEAR_CHUNK_ELEMENTS = 2**23


def _chunks(rows: int, width: int, elements: int) -> Iterator[slice]:
    step = max(1, elements // width)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunk_stats(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[TokenStats, Tensor]:
    """Statistics of a chunk (n, V), and log Σ e^z of its tempered logits as (maximum, log s) for the backward."""
    logits = logits.to(_accumulation_dtype(logits.dtype))
    maximum, mode = logits.max(dim=-1, keepdim=True)
    d = logits - maximum
    if temperature != 1:
        d /= temperature
    d_a = d.gather(-1, tokens[:, None]).squeeze(-1)
    d.clamp_(min=LOWEST)  # NaN stays NaN, and so do rows of all -inf
    # 0 leaves the mode out of the sums; a maximum that is infinite gives NaN here and so in every statistic.
    e = d.exp().scatter_(-1, mode, maximum - maximum)
    r = e.sum(-1)
    ed = e * d
    rd = ed.sum(-1)
    qd = ed.mul_(e).sum(-1)
    q = e.mul_(e).sum(-1)
    stats = stats_from_sums(d_a, tokens == mode.squeeze(-1), r, rd, q, qd)
    return stats, torch.stack([maximum.squeeze(-1), torch.log1p(r)])


def _chunk_logits_gradient(
    logits: Tensor, tokens: Tensor, normaliser: Tensor, temperature: float, grad: Tensor
) -> Tensor:
    """grad · d log p_a / d logits = grad (e_a - p) / temperature for a chunk (n, V)."""
    maximum, log_s = normaliser
    z = logits.to(normaliser.dtype) - maximum[:, None]
    if temperature != 1:
        z /= temperature
    minus_p = z.sub_(log_s[:, None]).exp_().neg_()
    # 1 - p_a by expm1: exact where p_a is near 1.
    logp_a = logits.gather(-1, tokens[:, None]).to(z.dtype).sub(maximum[:, None]).div(temperature) - log_s[:, None]
    minus_p.scatter_(-1, tokens[:, None], -torch.expm1(logp_a))
    return minus_p.mul_(grad[:, None] / temperature)


def _matrices(logits: Tensor) -> Iterator[Tensor]:
    """Two-dimensional views that cover the states in order: a slice like logits[:, :-1] is never copied whole."""
    try:
        yield logits.view(-1, logits.shape[-1])
    except RuntimeError:
        for part in logits:
            yield from _matrices(part)


def _row_chunks(logits: Tensor, elements: int) -> Iterator[tuple[slice, Tensor]]:
    """Chunks (n, V) of the states, each with its place among all of them."""
    start = 0
    for matrix in _matrices(logits):
        for part in _chunks(len(matrix), matrix.shape[1], elements):
            yield slice(start + part.start, start + part.stop), matrix[part]
        start += len(matrix)


def _all_stats(logits: Tensor, tokens: Tensor, temperature: float, columns: Tensor, normaliser: Tensor) -> None:
    """Fill `columns` (7, N) and `normaliser` (2, N) from logits (..., V), a chunk at a time."""
    for part, chunk in _row_chunks(logits, CHUNK_ELEMENTS):
        stats, normaliser[:, part] = _chunk_stats(chunk, tokens[part], temperature)
        columns[:, part] = torch.stack(stats)


def _empty_columns(like: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    dtype = _accumulation_dtype(like.dtype)
    columns = torch.empty(len(TokenStats._fields), rows, dtype=dtype, device=like.device)
    return columns, torch.empty(2, rows, dtype=dtype, device=like.device)


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, tokens: Tensor, temperature: float):
        columns, normaliser = _empty_columns(logits, len(tokens))
        _all_stats(logits, tokens, temperature, columns, normaliser)
        ctx.save_for_backward(logits, tokens, normaliser)
        ctx.temperature = temperature
        logp, *statistics = columns.unbind()
        ctx.mark_non_differentiable(*statistics)
        return logp, *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, tokens, normaliser = ctx.saved_tensors
        grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        rows = grad.view(-1, logits.shape[-1])
        for part, chunk in _row_chunks(logits, CHUNK_ELEMENTS):
            rows[part] = _chunk_logits_gradient(
                chunk, tokens[part], normaliser[:, part], ctx.temperature, grad_logp[part]
            )
        return grad, None, None


def _head_dtype(hidden: Tensor) -> torch.dtype:
    """The type in which the model's own head would make the product: autocast's, or that of the hidden states."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        return linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _linear_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    temperature: float,
    dtype: torch.dtype,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """All statistics (7, N) and the normaliser (2, N) of softcap(logit_scale · (hidden @ weight.T + bias))."""
    columns, normaliser = _empty_columns(hidden, len(hidden))
    for part in _chunks(len(hidden), len(weight), LINEAR_CHUNK_ELEMENTS):
        logits = _head_logits(hidden[part], weight, bias, dtype)
        if logit_scale != 1.0 or softcap is not None:
            logits = logits.to(columns.dtype) * logit_scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        _all_stats(logits, tokens[part], temperature, columns[:, part], normaliser[:, part])
    return columns, normaliser


@torch.no_grad()
def head_statistics(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    bias: Float[Tensor, " V"] | None,
    tokens: Int[Tensor, " N"],
    *,
    temperature: float,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> TokenStats:
    """`linear_token_stats` without gradient and without checks, for any Hugging Face head.

    `softcap` c and `logit_scale` k: logits = c tanh(k (hidden @ weight.T + bias) / c). The product is made in the
    autocast type, or in that of `hidden`, like the model's own.
    """
    dtype = _head_dtype(hidden)
    return TokenStats(*_linear_chunks(hidden, weight, bias, tokens, temperature, dtype, softcap, logit_scale)[0])


class _LinearTokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float):
        # The backward recomputes the logits: in the very type of the forward, or p would not be theirs.
        ctx.dtype = _head_dtype(hidden)
        columns, normaliser = _linear_chunks(hidden, weight, bias, tokens, temperature, ctx.dtype)
        ctx.save_for_backward(hidden, weight, bias, tokens, normaliser)
        ctx.temperature = temperature
        logp, *statistics = columns.unbind()
        ctx.mark_non_differentiable(*statistics)
        return logp, *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, bias, tokens, normaliser = ctx.saved_tensors
        dtype = normaliser.dtype
        # Gradients summed over chunks in a 16-bit type would drift: accumulate in float32, round once.
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if bias is not None and ctx.needs_input_grad[2] else None
        for part in _chunks(len(hidden), len(weight), LINEAR_CHUNK_ELEMENTS):
            logits = _head_logits(hidden[part], weight, bias, ctx.dtype)
            grad = _chunk_logits_gradient(logits, tokens[part], normaliser[:, part], ctx.temperature, grad_logp[part])
            if grad_hidden is not None:
                grad_hidden[part] = (grad @ weight.to(dtype)).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight.addmm_(grad.t(), hidden[part].to(dtype))
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


def token_stats(
    logits: Float[Tensor, "*N V"],
    tokens: Int[Tensor, "*N"],
    *,
    temperature: float = 1.0,
    check: bool = True,
) -> TokenStats:
    """log p_a, entropy, Σp², Σp² log p and the sensitivity T of each sampled token, from logits.

    `logits` (..., V) raw, in any float type; `tokens` (...) the sampled ids; p = softmax(logits / temperature).
    Returns fields of shape (...), in nats, float32 (float64 for float64 logits). Only `logp` carries a gradient.
    Logits of -inf are exact (p = 0). Extra memory: one chunk.

    Raises ValueError (`check=True`) for shapes that do not match, an id outside [0, V), a temperature that is
    not positive, logits that hold NaN or +inf, or a row of all -inf. With `check=False` such rows give NaN.
    Source: arXiv 2605.11775 for T; one pass and the numerics are ours.

    >>> stats = token_stats(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0]))
    >>> round(stats.entropy.item(), 4), round(stats.sensitivity.item(), 4)
    (0.8324, -0.1418)
    """
    if check:
        if logits.dim() == 0 or not logits.is_floating_point():
            raise ValueError(
                f"token_stats: logits are {logits.dtype} of shape {tuple(logits.shape)}; expected floats (..., V)"
            )
        _check_arguments("token_stats", logits.shape[:-1], logits.shape[-1], tokens, temperature)
    flat_tokens = tokens.reshape(-1).long()
    stats = TokenStats(*_TokenStats.apply(logits, flat_tokens, temperature))  # type: ignore[misc]
    if check:
        _check_rows("token_stats", stats, tokens.shape)
    return TokenStats(*(field.reshape(tokens.shape) for field in stats))


def linear_token_stats(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    tokens: Int[Tensor, " N"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    temperature: float = 1.0,
    check: bool = True,
) -> TokenStats:
    """`token_stats` of the logits `hidden @ weight.T + bias`, which are never held whole.

    `hidden` (N, D), `weight` (V, D) and `bias` (V,) the output head, `tokens` (N,). The product is made a chunk
    of rows at a time and made again in the backward pass; gradients reach `hidden`, `weight` and `bias` through
    `logp`, accumulated in float32. Same result fields, units and errors as `token_stats`.

    >>> hidden, weight = torch.eye(2), torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    >>> round(linear_token_stats(hidden, weight, torch.tensor([0, 0])).sensitivity[0].item(), 4)
    -0.1418
    """
    if check:
        if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
            raise ValueError(
                f"linear_token_stats: hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}; "
                "expected (N, D) and (V, D) with the same D"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"linear_token_stats: bias has shape {tuple(bias.shape)}; expected ({weight.shape[0]},)")
        _check_arguments("linear_token_stats", hidden.shape[:1], weight.shape[0], tokens, temperature)
    stats = TokenStats(*_LinearTokenStats.apply(hidden, weight, bias, tokens.long(), temperature))  # type: ignore[misc]
    if check:
        _check_rows("linear_token_stats", stats, tokens.shape)
    return stats


def _check_arguments(who: str, rows: torch.Size, width: int, tokens: Tensor, temperature: float) -> None:
    if tokens.shape != rows:
        raise ValueError(
            f"{who}: {tuple(rows)} states but token ids of shape {tuple(tokens.shape)}; expected one id a state"
        )
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(f"{who}: token ids are {tokens.dtype}; expected an integer type (torch.long)")
    if width == 0:
        raise ValueError(f"{who}: the vocabulary is empty (the last dimension of the logits is 0)")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"{who}: temperature is {temperature}; expected a positive number")
    outside = (tokens < 0) | (tokens >= width)
    if outside.any():
        where = tuple(outside.nonzero()[0].tolist())
        raise ValueError(
            f"{who}: token id {tokens[where].item()} at index {where} is outside the vocabulary [0, {width}); "
            "replace ignored positions (-100) by 0 and mask the result"
        )


def _check_rows(who: str, stats: TokenStats, shape: torch.Size) -> None:
    """NaN or +inf in a row, or a row of all -inf, makes its entropy NaN: no second look at the logits."""
    bad = stats.entropy.isnan()
    if bad.any():
        where = tuple(bad.reshape(shape).nonzero()[0].tolist())
        raise ValueError(
            f"{who}: {int(bad.sum())} of {bad.numel()} rows hold NaN or +inf or are all -inf, the first at index "
            f"{where}; -inf is allowed for single tokens only. Pass check=False to get NaN for such rows"
        )
