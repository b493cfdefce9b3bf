"""Hidden states -> statistics without ever holding their logits, on any engine.

Logits are made a tile at a time by one matrix product into a buffer that is used again, and folded. Three ways back:

recompute   the backward makes every tile again: 4 products in all (forward, logits, two gradients);
frozen      a head that needs no gradient: along the hidden state, ∂log p_a/∂h = W_a - E_p[W] does not depend on the
            loss, so the forward collects it while the tile is there: 2 products;
callback    the loss is a sum over tokens that a function of the caller gives for each chunk of rows: its derivative is
            known while the chunk's logits are there: 3 products (`LinearLoss`).

Gradients are summed in float32 (float64 for float64), whatever the type of the product.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from entropy_polarity.kernels.dispatch import Engine, spans
from entropy_polarity.kernels.state import (
    AT_TOKEN,
    MAXIMUM,
    Head,
    R,
    empty_state,
    gradient_coefficients,
)
from entropy_polarity.maths import LOWEST
from entropy_polarity.tokens import TokenStats


class Plan(NamedTuple):
    """How the logits of a head are made: on which engine, in which types, in tiles of how many bytes."""

    engine: Engine
    head: Head
    product: torch.dtype  # of the factors
    logits: torch.dtype  # of the tiles
    tile_bytes: int | None


def _multiply(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = hidden @ weight.T + bias, rounded only to the type of `out`."""
    if out.dtype == hidden.dtype:
        if bias is None:
            torch.mm(hidden, weight.t(), out=out)
        else:
            torch.addmm(bias, hidden, weight.t(), out=out)
        return
    if hidden.device.type == "cuda":
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:
        torch.mm(hidden.to(out.dtype), weight.to(out.dtype).t(), out=out)
    if bias is not None:
        out += bias


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool = False) -> None:
    """total += a @ b without rounding the product to the type of its factors; total = a @ b where it is the `first`."""
    if a.dtype != total.dtype and total.device.type != "cuda":
        a = a.to(total.dtype)
    b = b.to(a.dtype)
    kwargs: Any = {} if a.dtype == total.dtype else {"out_dtype": total.dtype}
    if first:
        torch.mm(a, b, **kwargs, out=total)
    else:
        torch.addmm(total, a, b, **kwargs, out=total)


class _Factors:
    """Hidden states and head in the product's type, and a buffer for the tiles they make. The last piece of the head
    that was cast is kept."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, height: int, width: int):
        self.hidden, self.weight, self.bias, self.plan = hidden, weight, bias, plan
        self.buffer = torch.empty(height * width, dtype=plan.logits, device=hidden.device)
        self._piece, self._columns = slice(0, 0), weight

    def rows(self, part: slice) -> Tensor:
        return self.hidden[part].to(self.plan.product)

    def columns(self, piece: slice) -> Tensor:
        if self._piece != piece:
            self._piece, self._columns = piece, self.weight[piece].to(self.plan.product)
        return self._columns

    def tile(self, part: slice, piece: slice) -> Tensor:
        shape = part.stop - part.start, piece.stop - piece.start
        tile = self.buffer[: shape[0] * shape[1]].view(shape)
        bias = None if self.bias is None else self.bias[piece].to(self.plan.product)
        _multiply(self.rows(part), self.columns(piece), bias, tile)
        return tile


class LinearStats(torch.autograd.Function):
    """(hidden (N, D), weight (V, D), bias (V,) or None, tokens (N,)) -> log p_a, H and the rest of TokenStats."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        plan: Plan,
        entropy: bool,
        frozen: bool,
    ):
        ctx.set_materialize_grads(False)
        engine, head = plan.engine, plan.head
        rows, vocabulary = len(hidden), len(weight)
        state, columns = empty_state(rows, plan.logits, hidden.device)
        height, width = engine.product_tile(rows, vocabulary, plan.logits.itemsize, plan.tile_bytes)
        factors = _Factors(hidden, weight, bias, plan, height, width)
        pull = torch.zeros(hidden.shape, dtype=state.dtype, device=hidden.device) if frozen else None
        for part in spans(rows, height):
            for piece in spans(vocabulary, width):
                tile = factors.tile(part, piece)
                before = state[MAXIMUM, part].clone() if frozen else None
                last = columns[:, part] if piece.stop == vocabulary else None
                engine.fold(tile, tokens[part], piece.start, head, state[:, part], last, keep=frozen)
                if pull is not None and before is not None:
                    _collect(pull[part], tile, tokens[part], piece.start, plan, before, state[MAXIMUM, part], factors)
        if pull is not None:
            pull = _pull_on_logp(pull, state, weight, tokens, plan)
            ctx.save_for_backward(pull)
        else:
            ctx.save_for_backward(hidden, weight, bias, tokens, state)
        ctx.plan, ctx.frozen, ctx.hidden_dtype = plan, frozen, hidden.dtype
        fields = tuple(column.clone() for column in columns)
        ctx.mark_non_differentiable(*fields[2 if entropy else 1 :])
        return fields

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, grad_entropy, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.frozen:
            (pull,) = ctx.saved_tensors
            if grad_logp is None:
                return (None,) * 7
            return (pull * grad_logp[:, None]).to(ctx.hidden_dtype), *[None] * 6
        hidden, weight, bias, tokens, state = ctx.saved_tensors
        coefficients = gradient_coefficients(state, ctx.plan.head, grad_logp, grad_entropy)
        needs = ctx.needs_input_grad[:3]
        return *_recompute(hidden, weight, bias, tokens, state[MAXIMUM], coefficients, ctx.plan, needs), *[None] * 4


