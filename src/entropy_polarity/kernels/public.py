"""The public kernels: they check their arguments, choose the engine and hand over to it."""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from entropy_polarity.kernels.checks import DTYPES, check_bytes, check_factors, check_head, check_ids, check_rows
from entropy_polarity.kernels.dispatch import engine_for
from entropy_polarity.kernels.linear import LinearLoss, LinearStats, Plan
from entropy_polarity.kernels.logits import LogitsStats
from entropy_polarity.kernels.state import Head
from entropy_polarity.tokens import TokenStats


def token_stats(
    logits: Float[Tensor, "*N V"],
    tokens: Integer[Tensor, "*N"],
    *,
    temperature: float = 1.0,
    mask: Bool[Tensor, "*N"] | None = None,
    vocab_size: int | None = None,
    entropy_grad: bool = False,
    implementation: str | None = None,
    check: bool = True,
) -> TokenStats:
    """log p_a, entropy H, Σp², Σp² log p and sensitivity T of each sampled token, from logits.

    `logits` (..., V) are raw and of 16, 32 or 64 bits; `tokens` (...) are the sampled ids; p = softmax(logits /
    temperature). Returns fields of shape (...), in nats, float32 (float64 for float64 logits). `logp` carries a
    gradient, and so does `entropy` with `entropy_grad=True`. Logits of -inf are exact (p = 0); a sampled token at -inf
    has logp = -inf and T = C. Where `mask` is False every field is 0, without gradient, whatever the logits and the id
    are. `vocab_size` leaves out the logits beyond it (padding of the head). `implementation` is as in `choose`. Extra
    memory: one tile (on a GPU none; logits whose vocabulary is not their last stride are copied).

    Raises ValueError for a temperature that is not positive, or so small or large that 1 / temperature leaves the
    normal numbers of the type. With `check=True` also for shapes that do not match, for an id outside [0, V), for
    logits that hold NaN or +inf, and for a row of all -inf. With `check=False` such rows give NaN, and the result of an
    id outside the vocabulary is undefined. Source: arXiv 2605.11775 for T; the single pass and its numerics are ours.

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
    head = Head(temperature)
    check_head(who, head, logits.dtype)
    if check:
        check_ids(who, logits.shape[:-1], logits.shape[-1], vocab_size, tokens, mask)
    width = logits.shape[-1] if vocab_size is None else vocab_size
    kept = None if mask is None else mask.reshape(-1)
    engine = engine_for(logits.device, logits.dtype, implementation)
    fields = LogitsStats.apply(logits, _flat_ids(tokens, mask), kept, width, head, engine, entropy_grad)
    return _stats(who, (field.reshape(tokens.shape) for field in fields), check)  # pyright: ignore[reportGeneralTypeIssues]


def linear_token_stats(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    tokens: Integer[Tensor, " N"],
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
    """`token_stats` of an output head whose logits are never held: one tile of them exists at a time.

    `hidden` (N, D), `weight` (V, D), `bias` (V,) and `tokens` (N,). With x = hidden @ weight.T + bias, the logits are
    `logit_scale` x, or c tanh(`logit_scale` x / c) for a `softcap` c, which rounds them to a step of float32 at c. Rows
    where `mask` is False cost nothing and give 0. The product is made in the autocast type, or in that of `hidden`,
    like the model's own; `logits_dtype` torch.float32 keeps its float32 sums for 16-bit factors.

    Gradients reach `hidden`, `weight` and `bias` and are summed in float32. The backward makes the logits again for
    them; for a head that needs no gradient (LoRA) the forward collects them instead, with two products rather than
    four. `tile_bytes` sets the memory of a tile. Everything else is as in `token_stats`.

    >>> hidden, weight = torch.eye(2), torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    >>> round(linear_token_stats(hidden, weight, torch.tensor([0, 0])).sensitivity[0].item(), 4)
    -0.1418
    """
    who = "linear_token_stats"
    head = Head(temperature, softcap, logit_scale)
    check_bytes(who, "tile_bytes", tile_bytes)
    weight, bias = _checked_head(who, hidden, weight, bias, vocab_size, tokens, mask, check)
    plan = _plan(who, hidden, head, logits_dtype, tile_bytes, implementation)
    head_learns = weight.requires_grad or (bias is not None and bias.requires_grad)
    frozen = torch.is_grad_enabled() and hidden.requires_grad and not head_learns and not entropy_grad
    ids = _flat_ids(tokens, mask)
    if mask is not None:
        ids, hidden = ids[mask], hidden[mask]
    fields: Iterable[Tensor] = LinearStats.apply(hidden, weight, bias, ids, plan, entropy_grad, frozen)  # pyright: ignore
    if mask is not None:
        fields = (field.new_zeros(mask.shape).masked_scatter(mask, field) for field in fields)
    return _stats(who, fields, check)


def linear_token_loss(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    tokens: Integer[Tensor, " N"],
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
    tokens whose normaliser is known beforehand. Gradients are made at once, while the chunk's logits are in memory, and
    given out by one `backward` of the result: a loss scale comes too late for them, so float16 is refused.
    `chunk_bytes` sets the memory of a chunk's logits; by default it is 512 MiB on a GPU, 64 MiB on a CPU. Everything
    else is as in `linear_token_stats`. Source: ours; gradients in the forward are common practice for cross-entropy.

    >>> hidden = torch.eye(2, requires_grad=True)
    >>> weight, tokens = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 0])
    >>> total, stats = linear_token_loss(hidden, weight, tokens, lambda stats, rows: -stats.logp.sum() / 2)
    >>> total.backward()
    >>> [round(x, 4) for x in hidden.grad[0].tolist()]
    [-0.2124, 0.0]
    """
    who = "linear_token_loss"
    head = Head(temperature, softcap, logit_scale)
    check_bytes(who, "chunk_bytes", chunk_bytes)
    weight, bias = _checked_head(who, hidden, weight, bias, vocab_size, tokens, None, check)
    if _product_dtype(hidden) == torch.float16:
        raise ValueError(
            f"{who}: a product of float16, whose small gradients would be lost before a loss scale reaches them; "
            "use bfloat16, or linear_token_stats"
        )
    if chunk_bytes is None:
        chunk_bytes = 2**29 if hidden.device.type == "cuda" else 2**26
    plan = _plan(who, hidden, head, logits_dtype, None, implementation)
    most = max(1, chunk_bytes // (plan.logits.itemsize * len(weight)))
    chunk_rows = -(-len(hidden) // -(-len(hidden) // most)) if len(hidden) else 1  # chunks of equal size
    total, *fields = LinearLoss.apply(  # pyright: ignore[reportGeneralTypeIssues]
        hidden, weight, bias, _flat_ids(tokens, None), plan, loss, chunk_rows, torch.is_grad_enabled()
    )
    return total, _stats(who, fields, check)


def _stats(who: str, fields: Iterable[Tensor], check: bool) -> TokenStats:
    stats = TokenStats(*fields)
    if check:
        check_rows(who, stats)
    return stats


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _plan(
    who: str, hidden: Tensor, head: Head, logits: torch.dtype | None, tile_bytes: int | None, implementation: str | None
) -> Plan:
    product = _product_dtype(hidden)
    logits = logits or product
    if logits != product and not (logits == torch.float32 and product.itemsize == 2):
        raise ValueError(
            f"{who}: logits_dtype is {logits} for a product of {product}; expected None, {product}, or torch.float32 "
            "with a product of 16 bits"
        )
    check_head(who, head, logits)
    return Plan(engine_for(hidden.device, logits, implementation), head, product, logits, tile_bytes)


def _checked_head(
    who: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab_size: int | None, tokens: Tensor,
    mask: Tensor | None, check: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Weights and bias of the first `vocab_size` tokens, if they fit the rest."""
    if check:
        check_factors(who, hidden, weight, bias, vocab_size, tokens, mask)
    if vocab_size is None or vocab_size == len(weight):
        return weight, bias
    return weight[:vocab_size], None if bias is None else bias[:vocab_size]


def _flat_ids(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Token ids (N,), with 0 where the mask is False and any id may stand, -100 for example."""
    ids = tokens.long()
    return (ids if mask is None else ids.where(mask, 0)).reshape(-1).contiguous()
