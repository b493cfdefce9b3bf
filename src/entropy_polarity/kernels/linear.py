"""From hidden states to statistics without ever holding their logits, on any engine.

Each tile of logits is made by one matrix product into a buffer that is used again, and folded. Three ways back:

recompute   the backward makes every tile again: 4 products in all (forward, logits, two gradients);
frozen      the head needs no gradient: along the hidden state, ∂log p_a/∂h = W_a - E_p[W] does not depend on the loss,
            so the forward collects it while the tile is there: 2 products;
callback    the loss is a sum over tokens that a function of the caller gives for each chunk of rows: its derivative is
            known while the chunk's logits are there: 3 products (`LinearLoss`).

Gradients are summed in float32 (float64 for float64), whatever the type of the product.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from entropy_polarity.kernels.engine import Engine, Tile, spans
from entropy_polarity.kernels.state import (
    AT_TOKEN,
    MAXIMUM,
    Head,
    R,
    empty_state,
    gradient_coefficients,
    separate_fields,
)
from entropy_polarity.maths import LOWEST
from entropy_polarity.tokens import TokenStats


class Plan(NamedTuple):
    """How the logits of an output head are made: on which engine, in which types, in tiles of how many bytes."""

    engine: Engine
    head: Head
    product: torch.dtype  # the type of the factors
    logits: torch.dtype  # the type of the tiles
    tile_bytes: int | None


def _multiply(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = hidden @ weight.T + bias, rounded only to the type of `out`."""
    if out.dtype == hidden.dtype and bias is not None:
        torch.addmm(bias, hidden, weight.t(), out=out)
        return
    if out.dtype != hidden.dtype and hidden.device.type == "cuda":
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:
        torch.mm(hidden.to(out.dtype), weight.to(out.dtype).t(), out=out)
    if bias is not None:
        out += bias


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool = False) -> None:
    """total += a @ b without rounding the product to the type of its factors; total = a @ b for the `first` product."""
    if a.dtype != total.dtype and total.device.type != "cuda":
        a = a.to(total.dtype)
    b = b.to(a.dtype)
    kwargs: Any = {} if a.dtype == total.dtype else {"out_dtype": total.dtype}
    if first:
        torch.mm(a, b, **kwargs, out=total)
    else:
        torch.addmm(total, a, b, **kwargs, out=total)