def _collect(pull, tile, tokens, start, plan: Plan, before, maximum, factors: _Factors) -> None:
    """Σ_{v≠a} e^{d_v} W_v over one more tile, measured from a maximum that may have risen since."""
    shift = plan.head.below(before, maximum).masked_fill_(before == -torch.inf, LOWEST)
    pull *= shift.clamp_(min=LOWEST).exp_()[:, None]
    one_zero_zero = torch.zeros(3, len(pull), dtype=pull.dtype, device=pull.device)
    one_zero_zero[0] = 1
    finite = maximum.clamp(min=torch.finfo(maximum.dtype).min)  # as long as a row is all -inf: e = 0, not NaN
    exponentials = _gradient_of(tile, tokens, start, plan, finite, one_zero_zero)
    _add_product(pull, exponentials, factors.columns(slice(start, start + tile.shape[1])))


def _pull_on_logp(pull: Tensor, state: Tensor, weight: Tensor, tokens: Tensor, plan: Plan) -> Tensor:
    """∂log p_a/∂h = slope [(1 - p_a) bend_a W_a - Σ_{v≠a} p_v bend_v W_v], with no cancellation where p_a is near 1."""
    head = plan.head
    ones = torch.ones_like(state[R])
    _, _, not_p = gradient_coefficients(state, head, ones, None)  # slope (1 - p_a)
    if head.softcap is not None:
        not_p = not_p * head.bend(state[AT_TOKEN])
    pull *= (-head.slope / (1 + state[R]))[:, None]
    for part in spans(len(tokens), 4096):
        pull[part] += not_p[part, None] * weight[tokens[part]].to(plan.product).to(pull.dtype)
    return pull


def _gradient_of(tile, tokens, start, plan: Plan, maximum, coefficients) -> Tensor:
    """The gradient along a tile, in its place if it can be: as a factor of the next products.

    On a GPU that is the type of the first product, on a CPU float32: 16-bit products gain nothing there.
    """
    dtype = plan.product if tile.device.type == "cuda" else maximum.dtype
    out = tile if tile.dtype == dtype else torch.empty_like(tile, dtype=dtype)
    plan.engine.gradient(tile, tokens, None, start, plan.head, maximum, coefficients, out)
    return out


