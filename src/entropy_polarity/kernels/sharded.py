"""Statistics of a vocabulary that is spread over processes: each folds its slice and sends six numbers per row."""

import torch
import torch.distributed as dist
from jaxtyping import Float, Integer
from torch import Tensor

from entropy_polarity.kernels.checks import check_head
from entropy_polarity.kernels.dispatch import engine_for
from entropy_polarity.kernels.engine import Tile
from entropy_polarity.kernels.state import Head, empty_state, finish, merge
from entropy_polarity.tokens import TokenStats


@torch.no_grad()
def sharded_token_stats(
    logits: Float[Tensor, "*N W"],
    tokens: Integer[Tensor, "*N"],
    group: dist.ProcessGroup,
    *,
    temperature: float = 1.0,
    implementation: str | None = None,
) -> TokenStats:
    """`token_stats` of vocabulary-parallel logits: every process of `group` gets those of the whole vocabulary.

    `logits` (..., W) are this process's vocabulary slice, W tokens on each process in the order of the ranks, `tokens`
    (...) ids of the whole vocabulary, the same on all processes. 24 bytes per row and process are gathered; there is no
    gradient. Rows with NaN or +inf give NaN. Raises ValueError for a temperature as `token_stats` does. Source: ours.
    """
    rows, head = logits.reshape(-1, logits.shape[-1]), Head(temperature)
    check_head("sharded_token_stats", head, logits.dtype)
    state, _ = empty_state(len(rows), logits.dtype, logits.device)
    tile = Tile(rows, tokens.reshape(-1).long(), head, start=dist.get_rank(group) * rows.shape[1])
    engine_for(logits.device, logits.dtype, implementation).fold(tile, state, None, keep=True)
    parts = [torch.empty_like(state) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, state, group)
    fields = finish(merge(torch.stack(parts), head), head)
    return TokenStats(*(field.reshape(tokens.shape) for field in fields))
