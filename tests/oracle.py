"""Statistics and gradients of rows of logits in 80-bit floats, from their definitions: an oracle of the tests' own."""

import numpy as np
import torch

from entropy_polarity.tokens import TokenStats

# Of the natural scale of each number. Below float32's normal numbers, 1e-38, times a distance, nothing is promised.
RELATIVE, ABSOLUTE = 1e-5, 1e-36


class Exact:
    """Rows (N, V) of logits, one sampled token each.

    1 - p_a and T are summed over the other tokens, or they would end at the last bit of these floats. That T = C - S_a
    is the same number is checked in 200 digits by tests/kernels/test_engines.py.

    A soft cap c rounds logits to a step of float32 at c, so that its tolerance grows with c / temperature from 30 up.
    Distances that are themselves no larger than such a step have no digits: with `nat` a distance below a nat counts as
    one.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        tokens: torch.Tensor,
        temperature: float = 1.0,
        softcap: float | None = None,
        nat: bool = False,
    ) -> None:
        x = np.asarray(logits.detach().cpu().double().numpy(), dtype=np.longdouble)
        self.slope, self.tolerance = np.ones_like(x) / np.longdouble(temperature), RELATIVE
        if softcap is not None:
            c = np.longdouble(softcap)
            self.slope /= np.cosh(x / c) ** 2
            x, self.tolerance = c * np.tanh(x / c), RELATIVE * max(1.0, softcap / temperature / 30)
        z = x / np.longdouble(temperature)
        rows, tokens = np.arange(len(z)), tokens.cpu().numpy()
        below = z - z.max(-1, keepdims=True)
        e = np.exp(below)
        mode_out = e.copy()
        mode_out[rows, below.argmax(-1)] = 0
        log_s = np.log1p(mode_out.sum(-1))
        d = np.where(e == 0, 0, below)  # 0 log 0 = 0
        p = e / np.exp(log_s)[:, None]
        mean = (p * d).sum(-1)
        distance = d - mean[:, None]  # log p_v + H
        others = np.ones(z.shape, dtype=bool)
        others[rows, tokens] = False
        p_a, d_a, far_a = p[rows, tokens], d[rows, tokens], distance[rows, tokens]
        not_p = (p * others).sum(-1)
        squares = (p**2 * others).sum(-1)
        self.values = {
            "logp": below[rows, tokens] - log_s,
            "entropy": log_s - mean,
            "sum_p2": squares + p_a**2,
            "sum_p2_logp": (p**2 * (d - log_s[:, None])).sum(-1),
            "sensitivity": (p**2 * distance * others).sum(-1) - p_a * not_p * far_a,
            "sampled": p_a * far_a,
            "correction": (p**2 * distance).sum(-1),
        }
        # What each is a sum of, without signs. Only for T does it decide: T crosses zero.
        self.scales = {
            **{name: abs(value) for name, value in self.values.items()},
            "sensitivity": p_a * not_p * (abs(far_a) + nat) + (p**2 * (abs(distance) + nat) * others).sum(-1),
            "sampled": p_a * (abs(d_a) + abs(mean) + nat),
            "correction": (p**2 * (abs(d) + abs(mean)[:, None] + nat)).sum(-1),
        }
        self._parts = rows, tokens, p, d, mean, distance, not_p, nat

    def gradient(self, on_logp: torch.Tensor, on_entropy: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Along the raw logits: Σ over rows of `on_logp` log p_a + `on_entropy` H; and its scale, (N, V) each."""
        rows, tokens, p, d, mean, distance, not_p, nat = self._parts
        g, h = (np.asarray(x.double().numpy(), dtype=np.longdouble)[:, None] for x in (on_logp, on_entropy))
        e_a_minus_p = -p
        e_a_minus_p[rows, tokens] = not_p
        value = g * e_a_minus_p - h * p * distance
        scale = abs(g * e_a_minus_p) + abs(h) * p * (abs(d) + abs(mean)[:, None] + nat)
        return value * self.slope, scale * self.slope * (self.tolerance / RELATIVE)


def assert_accurate(stats: TokenStats, exact: Exact, names: list[str] | None = None) -> None:
    """Every statistic of every row is right, and no number is one that a distribution cannot have."""
    for field, got in zip(TokenStats._fields, stats, strict=True):
        got, value = got.detach().cpu().double().numpy(), exact.values[field]
        infinite = np.isinf(value)
        with np.errstate(invalid="ignore"):
            wrong = ~(abs(got - value) <= exact.tolerance * exact.scales[field] + ABSOLUTE)  # NaN is wrong too
        wrong = np.where(infinite, got != value, wrong)
        told = {i if names is None else names[i]: (got[i], float(value[i])) for i in wrong.nonzero()[0]}
        assert not told, f"{field}, (is, should be): {told}"
    assert (stats.entropy >= 0).all()
    assert (stats.logp <= 0).all()


def assert_gradient(got: torch.Tensor, value: np.ndarray, scale: np.ndarray, names: list[str] | None = None) -> None:
    """Every number of the gradient is right, relative to the terms it is a sum of."""
    got = got.detach().cpu().double().numpy()
    wrong = ~(abs(got - value) <= 2 * RELATIVE * scale + ABSOLUTE)
    told = {}
    for i, v in zip(*wrong.nonzero(), strict=True):
        told[i if names is None else names[i], int(v)] = got[i, v], float(value[i, v])
    assert not told, f"gradient, (is, should be): {told}"
