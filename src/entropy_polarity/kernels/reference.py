"""The statistics as the textbook writes them, in float64: the oracle that the fast versions are tested against."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from entropy_polarity.tokens import TokenStats


def reference_token_stats(
    logits: Float[Tensor, "*N V"], tokens: Int[Tensor, "*N"], temperature: float = 1.0
) -> TokenStats:
    """`token_stats` from the definitions, in float64, with full-size intermediates and torch's own autograd.

    p = softmax(z), H = -Σ p log p, S_v = p_v (log p_v + H), C = Σ_v p_v S_v, T = C - S_a; 0 log 0 = 0.
    """
    logp = torch.log_softmax(logits.double() / temperature, dim=-1)
    p = logp.exp()
    finite_logp = logp.masked_fill(logp == -torch.inf, 0.0)  # p is 0 there, and 0 log 0 is 0
    entropy = -(p * finite_logp).sum(-1)
    contribution = p * (finite_logp + entropy[..., None])

    def at_token(x: Tensor) -> Tensor:
        return x.gather(-1, tokens[..., None]).squeeze(-1)

    sampled = at_token(contribution)
    correction = (p * contribution).sum(-1)
    sums = (p * p).sum(-1), (p * p * finite_logp).sum(-1)
    statistics = (entropy, *sums, correction - sampled, sampled, correction)
    return TokenStats(at_token(logp), *(x.detach() for x in statistics))
