"""Intervals of a mean or a difference of means: the bootstrap over problems and seeds, Student's t over seeds."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from entropy_polarity.support.brackets import interval

LEVEL = 0.95  # the chance with which an interval should hold the truth, wherever this package gives one
DRAWS = 2000  # of a bootstrap
# The fewest problems that have an interval. Of fewer the bootstrap sees too little of their spread: of 3 its 95 %
# interval holds the mean in 72 to 76 of 100 draws, of 5 in 84, of 10 in 89 to 90, of 20 in 92 to 93
# (benchmarks/coverage.py).
LEAST = 10
UNKNOWN = (float("nan"), float("nan"))
RATE, DIFFERENCE = (0.0, 1.0), (-1.0, 1.0)  # the bounds of shares of right answers, and of differences of such shares


def bootstrap_interval(
    values: Float[np.ndarray, " P"],
    level: float = LEVEL,
    draws: int = DRAWS,
    seed: int = 0,
    within: tuple[float, float] | None = None,
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean over problems.

    NaN for fewer than `LEAST` values. Values that are all the same would draw an interval of no width: theirs is that
    of `unvaried`, with the bounds `within` which values lie. Raises ValueError for no values. Source: Efron 1979.

    >>> low, high = bootstrap_interval(np.array([0.0, 1.0] * 50))
    >>> low < 0.5 < high
    True
    """
    values = np.asarray(values, dtype=float)
    if values.size == 0:
        raise ValueError("bootstrap_interval: no values; expected one per problem")
    if len(values) < LEAST:
        return UNKNOWN
    if is_constant(values):
        return unvaried(float(values[0]), len(values), within, level)
    picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    return percentile_interval(values[picks].mean(axis=1), level)


def percentile_interval(draws: Float[np.ndarray, " D"], level: float = LEVEL) -> tuple[float, float]:
    """The interval that leaves out (1 - level) / 2 of the draws at either end; NaN without draws.

    >>> percentile_interval(np.arange(9.0), level=0.5)
    (2.0, 6.0)
    """
    if draws.size == 0:
        return UNKNOWN
    tail = (1 - level) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def is_constant(values: Float[np.ndarray, "*S P"]) -> bool:
    """Whether all values are the same up to the rounding of sums."""
    return bool(np.ptp(values) <= 1e-12 * max(1.0, float(np.abs(values).max())))


def unvaried(
    value: float, count: int, within: tuple[float, float] | None = RATE, level: float = LEVEL
) -> tuple[float, float]:
    """The interval of a mean when all of `count` values, which lie in [a, b] = `within`, were `value`.

    A share q of other values stays unseen with a chance of (1 - q)^count, so that q can be up to

        q = 1 - ((1 - level) / 2)^(1 / count)        value - q (value - a)  <=  mean  <=  value + q (b - value)

    For successes it is the exact binomial interval. NaN without bounds: nothing is known of unseen values.
    Source: Clopper and Pearson 1934.

    >>> [round(bound, 3) for bound in unvaried(0.0, 200)]
    [0.0, 0.018]
    """
    if within is None:
        return UNKNOWN
    unseen = 1 - ((1 - level) / 2) ** (1 / count)
    return value - unseen * (value - within[0]), value + unseen * (within[1] - value)


