"""How well a prediction agrees with the outcome: correlations, signs, the line between them, with intervals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from entropy_polarity.statistics.intervals import DRAWS, UNKNOWN, Estimate, percentile_interval, unvaried

BLOCK = 5
# The fewest whole blocks of updates, in every run, that have an interval. Of one block every draw is the sample itself,
# rotated; of two, 10 updates, the 95 % interval holds the truth in 75 of 100 simulated runs of independent updates, of
# four in 85, of eight in 91 (benchmarks/coverage.py).
LEAST_BLOCKS = 4

Columns = tuple[Float[np.ndarray, " _"], ...]
Pairs = tuple[Float[np.ndarray, " _"], Float[np.ndarray, " _"]]


@dataclass(frozen=True)
class Agreement:
    """A prediction x against the outcome y.

    pearson, spearman   correlation of the values, and of their ranks
    sign_agreement      share of pairs in which x and y have one sign
    slope, offset       y ≈ slope x + offset, by least squares; slope in nats per unit of x, offset in nats
    """

    pearson: Estimate
    spearman: Estimate
    sign_agreement: Estimate
    slope: Estimate
    offset: Estimate


def agreement_of(runs: Sequence[Pairs], *, block: int = BLOCK, draws: int = DRAWS) -> Agreement:
    """The agreement of x and y over all pairs of `runs`, each of which holds (x, y) of its updates in order.

    The intervals are those of `block_bootstrap`, NaN where a run has too few updates. Where all of the n signs agree,
    or none does, every draw gives the same share: the interval is then the binomial one of `unvaried`, which takes
    updates as independent. Raises ValueError for fewer than three updates, for x and y of different lengths, and for
    values that are not finite.

    >>> x = np.arange(20.0)
    >>> agreement_of([(x, 2 * x + 1)]).slope
    Estimate(value=2.0, low=2.0, high=2.0)
    """
    runs = [(np.asarray(x, dtype=float), np.asarray(y, dtype=float)) for x, y in runs]
    for x, y in runs:
        if x.shape != y.shape or len(x) < 3 or not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise ValueError(
                f"agreement: {len(x)} predictions and {len(y)} outcomes; expected as many of each, at least "
                "three, all finite"
            )
    found = {
        statistic.__name__: block_bootstrap(runs, statistic, block=block, draws=draws)
        for statistic in (pearson, spearman, sign_agreement, slope, offset)
    }
    signs, length = found["sign_agreement"], sum(len(x) for x, _ in runs)
    if signs.value in (0.0, 1.0) and not np.isnan(signs.low):
        found["sign_agreement"] = Estimate(signs.value, *unvaried(signs.value, length))
    return Agreement(**found)


def block_bootstrap(
    runs: Sequence[Columns], statistic: Callable[..., Any], *, block: int = BLOCK, draws: int = DRAWS
) -> Estimate:
    """`statistic` of the joined series of all runs, with a percentile interval that allows for correlated updates.

    Updates of one run are not independent draws: each draw takes runs as they are and, in each, blocks of `block`
    consecutive updates, around the end. Draws in which the statistic is not defined are left out. The interval is NaN
    with fewer than `LEAST_BLOCKS` whole blocks in one of the runs, and too short where updates are correlated for
    longer than a block: docs/theory.md has the share that hold the truth. Source: Politis and Romano, "A circular
    block-resampling procedure", 1992.
    """
    joined = [np.concatenate(column) for column in zip(*runs, strict=True)]
    value, lengths = float(statistic(*joined)), tuple(len(run[0]) for run in runs)
    if min(lengths) < LEAST_BLOCKS * block:
        return Estimate(value, *UNKNOWN)
    places = _draws(lengths, block, draws)
    drawn = statistic(*(column[places] for column in joined))
    return Estimate(value, *percentile_interval(drawn[~np.isnan(drawn)]))


def detrended(values: Float[np.ndarray, " N"], degree: int = 3) -> Float[np.ndarray, " N"]:
    """The values minus a polynomial fit in the update's number; with the trend any two curves that both fall agree.

    >>> bool(np.abs(detrended(np.arange(8.0) ** 3)).max() < 1e-9)
    True
    """
    number = np.linspace(-1, 1, len(values))
    return values - np.polynomial.Polynomial.fit(number, values, degree)(number)


def pearson(x: Float[np.ndarray, "*D N"], y: Float[np.ndarray, "*D N"]) -> Any:
    """Cov(x, y) / √(Var x Var y); NaN where one of them does not vary. As all statistics here, one number per row.

    >>> round(float(pearson(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0]))), 3)
    0.5
    """
    dx, dy = _centred(x), _centred(y)
    return _over((dx * dy).sum(-1), np.sqrt((dx * dx).sum(-1) * (dy * dy).sum(-1)))


def spearman(x: Float[np.ndarray, "*D N"], y: Float[np.ndarray, "*D N"]) -> Any:
    """`pearson` of the ranks (Spearman's correlation).

    >>> float(spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 10.0, 100.0])))
    1.0
    """
    return pearson(ranks(x), ranks(y))


def ranks(values: Float[np.ndarray, "*D N"]) -> Float[np.ndarray, "*D N"]:
    """The rank of each value, from 0; equal values share the mean of their ranks.

    >>> ranks(np.array([3.0, 1.0, 3.0]))
    array([1.5, 0. , 1.5])
    """
    order, place = np.argsort(values, axis=-1), np.arange(values.shape[-1])
    rising = np.take_along_axis(values, order, -1)
    first = np.concatenate([np.ones_like(rising[..., :1], dtype=bool), rising[..., 1:] != rising[..., :-1]], axis=-1)
    last = np.roll(first, -1, axis=-1)  # the next value is another one, or there is none
    start = np.maximum.accumulate(np.where(first, place, 0), axis=-1)
    end = np.minimum.accumulate(np.where(last, place, place[-1:])[..., ::-1], axis=-1)[..., ::-1]
    found = np.empty(values.shape)
    np.put_along_axis(found, order, (start + end) / 2, -1)
    return found


def sign_agreement(x: Float[np.ndarray, "*D N"], y: Float[np.ndarray, "*D N"]) -> Any:
    """The share of pairs with sign(x) = sign(y).

    >>> float(sign_agreement(np.array([1.0, -1.0]), np.array([0.5, 0.5])))
    0.5
    """
    return (np.sign(x) == np.sign(y)).mean(-1)


def slope(x: Float[np.ndarray, "*D N"], y: Float[np.ndarray, "*D N"]) -> Any:
    """Cov(x, y) / Var x; NaN where x does not vary."""
    dx = _centred(x)
    return _over((dx * _centred(y)).sum(-1), (dx * dx).sum(-1))


def offset(x: Float[np.ndarray, "*D N"], y: Float[np.ndarray, "*D N"]) -> Any:
    """The least-squares line at x = 0: mean y - slope · mean x."""
    return y.mean(-1) - slope(x, y) * x.mean(-1)


def average(values: Float[np.ndarray, " N"], momentum: float) -> Float[np.ndarray, " N"]:
    """The exponential moving average that an optimiser with that momentum makes of its gradients, without its bias.

    >>> average(np.array([1.0, 3.0]), 0.5)
    array([1.        , 2.33333333])
    """
    weights = momentum ** np.arange(len(values))
    return np.convolve(values, weights)[: len(values)] / np.cumsum(weights)


def one_ahead(x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """For each x_k the y of the line κ x + b fitted to the pairs before it: what could have been predicted in time.

    The first three have too few pairs before them: for these it is the mean of y so far, 0 for the first.

    >>> one_ahead(np.arange(5.0), 2 * np.arange(5.0) + 1).tolist()
    [0.0, 1.0, 2.0, 7.0, 9.0]
    """
    predicted = np.zeros(len(x))
    for k in range(1, len(x)):
        rate = slope(x[:k], y[:k]) if k >= 3 else float("nan")
        predicted[k] = rate * x[k] + offset(x[:k], y[:k]) if np.isfinite(rate) else y[:k].mean()
    return predicted


def _centred(values: Float[np.ndarray, "*D N"]) -> Float[np.ndarray, "*D N"]:
    return values - values.mean(-1, keepdims=True)


def _over(part: Any, whole: Any) -> Any:
    """part / whole, NaN where whole is not positive."""
    return part / np.where(whole > 0, whole, np.nan)


@lru_cache(maxsize=8)
def _draws(lengths: tuple[int, ...], block: int, draws: int) -> Int[np.ndarray, "D N"]:
    """The places in the joined runs that each draw takes."""
    rng, before = np.random.default_rng(0), np.cumsum([0, *lengths[:-1]])
    places = np.empty((draws, sum(lengths)), dtype=int)
    for draw in places:
        for first, length in zip(before, lengths, strict=True):
            starts = rng.integers(length, size=-(-length // block))
            blocks = (starts[:, None] + np.arange(block)).reshape(-1)[:length] % length
            draw[first : first + length] = first + blocks
    return places
