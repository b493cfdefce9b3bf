"""The asymmetry of entropy polarity: which tokens contract the entropy when reinforced, and where the border lies.

The abstract (arXiv 2605.11775) says that reinforcing a probable token contracts the entropy, and that expansion needs
rare tokens or a stronger correction. In T = C - p_a (log p_a + H) this reads: S(p) = p (log p + H) is negative below
e^{-H} and grows above it, and C >= 0. So a state with C and H has one threshold p* >= e^{-H}, with T > 0 for p_a < p*
and T < 0 above. All functions take plain arrays, in nats. Source: the statement is the paper's, the rest ours.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

DECILES = 10


def threshold(entropy: Float[np.ndarray, "*N"], correction: Float[np.ndarray, "*N"]) -> Float[np.ndarray, "*N"]:
    """p*, the probability at which T changes sign: the solution of p (log p + H) = C with p >= e^{-H}.

        p* = e^{W - H},    W e^W = C e^H,    W >= 0

    (u = log p + H turns the equation into u e^u = C e^H; W is Lambert's function, found here by Newton's method.) Where
    p* is above 1, no token of that state contracts it. Raises ValueError for negative C.

    >>> threshold(np.log([4.0]), np.zeros(1)).round(6)
    array([0.25])
    """
    entropy, correction = np.asarray(entropy, dtype=float), np.asarray(correction, dtype=float)
    if (correction < 0).any():
        raise ValueError(f"threshold: the correction is {correction.min()}; C is never negative")
    right = correction * np.exp(entropy)
    w = np.log1p(right)  # at or above the solution for every right side
    for _ in range(50):
        step = (w - right * np.exp(-w)) / (1 + w)
        w = w - step
        if np.all(np.abs(step) <= 1e-15 * (1 + w)):
            break
    return np.asarray(np.exp(w - entropy))


def by_probability(
    p: Float[np.ndarray, " N"],
    advantages: Float[np.ndarray, " N"],
    sensitivity: Float[np.ndarray, " N"],
    change: Float[np.ndarray, " N"] | None = None,
) -> list[dict[str, Any]]:
    """The polarity of each tenth of the tokens, from the rarest to the most probable: one row per tenth and sign of A.

    from, to      the lowest and the highest p_a of the tenth; tenths are by rank, and many tokens may have p_a = 1
    share         the row's share of all tokens with A ≠ 0
    contracting   share of the row's tokens with P = A T < 0
    expansion, contraction   the row's share of Σ|P| over all tokens, by the sign of P
    change        mean change of the row's own states where `change` is given, in nats

    Tokens with A = 0 are left out. `advantages` may be any factor on ∇ log π with the sign of A.
    """
    moved = advantages != 0
    p, advantages, sensitivity = p[moved], advantages[moved], sensitivity[moved]
    polarity = advantages * sensitivity
    total, rows = np.abs(polarity).sum(), []
    for tenth in np.array_split(np.argsort(p, kind="stable"), DECILES):
        for sign, name in ((1, "positive"), (-1, "negative")):
            chosen = tenth[np.sign(advantages[tenth]) == sign]
            part = polarity[chosen]
            row = {
                "from": float(p[tenth[0]]) if len(tenth) else 0.0,
                "to": float(p[tenth[-1]]) if len(tenth) else 0.0,
                "advantage": name,
                "share": _ratio(len(chosen), len(p)),
                "contracting": _ratio((part < 0).sum(), len(chosen)),
                "expansion": _ratio(part[part > 0].sum(), total),
                "contraction": _ratio(abs(part[part < 0].sum()), total),
            }
            rows.append(row | ({} if change is None else {"change": _ratio(change[moved][chosen].sum(), len(chosen))}))
    return rows


def _ratio(part: Any, whole: Any) -> float:
    return float(part / whole) if whole else 0.0


def family_sensitivity(
    p: Float[np.ndarray, "*N"], entropy: Float[np.ndarray, "*N"], vocabulary: int, tail: str = "zipf"
) -> Float[np.ndarray, "*N"]:
    """T of a token with probability p at a state of that entropy, the other tokens being of one family.

    p and H alone do not fix T, since C depends on the other tokens too. They have probabilities (1 - p) r with

        "even"   r = 1/m on m of them            "zipf"   r_i ∝ i^-s, i = 1 ... V - 1

    and m or s such that the entropy is H = h(p) + (1 - p) H(r), h(p) the binary entropy. NaN where no such distribution
    exists: H is too low or too high for p. Raises ValueError for another `tail`, or a vocabulary below 3. Source: ours.

    >>> family_sensitivity(np.array([0.9, 0.01]), np.array([0.5, 0.5]), vocabulary=32).round(4)
    array([-0.0441,  0.3226])
    """
    if tail not in _TAILS or vocabulary < 3:
        raise ValueError(
            f"family_sensitivity: tail={tail!r}, vocabulary={vocabulary}; expected {' or '.join(_TAILS)}, and 3 or more"
        )
    p, entropy = np.asarray(p, dtype=float), np.asarray(entropy, dtype=float)
    rest = 1 - p
    own = -p * np.log(p) - rest * np.log(rest)
    wanted = (entropy - own) / rest
    curve, square, square_log = _TAILS[tail](vocabulary - 1)  # by H(r), rising
    inside = (wanted >= curve[0]) & (wanted <= curve[-1])
    r2, r2_log = (np.interp(wanted, curve, column) for column in (square, square_log))
    others = rest**2 * (r2_log + r2 * (np.log(rest) + entropy))
    sampled = p * (np.log(p) + entropy)
    return np.where(inside, others - rest * sampled, np.nan)


def _even(others: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """H(r), Σ r² and Σ r² log r for r even on m tokens, m from 1 to all of them."""
    curve = np.linspace(0, np.log(others), 2000)
    return curve, np.exp(-curve), -curve * np.exp(-curve)


def _zipf(others: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same for r_i ∝ i^-s, with s from so steep that one token has all the mass down to 0. High ranks are taken in
    blocks so narrow that i^-s is a straight line in them: a long vocabulary costs no more."""
    edges = np.unique(np.geomspace(1, others + 1, 4000).astype(int))
    count, log_rank = np.diff(edges), np.log((edges[1:] + edges[:-1] - 1) / 2)
    points = []
    for s in np.concatenate([np.geomspace(40, 1e-3, 1500), [0.0]]):
        log_r = -s * log_rank
        log_r -= np.log(count @ np.exp(log_r))
        r = np.exp(log_r)
        points.append((-((count * r) @ log_r), (count * r) @ r, (count * r * r) @ log_r))
    curve, square, square_log = np.array(points).T
    return curve, square, square_log


_TAILS = {"even": _even, "zipf": _zipf}
