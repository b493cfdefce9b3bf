"""The public functions: they check what is given, pick the engine, and hand over."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from entropy_polarity.kernels.engine import choose, engine
from entropy_polarity.kernels.linear import LinearLoss, LinearStats, Plan
from entropy_polarity.kernels.logits import LogitsStats
from entropy_polarity.kernels.state import Head
from entropy_polarity.tokens import TokenStats

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Logits of a chunk of whole rows, for losses known chunk by chunk: 512 MiB on a GPU, 64 MiB on a CPU.
CHUNK_BYTES = {"cuda": 2**29}
CHUNK_BYTES_ELSEWHERE = 2**26


def token_stats(
    logits: Float[Tensor, "*N V"],
    tokens: Int[Tensor, "*N"],
    *,
    temperature: float = 1.0,
    mask: Bool[Tensor, "*N"] | None = None,
    vocab_size: int | None = None,
    entropy_grad: bool = False,
    implementation: str | None = None,
    check: bool = True,
) -> TokenStats:
    """log p_a, entropy, Σp², Σp² log p and the sensitivity T of each sampled token, from logits.

    `logits` (..., V) raw, of 16, 32 or 64 bits; `tokens` (...) the sampled ids; p = softmax(logits / temperature).
    Returns fields of shape (...), in nats, float32 (float64 for float64 logits). `logp` carries a gradient, and so
    does `entropy` with `entropy_grad=True`. Logits of -inf are exact (p = 0); a sampled token at -inf has logp = -inf
    and T = C. Where `mask` is False every field is 0, without gradient, whatever the logits and the id are.
    `vocab_size` leaves columns beyond it out (padding of the head). Extra memory: one tile (on a GPU none; logits
    whose vocabulary is not their last stride are copied).

    `implementation`: "chunked", "compiled" or "triton"; by default the environment variable PAPO_KERNEL, or what
    suits the device and type (`papo doctor` tells).

    Raises ValueError (`check=True`) for shapes that do not match, an id outside [0, V), a temperature that is
    not positive, logits that hold NaN or +inf, or a row of all -inf. With `check=False` such rows give NaN, and an id
    outside the vocabulary anything.
    Source: arXiv 2605.11775 for T; one pass and the numerics are ours.

    >>> stats = token_stats(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0]))
    >>> round(stats.entropy.item(), 4), round(stats.sensitivity.item(), 4)
    (0.8324, -0.1418)
    """
    who = "token_stats"
    if check and (logits.dim() == 0 or logits.dtype not in DTYPES):
        raise ValueError(
            f"{who}: logits are {logits.dtype} of shape {tuple(logits.shape)}; expected floats (..., V) of 16, 32 or "
            "64 bits"
        )
    width = logits.shape[-1] if vocab_size is None else vocab_size
    if check:
        _check_arguments(who, logits.shape[:-1], logits.shape[-1], width, tokens, temperature, mask)
    kept = None if mask is None else mask.reshape(-1)
    choice = choose(logits.device, logits.dtype, implementation)
    fields = LogitsStats.apply(
        logits,
        _flat_ids(tokens, mask),
        kept,
        width,
        Head(temperature),
        engine(choice.name, logits.device.type),
        entropy_grad,
    )
    stats = TokenStats(*(field.reshape(tokens.shape) for field in fields))  # pyright: ignore[reportGeneralTypeIssues]
    if check:
        _check_rows(who, stats)
    return stats


def linear_token_stats(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    tokens: Int[Tensor, " N"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Bool[Tensor, " N"] | None = None,
    vocab_size: int | None = None,
    entropy_grad: bool = False,
    logits_dtype: torch.dtype | None = None,
    tile_bytes: int | None = None,
    implementation: str | None = None,
    check: bool = True,
) -> TokenStats:
    """`token_stats` of an output head, whose logits are never held: one tile of them at a time.

    `hidden` (N, D), `weight` (V, D) and `bias` (V,), `tokens` (N,). With x = hidden @ weight.T + bias, the logits are
    `logit_scale` x, or c tanh(`logit_scale` x / c) for a `softcap` c. Rows where `mask` is False cost nothing and give
    0. The product is made in the autocast type, or in that of `hidden`, like the model's own; `logits_dtype`
    torch.float32 keeps its float32 sums for 16-bit factors.

    Gradients reach `hidden`, `weight` and `bias`, summed in float32. They are made from logits that the backward
    makes again; for a head that needs no gradient (LoRA) the forward collects them instead: two products rather than
    four. `tile_bytes` sets the memory of a tile. Everything else as in `token_stats`.

    >>> hidden, weight = torch.eye(2), torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    >>> round(linear_token_stats(hidden, weight, torch.tensor([0, 0])).sensitivity[0].item(), 4)
    -0.1418
    """
    who = "linear_token_stats"
    head = Head(temperature, softcap, logit_scale)
    if check:
        _check_head(who, hidden, weight, bias, head, vocab_size, tokens, mask)
    weight, bias = _limited(weight, bias, vocab_size)
    plan = _plan(hidden, head, logits_dtype, tile_bytes, implementation)
    needs_head = weight.requires_grad or (bias is not None and bias.requires_grad)
    frozen = torch.is_grad_enabled() and hidden.requires_grad and not needs_head and not entropy_grad
    ids, kept = _flat_ids(tokens, mask), hidden
    if mask is not None:
        ids, kept = ids[mask], hidden[mask]
    fields = LinearStats.apply(kept, weight, bias, ids, plan, entropy_grad, frozen)
    stats = TokenStats(*fields)  # pyright: ignore[reportGeneralTypeIssues]
    if mask is not None:
        stats = TokenStats(*(field.new_zeros(mask.shape).masked_scatter(mask, field) for field in stats))
    if check:
        _check_rows(who, stats)
    return stats


def linear_token_loss(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    tokens: Int[Tensor, " N"],
    loss: Callable[[TokenStats, slice], Tensor],
    *,
    bias: Float[Tensor, " V"] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk_bytes: int | None = None,
    implementation: str | None = None,
    check: bool = True,
) -> tuple[Float[Tensor, ""], TokenStats]:
    """Σ over chunks of rows of `loss(stats, rows)`, and the statistics (N,) of all rows, with three products, not four.

    `loss` is called once for each chunk: `stats` are those of the rows `rows` (a slice of N), and `stats.logp` and
    `stats.entropy` carry gradients; it returns their share of the loss, one number. So the loss must be a sum over
    tokens whose normaliser is known before. Gradients are made at once, while the chunk's logits are in memory, and
    given out by one `backward` of the result: a loss scale comes too late for them, so float16 is refused.
    `chunk_bytes` sets the memory of a chunk's logits. Everything else as in `linear_token_stats`. Source: ours;
    gradients in the forward are common practice for cross-entropy.

    >>> hidden = torch.eye(2, requires_grad=True)
    >>> weight, tokens = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 0])
    >>> total, stats = linear_token_loss(hidden, weight, tokens, lambda stats, rows: -stats.logp.sum() / 2)
    >>> total.backward()
    >>> [round(x, 4) for x in hidden.grad[0].tolist()]
    [-0.2124, 0.0]
    """
    who = "linear_token_loss"
    head = Head(temperature, softcap, logit_scale)
    if check:
        _check_head(who, hidden, weight, bias, head, vocab_size, tokens, None)
    weight, bias = _limited(weight, bias, vocab_size)
    if _product_dtype(hidden) == torch.float16:
        raise ValueError(
            f"{who}: a product of float16, whose small gradients would be lost before a loss scale reaches them; "
            "use bfloat16, or linear_token_stats"
        )
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES_ELSEWHERE)
    plan = _plan(hidden, head, logits_dtype, None, implementation)
    most = max(1, chunk_bytes // (plan.logits.itemsize * len(weight)))
    chunk_rows = -(-len(hidden) // -(-len(hidden) // most)) if len(hidden) else 1  # chunks of equal size
    total, *fields = LinearLoss.apply(  # pyright: ignore[reportGeneralTypeIssues]
        hidden, weight, bias, _flat_ids(tokens, None), plan, loss, chunk_rows, torch.is_grad_enabled()
    )
    stats = TokenStats(*fields)
    if check:
        _check_rows(who, stats)
    return total, stats


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _plan(
    hidden: Tensor, head: Head, logits: torch.dtype | None, tile_bytes: int | None, implementation: str | None
) -> Plan:
    device, product = hidden.device.type, _product_dtype(hidden)
    logits = product if logits is None else logits
    if logits != product and not (logits == torch.float32 and product.itemsize == 2):
        raise ValueError(
            f"logits_dtype is {logits} for a product of {product}; expected None, {product}, or torch.float32 with a "
            "product of 16 bits"
        )
    return Plan(engine(choose(hidden.device, logits, implementation).name, device), head, product, logits, tile_bytes)


def _limited(weight: Tensor, bias: Tensor | None, vocab_size: int | None) -> tuple[Tensor, Tensor | None]:
    if vocab_size is None or vocab_size == len(weight):
        return weight, bias
    return weight[:vocab_size], None if bias is None else bias[:vocab_size]


def _flat_ids(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Token ids in one row; where the mask is False any id may stand, -100 for example."""
    return (tokens if mask is None else tokens.where(mask, 0)).reshape(-1).long().contiguous()


