"""What is kept of a row while its logits are folded tile by tile, and what follows from it, for every engine.

A row's logits need never be in memory together: six numbers of each tile are enough, and two sets of six make one
(`merge`). The mode (an argmax) stays out of the sums, as in `polarity.stats_from_sums`; distances below the maximum,
d = (z - max z) / temperature, are in nats.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from entropy_polarity.polarity import LOWEST, stats_from_sums
from entropy_polarity.tokens import TokenStats

# Rows of a state (6, N): the maximum of z; Σ e^d, Σ e^d d, Σ e^2d, Σ e^2d d without the mode; z of the sampled token,
# -inf as long as it was not met. What is not finite stays so: a row with NaN ends as NaN.
MAXIMUM, R, RD, Q, QD, AT_TOKEN = range(6)
FIELDS = 6


class Head(NamedTuple):
    """From the product x of hidden state and weights to the tempered logits: z = softcap(logit_scale x) / temperature,

    with softcap(y) = c tanh(y / c) for a cap c, and y itself for None.
    """

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def scale(self) -> float:
        """What turns a difference of folded values into nats. They are x itself, or c tanh(logit_scale x / c)."""
        return (1.0 if self.softcap is not None else self.logit_scale) / self.temperature

    @property
    def slope(self) -> float:
        """dz/dx where the cap does not bend: what a gradient along z is multiplied by."""
        return self.logit_scale / self.temperature


def empty_state(rows: int, logits: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The state (6, N) of rows of logits of which nothing was seen yet, and room (7, N) for their statistics."""
    dtype = torch.float64 if logits == torch.float64 else torch.float32
    state = torch.zeros(FIELDS, rows, dtype=dtype, device=device)
    state[MAXIMUM] = state[AT_TOKEN] = -torch.inf
    return state, torch.empty(len(TokenStats._fields), rows, dtype=dtype, device=device)


def merge(parts: Tensor, head: Head) -> Tensor:
    """One state (6, N) from the states (K, 6, N) of K disjoint parts of the same vocabularies, in any order."""
    return torch.cat([merge_sums(parts[:, :AT_TOKEN], head), parts[:, AT_TOKEN].amax(0, keepdim=True)])


def merge_sums(parts: Tensor, head: Head) -> Tensor:
    """`merge` of the first five fields, (K, 5, N) -> (5, N)."""
    maxima = parts[:, MAXIMUM]
    maximum, winner = maxima.max(0, keepdim=True)
    below = (maxima - maximum) * head.scale
    below = below.masked_fill_(maxima == -torch.inf, LOWEST).clamp_(min=LOWEST)
    weight = below.exp()
    # The modes of the other parts are ordinary tokens of the whole: e^0 = 1 each, at distance 0 from themselves.
    modes = torch.ones_like(weight).scatter_(0, winner, 0)
    r, q = parts[:, R] + modes, parts[:, Q] + modes
    rd = (parts[:, RD] + below * r) * weight
    qd = (parts[:, QD] + below * q) * weight**2
    return torch.cat([maximum, torch.stack([r * weight, rd, q * weight**2, qd], dim=1).sum(0)])


def _sampled_distance(state: Tensor, head: Head) -> Tensor:
    return (state[AT_TOKEN] - state[MAXIMUM]) * head.scale


def finish(state: Tensor, head: Head) -> Tensor:
    """The fields of TokenStats (7, N) of rows that were folded whole."""
    maximum, r, rd, q, qd = state[:AT_TOKEN]
    r = r + (maximum - maximum)  # NaN for rows of all -inf, and for those that hold +inf
    return torch.stack(stats_from_sums(_sampled_distance(state, head), r, rd, q, qd))


def gradient_coefficients(state: Tensor, head: Head, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> Tensor:
    """Rows (α, β, γ) of N numbers each, so that the gradient along the logit x_v of a row is

        e^{d_v} (α + β d_v)  for v ≠ a,    γ for the sampled token a    (each times 1 - tanh² under a soft cap).

    From dlog p_a/dz_v = 1[v=a] - p_v and dH/dz_v = -p_v (log p_v + H) = -p_v (d_v - d̄). 1 - p_a comes from the sums,
    without cancellation.
    """
    maximum, r, rd = state[MAXIMUM], state[R], state[RD]
    s = 1 + r + (maximum - maximum)
    mean = rd / s
    d_a = _sampled_distance(state, head)
    is_mode = d_a == 0
    d_a = d_a.clamp(min=LOWEST)
    e_a = d_a.exp()
    zeros = torch.zeros_like(s)
    g = zeros if grad_logp is None else grad_logp.to(s.dtype)
    h = zeros if grad_entropy is None else grad_entropy.to(s.dtype)
    alpha = (h * mean - g) / s
    beta = -h / s
    gamma = (g * torch.where(is_mode, r, s - e_a) - h * e_a * (d_a - mean)) / s
    return torch.stack([alpha, beta, gamma]) * head.slope