def _recompute(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    maximum: Tensor,
    coefficients: Tensor,
    plan: Plan,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients by tiles made again: columns outside, so that one tile's float32 sum is all that dW needs."""
    rows, vocabulary = len(hidden), len(weight)
    height, width = plan.engine.product_tile(rows, vocabulary, plan.logits.itemsize, plan.tile_bytes)
    factors = _Factors(hidden, weight, bias, plan, height, width)
    chunks, pieces = spans(rows, height), spans(vocabulary, width)
    grad_hidden = torch.zeros(hidden.shape, dtype=maximum.dtype, device=hidden.device) if needs[0] else None
    new = torch.empty_like if chunks else torch.zeros_like
    grad_weight = new(weight) if needs[1] else None
    grad_bias = new(bias) if bias is not None and needs[2] else None
    for piece in pieces:
        of_columns, of_bias = None, torch.zeros((), device=hidden.device)
        if grad_weight is not None:
            # One product of a GPU rounds once; a sum of several is kept in float32 until it is whole.
            alone = len(chunks) == 1 and weight.dtype == plan.product and weight.device.type == "cuda"
            exact = alone or weight.dtype == maximum.dtype
            of_columns = grad_weight[piece] if exact else torch.empty_like(weight[piece], dtype=maximum.dtype)
        for part in chunks:
            tile = factors.tile(part, piece)
            gradient = _gradient_of(tile, tokens[part], piece.start, plan, maximum[part], coefficients[:, part])
            if grad_hidden is not None:
                _add_product(grad_hidden[part], gradient, factors.columns(piece))
            if of_columns is not None:
                _add_product(of_columns, gradient.t(), factors.rows(part), first=part.start == 0)
            if grad_bias is not None:
                of_bias = of_bias + gradient.sum(0, dtype=maximum.dtype)
        if grad_weight is not None and of_columns is not None and of_columns.dtype != weight.dtype:
            grad_weight[piece] = of_columns
        if grad_bias is not None:
            grad_bias[piece] = of_bias
    return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias


def _value_and_gradient(
    loss: Callable[[TokenStats, slice], Tensor], columns: Tensor, part: slice, needed: bool
) -> tuple[Tensor, Tensor | None]:
    """A chunk's share of the loss, and its derivatives (2, n) along log p_a and H, if needed."""
    with torch.enable_grad() if needed else torch.no_grad():
        live = columns[:2, part].detach().clone().requires_grad_(needed)
        value = loss(TokenStats(*live.unbind(), *columns[2:, part].unbind()), part)
        if value.dim() != 0 or (needed and not value.requires_grad):
            raise ValueError(
                f"linear_token_loss: the loss of rows {part.start}:{part.stop} has shape {tuple(value.shape)}"
                f"{'' if value.requires_grad else ' and no gradient'}; expected one number made from stats.logp"
            )
    return value.detach(), torch.autograd.grad(value, live)[0] if needed else None


class LinearLoss(torch.autograd.Function):
    """(hidden, weight, bias, tokens) -> the summed loss, and TokenStats without gradient.

    Every gradient is made in the forward, a chunk of whole rows at a time, from the whole head in the product's type.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        plan: Plan,
        loss: Callable[[TokenStats, slice], Tensor],
        chunk_rows: int,
        grad_enabled: bool,
    ):
        engine, head = plan.engine, plan.head
        needs = tuple(grad_enabled and needed for needed in ctx.needs_input_grad[:3])
        rows, vocabulary = len(hidden), len(weight)
        state, columns = empty_state(rows, plan.logits, hidden.device)
        factors = _Factors(hidden, weight, bias, plan, min(rows, chunk_rows), vocabulary)
        total = torch.zeros((), dtype=state.dtype, device=state.device)

        new = torch.empty_like if rows else torch.zeros_like
        grad_hidden = new(hidden) if needs[0] else None
        grad_weight = new(weight, dtype=state.dtype) if needs[1] else None
        grad_bias = torch.zeros_like(bias, dtype=state.dtype) if bias is not None and needs[2] else None
        whole = slice(0, vocabulary)
        for part in spans(rows, chunk_rows):
            tile = factors.tile(part, whole)
            engine.statistics(tile, tokens[part], None, head, state[:, part], columns[:, part])
            value, grad = _value_and_gradient(loss, columns, part, any(needs))
            total += value
            if grad is None:
                continue
            coefficients = gradient_coefficients(state[:, part], head, *grad)
            gradient = _gradient_of(tile, tokens[part], 0, plan, state[MAXIMUM, part], coefficients)
            first = part.start == 0
            if grad_hidden is not None:
                product = torch.empty(grad_hidden[part].shape, dtype=state.dtype, device=state.device)
                _add_product(product, gradient, factors.columns(whole), first=True)
                grad_hidden[part] = product
            if grad_weight is not None:
                _add_product(grad_weight, gradient.t(), factors.rows(part), first)
            if grad_bias is not None:
                grad_bias += gradient.sum(0, dtype=state.dtype)
        ctx.gradients = grad_hidden, grad_weight, grad_bias
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        fields = tuple(column.clone() for column in columns)
        ctx.mark_non_differentiable(*fields)
        return total, *fields

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.gradients is None:
            raise RuntimeError("linear_token_loss: its gradients were used by an earlier backward; call it again")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (
            None if gradient is None else gradient.mul_(grad_total).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return *scaled, *[None] * 5