class _Factors:
    """The factors of the logits, in the product's type, and a buffer for the tiles that they make: the engine's, or
    chunks of whole rows. The last slice of the weights that was cast is kept."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, plan: Plan,
        chunk_rows: int | None = None,
    ) -> None:  # fmt: skip
        self.hidden, self.weight, self.bias, self.tokens, self.plan = hidden, weight, bias, tokens, plan
        height, width = chunk_rows, len(weight)
        if height is None:
            height, width = plan.engine.product_tile(len(hidden), width, plan.logits.itemsize, plan.tile_bytes)
        self.row_slices, self.vocabulary_slices = spans(len(hidden), height), spans(len(weight), width)
        self.buffer = torch.empty(height * width, dtype=plan.logits, device=hidden.device)
        self._slice, self._weights = slice(0, 0), weight

    def states(self, rows: slice) -> Tensor:
        return self.hidden[rows].to(self.plan.product)

    def weights(self, ids: slice) -> Tensor:
        if self._slice != ids:
            self._slice, self._weights = ids, self.weight[ids].to(self.plan.product)
        return self._weights

    def tile(self, rows: slice, ids: slice) -> Tile:
        shape = rows.stop - rows.start, ids.stop - ids.start
        logits = self.buffer[: shape[0] * shape[1]].view(shape)
        bias = None if self.bias is None else self.bias[ids].to(self.plan.product)
        _multiply(self.states(rows), self.weights(ids), bias, logits)
        return Tile(logits, self.tokens[rows], self.plan.head, ids.start)


class LinearStats(torch.autograd.Function):
    """(hidden (N, D), weight (V, D), bias (V,) or None, tokens (N,)) -> the fields of TokenStats, (N,) each. log p_a
    carries a gradient, and so does H where `entropy` is True; a `frozen` head gets none."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor,
        plan: Plan, entropy: bool, frozen: bool,
    ):  # fmt: skip
        ctx.set_materialize_grads(False)
        state, stats = empty_state(len(hidden), plan.logits, hidden.device)
        factors = _Factors(hidden, weight, bias, tokens, plan)
        pull = torch.zeros(hidden.shape, dtype=state.dtype, device=hidden.device) if frozen else None
        for rows in factors.row_slices:
            for ids in factors.vocabulary_slices:
                tile = factors.tile(rows, ids)
                before = state[MAXIMUM, rows].clone() if frozen else None
                last = stats[:, rows] if ids.stop == len(weight) else None
                plan.engine.fold(tile, state[:, rows], last, keep=frozen)
                if pull is not None and before is not None:
                    _collect(pull[rows], tile, before, state[MAXIMUM, rows], factors)
        if pull is not None:
            ctx.save_for_backward(_pull_on_logp(pull, state, weight, tokens, plan))
        else:
            ctx.save_for_backward(hidden, weight, bias, tokens, state)
        ctx.plan, ctx.frozen, ctx.hidden_dtype = plan, frozen, hidden.dtype
        return separate_fields(ctx, stats, 2 if entropy else 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, grad_entropy, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.frozen:
            (pull,) = ctx.saved_tensors
            grad = None if grad_logp is None else (pull * grad_logp[:, None]).to(ctx.hidden_dtype)
            return grad, *[None] * 6
        hidden, weight, bias, tokens, state = ctx.saved_tensors
        coefficients = gradient_coefficients(state, ctx.plan.head, grad_logp, grad_entropy)
        needs = ctx.needs_input_grad[:3]
        return *_recompute(hidden, weight, bias, tokens, state[MAXIMUM], coefficients, ctx.plan, needs), *[None] * 4


def _collect(pull: Tensor, tile: Tile, before: Tensor, maximum: Tensor, factors: _Factors) -> None:
    """Σ_{v≠a} e^{d_v} W_v over one more tile, measured from a maximum that may have risen since `before`."""
    shift = tile.head.below(before, maximum).masked_fill_(before == -torch.inf, LOWEST)
    pull *= shift.clamp_(min=LOWEST).exp_()[:, None]
    one_zero_zero = torch.zeros(3, len(pull), dtype=pull.dtype, device=pull.device)
    one_zero_zero[0] = 1
    finite = maximum.clamp(min=torch.finfo(maximum.dtype).min)  # as long as a row is all -inf: e = 0, not NaN
    exponentials = _gradient_of(tile, factors.plan, finite, one_zero_zero)
    _add_product(pull, exponentials, factors.weights(slice(tile.start, tile.start + tile.logits.shape[1])))


def _pull_on_logp(pull: Tensor, state: Tensor, weight: Tensor, tokens: Tensor, plan: Plan) -> Tensor:
    """∂log p_a/∂h = slope [(1 - p_a) bend_a W_a - Σ_{v≠a} p_v bend_v W_v], with no cancellation where p_a is near 1."""
    head = plan.head
    _, _, not_p = gradient_coefficients(state, head, torch.ones_like(state[R]), None)  # slope (1 - p_a)
    if head.softcap is not None:
        not_p = not_p * head.bend(state[AT_TOKEN])
    pull *= (-head.slope / (1 + state[R]))[:, None]
    for rows in spans(len(tokens), 4096):
        pull[rows] += not_p[rows, None] * weight[tokens[rows]].to(plan.product).to(pull.dtype)
    return pull


def _gradient_of(tile: Tile, plan: Plan, maximum: Tensor, coefficients: Tensor) -> Tensor:
    """The gradient along a tile, as a factor of the next products; in place of the logits where the types allow it. On
    a GPU its type is that of the first product, on a CPU float32: 16-bit products gain nothing there."""
    dtype = plan.product if tile.logits.device.type == "cuda" else maximum.dtype
    out = tile.logits if tile.logits.dtype == dtype else torch.empty_like(tile.logits, dtype=dtype)
    plan.engine.gradient(tile, maximum, coefficients, out)
    return out


def _recompute(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, maximum: Tensor, coefficients: Tensor,
    plan: Plan, needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients from tiles that are made again, slice by slice: dW needs the float32 sum of one slice alone."""
    factors = _Factors(hidden, weight, bias, tokens, plan)
    grad_hidden = torch.zeros(hidden.shape, dtype=maximum.dtype, device=hidden.device) if needs[0] else None
    new = torch.empty_like if len(hidden) else torch.zeros_like
    grad_weight = new(weight) if needs[1] else None
    grad_bias = new(bias) if bias is not None and needs[2] else None
    for ids in factors.vocabulary_slices:
        of_weights, of_bias = None, torch.zeros((), device=hidden.device)
        if grad_weight is not None:
            # One product of a GPU rounds once; a sum of several is kept in float32 until it is whole.
            alone = len(factors.row_slices) == 1 and weight.dtype == plan.product and weight.device.type == "cuda"
            exact = alone or weight.dtype == maximum.dtype
            of_weights = grad_weight[ids] if exact else new(weight[ids], dtype=maximum.dtype)
        for rows in factors.row_slices:
            gradient = _gradient_of(factors.tile(rows, ids), plan, maximum[rows], coefficients[:, rows])
            if grad_hidden is not None:
                _add_product(grad_hidden[rows], gradient, factors.weights(ids))
            if of_weights is not None:
                _add_product(of_weights, gradient.t(), factors.states(rows), first=rows.start == 0)
            if grad_bias is not None:
                of_bias = of_bias + gradient.sum(0, dtype=maximum.dtype)
        if grad_weight is not None and of_weights is not None and of_weights.dtype != weight.dtype:
            grad_weight[ids] = of_weights
        if grad_bias is not None:
            grad_bias[ids] = of_bias
    return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias


def _value_and_gradient(
    loss: Callable[[TokenStats, slice], Tensor], stats: Tensor, rows: slice, needed: bool
) -> tuple[Tensor, Tensor | None]:
    """A chunk's share of the loss, and its derivatives (2, n) along log p_a and H, if needed."""
    with torch.set_grad_enabled(needed):
        live = stats[:2, rows].detach().clone().requires_grad_(needed)
        value = loss(TokenStats(*live.unbind(), *stats[2:, rows].unbind()), rows)
        if value.dim() != 0 or (needed and not value.requires_grad):
            raise ValueError(
                f"linear_token_loss: the loss of rows {rows.start}:{rows.stop} has shape {tuple(value.shape)}"
                f"{'' if value.requires_grad else ' and no gradient'}; expected one number made from stats.logp"
            )
    return value.detach(), torch.autograd.grad(value, live)[0] if needed else None


class LinearLoss(torch.autograd.Function):
    """(hidden, weight, bias, tokens) -> the summed loss, and the fields of TokenStats without gradient. Every gradient
    is made in the forward, a chunk of whole rows at a time, from the whole head in the product's type."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor,
        plan: Plan, loss: Callable[[TokenStats, slice], Tensor], chunk_rows: int, grad_enabled: bool,
    ):  # fmt: skip
        needs = tuple(grad_enabled and needed for needed in ctx.needs_input_grad[:3])
        state, stats = empty_state(len(hidden), plan.logits, hidden.device)
        factors = _Factors(hidden, weight, bias, tokens, plan, chunk_rows)
        total = torch.zeros((), dtype=state.dtype, device=state.device)
        new = torch.empty_like if len(hidden) else torch.zeros_like
        grad_hidden = new(hidden) if needs[0] else None
        grad_weight = new(weight, dtype=state.dtype) if needs[1] else None
        grad_bias = torch.zeros_like(bias, dtype=state.dtype) if bias is not None and needs[2] else None
        (whole,) = factors.vocabulary_slices
        for rows in factors.row_slices:
            tile = factors.tile(rows, whole)
            plan.engine.statistics(tile, state[:, rows], stats[:, rows])
            value, grad = _value_and_gradient(loss, stats, rows, any(needs))
            total += value
            if grad is None:
                continue
            coefficients = gradient_coefficients(state[:, rows], plan.head, *grad)
            gradient = _gradient_of(tile, plan, state[MAXIMUM, rows], coefficients)
            if grad_hidden is not None:
                product = torch.empty(grad_hidden[rows].shape, dtype=state.dtype, device=state.device)
                _add_product(product, gradient, factors.weights(whole), first=True)
                grad_hidden[rows] = product
            if grad_weight is not None:
                _add_product(grad_weight, gradient.t(), factors.states(rows), first=rows.start == 0)
            if grad_bias is not None:
                grad_bias += gradient.sum(0, dtype=state.dtype)
        ctx.gradients = grad_hidden, grad_weight, grad_bias
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return total, *separate_fields(ctx, stats, 0)

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