def _check_head(
    who: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    head: Head,
    vocab_size: int | None,
    tokens: Tensor,
    mask: Tensor | None,
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{who}: hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}; "
            "expected (N, D) and (V, D) with the same D"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{who}: bias has shape {tuple(bias.shape)}; expected ({weight.shape[0]},)")
    for name, value in (("softcap", head.softcap), ("logit_scale", head.logit_scale)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{who}: {name} is {value}; expected a positive number")
    width = len(weight) if vocab_size is None else vocab_size
    _check_arguments(who, hidden.shape[:1], len(weight), width, tokens, head.temperature, mask)


def _check_arguments(
    who: str, rows: torch.Size, columns: int, width: int, tokens: Tensor, temperature: float, mask: Tensor | None
) -> None:
    if tokens.shape != rows:
        raise ValueError(
            f"{who}: {tuple(rows)} states but token ids of shape {tuple(tokens.shape)}; expected one id a state"
        )
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(f"{who}: token ids are {tokens.dtype}; expected an integer type (torch.long)")
    if mask is not None and (mask.shape != rows or mask.dtype != torch.bool):
        raise ValueError(
            f"{who}: the mask is {mask.dtype} of shape {tuple(mask.shape)}; expected torch.bool of shape {tuple(rows)}"
        )
    if columns == 0:
        raise ValueError(f"{who}: the vocabulary is empty (the last dimension of the logits is 0)")
    if not 0 < width <= columns:
        raise ValueError(f"{who}: vocab_size is {width}; expected 1 to {columns}, the columns of the logits")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"{who}: temperature is {temperature}; expected a positive number")
    outside = (tokens < 0) | (tokens >= width)
    outside = outside if mask is None else outside & mask
    if outside.any():
        where = tuple(outside.nonzero()[0].tolist())
        raise ValueError(
            f"{who}: token id {tokens[where].item()} at index {where} is outside the vocabulary [0, {width}); "
            "leave ignored positions (-100) out with a mask"
        )


def _check_rows(who: str, stats: TokenStats) -> None:
    """NaN or +inf in a row, or a row of all -inf, makes its entropy NaN: no second look at the logits."""
    bad = stats.entropy.isnan()
    if bad.any():
        where = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"{who}: {int(bad.sum())} of {bad.numel()} rows hold NaN or +inf or are all -inf, the first at index "
            f"{where}; -inf is allowed for single tokens only. Pass check=False to get NaN for such rows"
        )
