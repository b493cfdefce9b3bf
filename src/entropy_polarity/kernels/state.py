"""What is kept of a row while its logits are folded tile by tile, and what follows from it, for every engine.

A row's logits need never be in memory together: six numbers of each tile are enough, and two sets of six make one
(`merge`). The mode (an argmax) stays out of the sums, as in `maths.stats_from_sums`. Distances below the
maximum, d = z - max z, are in nats.

The maximum and the sampled token's logit are kept as the product x gave them, before a soft cap. The cap is monotone,
so the mode is the same, and whether the sampled token is the mode never hangs on the last bit of two tanh's.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropy_polarity.maths import LOWEST, stats_from_sums
from entropy_polarity.tokens import TokenStats

# Rows of a state (6, N): the maximum of x, -inf as long as nothing was seen; Σ e^d, Σ e^d d, Σ e^2d, Σ e^2d d without
# the mode; x of the sampled token, -inf as long as it was not met. A row with NaN ends as NaN.
MAXIMUM, R, RD, Q, QD, AT_TOKEN = range(6)


class Head(NamedTuple):
    """How the product x of hidden state and weights becomes the tempered logits z = softcap(logit_scale x) /
    temperature, with softcap(y) = c tanh(y / c) for a cap c, and y itself for None."""

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def scale(self) -> float:
        """What turns a difference of two `folded` values into nats."""
        return (self.logit_scale if self.softcap is None else self.softcap) / self.temperature

    @property
    def slope(self) -> float:
        """dz/dx where the cap does not bend: what a gradient along z is multiplied by."""
        return self.logit_scale / self.temperature

    def within(self, x: Tensor) -> Tensor:
        """x, but under a cap the lowest finite number for -inf: the cap makes an ordinary logit of it."""
        return x if self.softcap is None else x.clamp(min=torch.finfo(x.dtype).min)

    def folded(self, x: Tensor) -> Tensor:
        """tanh(logit_scale x / c) for a cap c, x itself for None."""
        return x if self.softcap is None else torch.tanh(x * (self.logit_scale / self.softcap))

    def below(self, x: Tensor, maximum: Tensor) -> Tensor:
        """d in nats, the distance of x below a maximum of the same rows; exactly 0 for the maximum and its equals."""
        finite = maximum.clamp(min=torch.finfo(maximum.dtype).min)  # of a row of all -inf: e = 0, not NaN
        d = self.folded(x) - self.folded(finite)
        if self.softcap is not None:
            d.masked_fill_(x == maximum, 0.0)
        return d.mul_(self.scale)

    def bend(self, x: Tensor) -> Tensor:
        """The factor 1 - tanh² y that a cap leaves of a gradient at x, y = logit_scale x / c: 4 u / (1 + u)² with
        u = e^{-2 |y|}, since the difference would keep no digit where the cap is nearly reached."""
        assert self.softcap is not None
        u = (x.abs() * (-2 * self.logit_scale / self.softcap)).exp_()
        return 4 * u / (1 + u).square_()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which numbers of `dtype` are summed: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def empty_state(rows: int, logits: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The state (6, N) of rows of which no logit was seen yet, and memory (7, N) for their statistics."""
    dtype = accumulation_dtype(logits)
    state = torch.zeros(6, rows, dtype=dtype, device=device)
    state[MAXIMUM] = state[AT_TOKEN] = -torch.inf
    return state, torch.empty(len(TokenStats._fields), rows, dtype=dtype, device=device)


def merge(parts: Tensor, head: Head) -> Tensor:
    """One state (6, N) from the states (K, 6, N) of K disjoint parts of the same vocabularies, in any order."""
    return torch.cat([merge_sums(parts[:, :AT_TOKEN], head), parts[:, AT_TOKEN].amax(0, keepdim=True)])


def merge_sums(parts: Tensor, head: Head) -> Tensor:
    """`merge` of the first five fields, (K, 5, N) -> (5, N)."""
    maxima = parts[:, MAXIMUM]
    maximum, winner = maxima.max(0, keepdim=True)
    below = head.below(maxima, maximum).masked_fill_(maxima == -torch.inf, LOWEST).clamp_(min=LOWEST)
    weight = below.exp()
    # The modes of the other parts are ordinary tokens of the whole: e^0 = 1 each, at distance 0 from themselves.
    modes = torch.ones_like(weight).scatter_(0, winner, 0)
    r, q = parts[:, R] + modes, parts[:, Q] + modes
    rd = (parts[:, RD] + below * r) * weight
    qd = (parts[:, QD] + below * q) * weight**2
    return torch.cat([maximum, torch.stack([r * weight, rd, q * weight**2, qd], dim=1).sum(0)])


def _total(state: Tensor, head: Head) -> Tensor:
    """r, NaN for rows whose largest logit is not finite."""
    top = head.folded(state[MAXIMUM])
    return state[R] + (top - top)


def finish(state: Tensor, head: Head) -> Tensor:
    """The fields of TokenStats (7, N) of rows whose whole vocabulary was folded."""
    maximum, _, rd, q, qd, x_a = state
    return torch.stack(stats_from_sums(head.below(x_a, maximum), _total(state, head), rd, q, qd))


def separate_fields(ctx: Any, stats: Tensor, differentiable: int) -> tuple[Tensor, ...]:
    """The statistics (7, N) as an autograd function returns them: seven tensors, the first of them differentiable."""
    fields = tuple(field.clone() for field in stats)  # views of one tensor could not be changed in place
    ctx.mark_non_differentiable(*fields[differentiable:])
    return fields


def gradient_coefficients(state: Tensor, head: Head, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> Tensor:
    """Coefficients (α, β, γ), (3, N), with which the gradient along the logit x_v of a row is

        e^{d_v} (α + β d_v)  for v ≠ a,    γ for the sampled token a    (each times `Head.bend` under a soft cap).

    They follow from dlog p_a/dz_v = 1[v=a] - p_v and dH/dz_v = -p_v (log p_v + H) = -p_v (d_v - d̄). 1 - p_a comes from
    the sums, without cancellation.
    """
    r, s = state[R], 1 + _total(state, head)
    mean = state[RD] / s
    d_a = head.below(state[AT_TOKEN], state[MAXIMUM])
    is_mode = d_a == 0
    d_a = d_a.clamp(min=LOWEST)
    e_a = d_a.exp()
    g, h = (torch.zeros_like(s) if grad is None else grad.to(s.dtype) for grad in (grad_logp, grad_entropy))
    gamma = (g * torch.where(is_mode, r, s - e_a) - h * e_a * (d_a - mean)) / s
    return torch.stack([(h * mean - g) / s, -h / s, gamma]) * head.slope
