"""Logits -> statistics as an autograd function, on any engine."""

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from entropy_polarity.kernels.dispatch import Engine
from entropy_polarity.kernels.state import MAXIMUM, Head, empty_state, gradient_coefficients


def blocks(logits: Tensor, batches: bool) -> Iterator[tuple[slice, Tensor]]:
    """Views (n, V), or (b, t, V) where `batches` may be strided, that cover the states in order, and their places.

    A slice like logits[:, :-1] is no matrix; making it one would copy every row.
    """

    def views(part: Tensor) -> Iterator[Tensor]:
        try:
            yield part.view(prod(part.shape[:-1]), part.shape[-1])
        except RuntimeError:
            if batches and part.dim() == 3:
                yield part
            else:
                for piece in part:
                    yield from views(piece)

    start = 0
    for view in views(logits):
        stop = start + view[..., 0].numel()
        yield slice(start, stop), view
        start = stop


class LogitsStats(torch.autograd.Function):
    """(logits (..., V), tokens (N,), mask (N,) or None) -> log p_a, H and the other fields of TokenStats, (N,) each."""

    @staticmethod
    def forward(
        ctx, logits: Tensor, tokens: Tensor, mask: Tensor | None, width: int, head: Head, engine: Engine, entropy: bool
    ):
        ctx.set_materialize_grads(False)
        state, columns = empty_state(len(tokens), logits.dtype, logits.device)
        for rows, block in blocks(logits[..., :width], engine.strided_batches):
            kept = None if mask is None else mask[rows]
            engine.statistics(block, tokens[rows], kept, head, state[:, rows], columns[:, rows])
        ctx.save_for_backward(logits, tokens, mask, state)
        ctx.width, ctx.head, ctx.engine = width, head, engine
        fields = tuple(column.clone() for column in columns)  # views of one tensor could not be changed in place
        ctx.mark_non_differentiable(*fields[2 if entropy else 1 :])
        return fields

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, grad_entropy, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, tokens, mask, state = ctx.saved_tensors
        coefficients = gradient_coefficients(state, ctx.head, grad_logp, grad_entropy)
        grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        grad[..., ctx.width :] = 0
        rows_of_grad = grad.view(len(tokens), logits.shape[-1])[:, : ctx.width]
        for rows, block in blocks(logits[..., : ctx.width], ctx.engine.strided_batches):
            ctx.engine.gradient(
                block,
                tokens[rows],
                None if mask is None else mask[rows],
                0,
                ctx.head,
                state[MAXIMUM, rows],
                coefficients[:, rows],
                rows_of_grad[rows],
            )
        return grad, None, None, None, None, None, None