@dataclass(frozen=True)
class Estimate:
    """A mean, or a difference of means, with its interval, whose bounds are NaN where there is too little data."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Float[np.ndarray, "*S P"], within: tuple[float, float] | None = None) -> "Estimate":
        """The mean over problems with its bootstrap interval, or over seeds (rows) and problems as in
        `paired_bootstrap`. `within` are the bounds of the values, if they have any."""
        values = np.asarray(values, dtype=float)
        if values.ndim == 2 and len(values) > 1:
            return paired_bootstrap(values, np.zeros_like(values), within=within)
        return cls(float(np.mean(values)), *bootstrap_interval(values.reshape(-1), within=within))

    def __str__(self) -> str:
        return f"{self.value:.3f} {interval(self.low, self.high)}"


def paired_bootstrap(
    a: Float[np.ndarray, "S P"],
    b: Float[np.ndarray, "S P"],
    draws: int = DRAWS,
    level: float = LEVEL,
    seed: int = 0,
    within: tuple[float, float] | None = None,
) -> Estimate:
    """The mean of a - b over seeds and problems, with the percentile interval of a crossed bootstrap.

    Row s of both is the same seed, column p the same problem. Every draw resamples S seeds and, on its own, P
    problems, and takes both methods at the same places:

        difference* = Σ_s Σ_p u_s v_p (a_sp - b_sp)        u ~ Multinomial(S, 1/S) / S,  v ~ Multinomial(P, 1/P) / P

    so that problems hard for every seed and seeds good on every problem both count. It is wider than need be where the
    noise of single answers dominates; a handful of seeds shows it too little spread, one seed none: read it beside
    `t_interval`. NaN for fewer than `LEAST` problems. Differences that are all the same have the interval of
    `unvaried`, of P values, with the bounds `within` of a difference. Raises ValueError unless the shapes agree and
    none is empty. Source: Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 2007.

    >>> print(paired_bootstrap(np.array([[1.0, 1.0], [1.0, 1.0]]), np.array([[0.0, 0.5], [0.0, 0.5]])))
    0.750 [-]
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape or a.ndim != 2 or a.size == 0:
        raise ValueError(f"paired_bootstrap: shapes {a.shape} and {b.shape}; expected one (seeds, problems) for both")
    (S, P), rng, mean = a.shape, np.random.default_rng(seed), float((a - b).mean())
    if P < LEAST:
        return Estimate(mean, *UNKNOWN)
    if is_constant(a - b):
        return Estimate(mean, *unvaried(mean, P, within, level))
    seeds = rng.multinomial(S, np.full(S, 1 / S), size=draws) / S
    problems = rng.multinomial(P, np.full(P, 1 / P), size=draws) / P
    return Estimate(mean, *percentile_interval(((seeds @ (a - b)) * problems).sum(axis=1), level))


def t_interval(differences: Float[np.ndarray, " S"], level: float = LEVEL) -> Estimate:
    """The mean of one difference per seed, with Student's interval: mean ± t sd / √S, S - 1 degrees of freedom.

    It is about other seeds on the same problems, takes differences as normal, and holds for a handful of seeds. NaN for
    differences that are all the same, which show no spread. Raises ValueError for fewer than two. Source: Student 1908.

    >>> print(t_interval(np.array([1.0, 2.0, 3.0])))
    2.000 [-0.484, 4.484]
    """
    differences = np.asarray(differences, dtype=float)
    if len(differences) < 2:
        raise ValueError(f"t_interval: {len(differences)} differences; a spread over seeds needs at least two")
    mean, error = differences.mean(), differences.std(ddof=1) / np.sqrt(len(differences))
    if is_constant(differences):
        return Estimate(float(mean), *UNKNOWN)
    half = t_quantile(level, len(differences) - 1) * error
    return Estimate(float(mean), float(mean - half), float(mean + half))


def t_quantile(level: float, freedom: int) -> float:
    """The t with P(|T| <= t) = level, for T of Student's distribution with that many degrees of freedom.

    With θ = atan(t / √ν) the probability is a finite sum, inverted here by bisection of θ:

        ν even:  sin θ · Σ_i c_i cos^2i θ                    i < ν/2,      c_0 = 1, c_i = c_{i-1} (2i - 1) / 2i
        ν odd:   (θ + sin θ · Σ_i c_i cos^(2i+1) θ) · 2/π    i < (ν-1)/2,  c_0 = 1, c_i = c_{i-1} 2i / (2i + 1)

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4.

    >>> round(t_quantile(0.95, 2), 3)
    4.303
    """
    if not (0 < level < 1 and freedom >= 1):
        raise ValueError(f"t_quantile: level={level}, freedom={freedom}; expected 0 < level < 1 and at least 1")
    odd = freedom % 2
    i = np.arange(1, (freedom - odd) // 2)
    c = np.cumprod(np.concatenate([[1.0], (2 * i - 1 + odd) / (2 * i + odd)]))[: (freedom - odd) // 2]
    powers = 2 * np.arange(len(c)) + odd
    low, high = 0.0, np.pi / 2
    for _ in range(60):  # to the last bit of θ
        middle = (low + high) / 2
        inside = np.sin(middle) * (c * np.cos(middle) ** powers).sum()
        inside = (middle + inside) * 2 / np.pi if odd else inside
        low, high = (middle, high) if inside < level else (low, middle)
    return float(np.sqrt(freedom) * np.tan((low + high) / 2))
