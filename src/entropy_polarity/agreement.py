"""How well a prediction agrees with what came: correlations, signs, the line between them, with intervals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from entropy_polarity.evaluate import Estimate

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


def agreement(
    runs: Sequence[Pairs], *, block: int = 5, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> Agreement:
    """The agreement of x and y over all pairs of `runs`, each of which holds (x, y) of updates in order.

    Updates of one run are no independent draws: the percentile intervals are those of a bootstrap that takes runs as
    they are and, in each, blocks of `block` consecutive updates, around the end. Raises ValueError for fewer than three
    updates, for x and y of different lengths, and for what is not finite.
    Source: Politis and Romano, "A circular block-resampling procedure", 1992.

    >>> x = np.arange(10.0)
    >>> agreement([(x, 2 * x + 1)]).slope
    Estimate(value=2.0, low=2.0, high=2.0)
    """
    runs = [(np.asarray(x, dtype=float), np.asarray(y, dtype=float)) for x, y in runs]
    for x, y in runs:
        if x.shape != y.shape or len(x) < 3 or not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise ValueError(
                f"agreement: {len(x)} predictions and {len(y)} outcomes; expected as many of each, at least "
                "three, all finite"
            )
    rng = np.random.default_rng(seed)
    drawn = [[(x[p], y[p]) for x, y in runs for p in [_blocks(len(x), block, rng)]] for _ in range(draws)]
    tail = (1 - level) / 2

    def estimate(statistic: Callable[..., float]) -> Estimate:
        values = [statistic(*_joined(sample)) for sample in drawn]
        low, high = np.nanquantile(values, [tail, 1 - tail]) if not np.isnan(values).all() else (np.nan, np.nan)
        return Estimate(statistic(*_joined(runs)), float(low), float(high))

    return Agreement(*map(estimate, (pearson, spearman, sign_agreement, slope, offset)))


def pearson(x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"]) -> float:
    """Cov(x, y) / √(Var x Var y); NaN where one of them does not vary.

    >>> round(pearson(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])), 3)
    0.5
    """
    dx, dy = x - x.mean(), y - y.mean()
    size = np.sqrt((dx @ dx) * (dy @ dy))
    return float(dx @ dy / size) if size > 0 else float("nan")


def spearman(x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"]) -> float:
    """`pearson` of the ranks; equal values share the mean of theirs.

    >>> spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 10.0, 100.0]))
    1.0
    """
    return pearson(ranks(x), ranks(y))


def ranks(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """The place of each value in their order, from 0; equal values share the mean of theirs.

    >>> ranks(np.array([3.0, 1.0, 3.0]))
    array([1.5, 0. , 1.5])
    """
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts + 1) / 2)[inverse]


def sign_agreement(x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"]) -> float:
    """The share of pairs with sign(x) = sign(y).

    >>> sign_agreement(np.array([1.0, -1.0]), np.array([0.5, 0.5]))
    0.5
    """
    return float(np.mean(np.sign(x) == np.sign(y)))


def slope(x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"]) -> float:
    """Cov(x, y) / Var x; NaN where x does not vary."""
    dx = x - x.mean()
    return float(dx @ (y - y.mean()) / (dx @ dx)) if dx @ dx > 0 else float("nan")


def offset(x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"]) -> float:
    """What the line leaves at x = 0: mean y - slope · mean x."""
    return float(y.mean() - slope(x, y) * x.mean())


def average(values: Float[np.ndarray, " N"], momentum: float) -> Float[np.ndarray, " N"]:
    """The exponential moving average that an optimiser with that momentum makes of its gradients, without its bias.

    >>> average(np.array([1.0, 3.0]), 0.5)
    array([1.        , 2.33333333])
    """
    weights = momentum ** np.arange(len(values))
    return np.convolve(values, weights)[: len(values)] / np.cumsum(weights)


def one_ahead(x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """For each x_k the y of the line κ x + b that is fitted to the pairs before it: what could have been said in time.

    The first three pairs have too little before them: the mean of y so far, 0 for the first.

    >>> one_ahead(np.arange(5.0), 2 * np.arange(5.0) + 1).tolist()
    [0.0, 1.0, 2.0, 7.0, 9.0]
    """
    said = np.zeros(len(x))
    for k in range(1, len(x)):
        line = (slope(x[:k], y[:k]), offset(x[:k], y[:k])) if k >= 3 else (float("nan"), 0.0)
        said[k] = line[0] * x[k] + line[1] if np.isfinite(line[0]) else y[:k].mean()
    return said


def _joined(runs: Sequence[Pairs]) -> Pairs:
    x, y = zip(*runs, strict=True)
    return np.concatenate(x), np.concatenate(y)


def _blocks(length: int, block: int, rng: np.random.Generator) -> Int[np.ndarray, " N"]:
    starts = rng.integers(length, size=-(-length // block))
    return (starts[:, None] + np.arange(block)).reshape(-1)[:length] % length
