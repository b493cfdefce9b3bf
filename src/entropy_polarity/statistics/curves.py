"""Summaries of a training curve of one value per rollout."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def area_under_curve(values: Float[np.ndarray, " K"]) -> float:
    """The area under a curve of one value per rollout, divided by its length: (1/K) Σ_k values_k. A higher end raises
    it, and so does a faster way there."""
    return float(np.mean(values))


def moving_average(values: Float[np.ndarray, " K"], window: int) -> Float[np.ndarray, " M"]:
    """The means over every `window` values in a row, K - window + 1 of them; over all values where there are fewer.

    >>> moving_average(np.array([1.0, 2.0, 3.0, 4.0]), window=3)
    array([2., 3.])
    """
    values = np.asarray(values, dtype=float)
    window = min(window, len(values))
    return np.convolve(values, np.full(window, 1 / window), mode="valid")


def steps_to_reach(steps: Sequence[int], values: Float[np.ndarray, " K"], level: float, window: int = 10) -> int | None:
    """The first of `steps` at which the moving average over `window` rollouts reaches `level`; None if it never does.

    Only whole windows count: a lucky first rollout reaches nothing.

    >>> steps_to_reach([1, 3, 5, 7], np.array([0.0, 0.2, 0.4, 0.4]), level=0.3, window=2)
    5
    """
    averages = moving_average(values, window)
    reached = np.flatnonzero(averages >= level - 1e-9)  # a baseline must reach its own best, whatever the rounding
    return int(steps[len(steps) - len(averages) + reached[0]]) if reached.size else None
