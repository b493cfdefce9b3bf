"""Do the audit's intervals hold the truth as often as they say? Simulated runs with a known correlation.

    python benchmarks/coverage.py --output benchmarks/results/coverage.json

Three runs of 40 updates each, as an audit has: x and y are autoregressive with the same lag-one autocorrelation, and
their correlation is known. Counted is how often the 95 % interval of `agreement.block_bootstrap` holds it.

And how few are too few: the same of one run of independent updates, shorter and shorter, and of the interval of a mean
over fewer and fewer problems, of normal values and of shares of 16 samples, without the rule that few get none. Ten
minutes on one core.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from blocks import markdown

from entropy_polarity.experiments.results import provenance, write_document
from entropy_polarity.statistics import agreement, intervals
from entropy_polarity.statistics.agreement import block_bootstrap, pearson

RUNS, UPDATES, REPETITIONS = 3, 40, 400
AUTOCORRELATIONS, CORRELATIONS = (0.0, 0.5, 0.8), (0.3, 0.9)
FEW_UPDATES, FEW_PROBLEMS, SHARE = (5, 10, 15, 20, 40), (2, 3, 5, 8, 10, 20), 0.3
MANY = 1000  # repetitions of those


def simulated(
    phi: float, correlation: float, rng: np.random.Generator, updates: int = UPDATES
) -> tuple[np.ndarray, np.ndarray]:
    """x and y of one run, stationary from its start: u_k = φ u_{k-1} + √(1 - φ²) e_k."""
    shared, own = rng.standard_normal((2, updates))
    noise = np.stack([shared, correlation * shared + np.sqrt(1 - correlation**2) * own])
    series = [noise[:, 0]]
    for e in noise.T[1:]:
        series.append(phi * series[-1] + np.sqrt(1 - phi**2) * e)
    x, y = np.array(series).T
    return x, y


def held(phi: float, correlation: float) -> float:
    """The share of repetitions whose interval holds the correlation."""
    rng, count = np.random.default_rng(0), 0
    for _ in range(REPETITIONS):
        found = block_bootstrap([simulated(phi, correlation, rng) for _ in range(RUNS)], pearson)
        count += found.low <= correlation <= found.high
    return count / REPETITIONS


def held_by_few(updates: int) -> float:
    """The share of runs of so many independent updates whose interval holds a correlation of 0.3."""
    rng = np.random.default_rng(0)
    found = [block_bootstrap([simulated(0.0, 0.3, rng, updates)], pearson) for _ in range(MANY)]
    return sum(one.low <= 0.3 <= one.high for one in found) / MANY


def held_by_problems(draw: Callable[[np.random.Generator, int], np.ndarray], mean: float, problems: int) -> float:
    """The share of draws of so many problems whose interval holds the mean."""
    rng, count = np.random.default_rng(0), 0
    for number in range(MANY):
        low, high = intervals.bootstrap_interval(draw(rng, problems), seed=number)
        count += low <= mean <= high
    return count / MANY


def _shares(rng: np.random.Generator, problems: int) -> np.ndarray:
    """Right answers of 16 samples a problem, problems as unlike as they are on countdown: Beta(0.6, 1.4)."""
    return rng.binomial(16, rng.beta(2 * SHARE, 2 - 2 * SHARE, problems)) / 16


def few() -> dict[str, list[dict[str, Any]]]:
    """How often intervals of few updates, or problems, hold the truth; with the least numbers out of the way."""
    least, agreement.LEAST_BLOCKS, intervals.LEAST = (agreement.LEAST_BLOCKS, intervals.LEAST), 0, 0
    try:
        return {
            "updates": [{"updates": n, "held": held_by_few(n)} for n in FEW_UPDATES],
            "problems": [
                {
                    "problems": n,
                    "normal": held_by_problems(lambda rng, n: rng.standard_normal(n), 0.0, n),
                    "shares": held_by_problems(_shares, SHARE, n),
                }
                for n in FEW_PROBLEMS
            ],
        }
    finally:
        agreement.LEAST_BLOCKS, intervals.LEAST = least


def measure() -> dict[str, Any]:
    rows = [
        {"autocorrelation": p, "correlation": c, "held": held(p, c)} for p in AUTOCORRELATIONS for c in CORRELATIONS
    ]
    settings = {"runs": RUNS, "updates": UPDATES, "repetitions": REPETITIONS, "seed": 0}
    return {"coverage": 1, "environment": provenance(), "settings": settings, "rows": rows, "few": few()}


def table(document: dict[str, Any]) -> str:
    head = ["lag-one autocorrelation of the updates", "true correlation", "intervals that hold it"]
    return markdown(
        head, [[str(r["autocorrelation"]), str(r["correlation"]), f"{r['held']:.0%}"] for r in document["rows"]]
    )


def tables_of_few(document: dict[str, Any]) -> str:
    updates, problems = document["few"]["updates"], document["few"]["problems"]
    return "\n\n".join(
        [
            markdown(
                ["updates of one run", "intervals that hold it"],
                [[str(r["updates"]), f"{r['held']:.0%}"] for r in updates],
            ),
            markdown(
                ["problems", "intervals that hold the mean: normal values", "shares of right answers"],
                [[str(r["problems"]), f"{r['normal']:.0%}", f"{r['shares']:.0%}"] for r in problems],
            ),
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    found = measure()
    write_document(parser.parse_args().output, found)
    print(table(found), tables_of_few(found), sep="\n\n")
