"""From logits to statistics as an autograd function, on any engine."""

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from entropy_polarity.kernels.engine import Engine, Tile
from entropy_polarity.kernels.state import MAXIMUM, Head, empty_state, gradient_coefficients, separate_fields


def _tiles(
    logits: Tensor, tokens: Tensor, mask: Tensor | None, head: Head, engine: Engine
) -> Iterator[tuple[slice, Tile]]:
    """Tiles of whole rows that cover all rows in order, and the rows they cover. A slice like logits[:, :-1] is no
    matrix, and making it one would copy every row: its batches are tiles of their own where the engine does not take
    them strided."""

    def views(part: Tensor) -> Iterator[Tensor]:
        try:
            yield part.view(prod(part.shape[:-1]), part.shape[-1])
        except RuntimeError:
            if engine.strided_batches and part.dim() == 3:
                yield part
            else:
                for piece in part:
                    yield from views(piece)

    start = 0
    for view in views(logits):
        rows = slice(start, start + view[..., 0].numel())
        yield rows, Tile(view, tokens[rows], head, mask=None if mask is None else mask[rows])
        start = rows.stop


class LogitsStats(torch.autograd.Function):
    """(logits (..., V), tokens (N,), mask (N,) or None) -> the fields of TokenStats, (N,) each. log p_a carries a
    gradient, and so does H where `entropy` is True. Only the first `width` logits count."""

    @staticmethod
    def forward(
        ctx, logits: Tensor, tokens: Tensor, mask: Tensor | None, width: int, head: Head, engine: Engine, entropy: bool
    ):
        ctx.set_materialize_grads(False)
        state, stats = empty_state(len(tokens), logits.dtype, logits.device)
        for rows, tile in _tiles(logits[..., :width], tokens, mask, head, engine):
            engine.statistics(tile, state[:, rows], stats[:, rows])
        ctx.save_for_backward(logits, tokens, mask, state)
        ctx.width, ctx.head, ctx.engine = width, head, engine
        return separate_fields(ctx, stats, 2 if entropy else 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, grad_entropy, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, tokens, mask, state = ctx.saved_tensors
        coefficients = gradient_coefficients(state, ctx.head, grad_logp, grad_entropy)
        grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        grad[..., ctx.width :] = 0
        rows_of_grad = grad.view(len(tokens), logits.shape[-1])[:, : ctx.width]
        for rows, tile in _tiles(logits[..., : ctx.width], tokens, mask, ctx.head, ctx.engine):
            ctx.engine.gradient(tile, state[MAXIMUM, rows], coefficients[:, rows], rows_of_grad[rows])
        return grad, None, None, None, None, None, None
