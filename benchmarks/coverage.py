"""Do the audit's intervals hold the truth as often as they say? Simulated runs with a known correlation.

    python benchmarks/coverage.py --output benchmarks/results/coverage.json

Three runs of 40 updates each, as an audit has: x and y are autoregressive with the same lag-one autocorrelation, and
their correlation is known. Counted is how often the 95 % interval of `agreement.block_bootstrap` holds it.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from blocks import markdown

from entropy_polarity.agreement import block_bootstrap, pearson
from entropy_polarity.experiments.results import provenance, write_document

RUNS, UPDATES, REPETITIONS = 3, 40, 400
AUTOCORRELATIONS, CORRELATIONS = (0.0, 0.5, 0.8), (0.3, 0.9)


def simulated(phi: float, correlation: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """x and y of one run, stationary from its start: u_k = φ u_{k-1} + √(1 - φ²) e_k."""
    shared, own = rng.standard_normal((2, UPDATES))
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


def measure() -> dict[str, Any]:
    rows = [
        {"autocorrelation": p, "correlation": c, "held": held(p, c)} for p in AUTOCORRELATIONS for c in CORRELATIONS
    ]
    settings = {"runs": RUNS, "updates": UPDATES, "repetitions": REPETITIONS, "seed": 0}
    return {"coverage": 1, "environment": provenance(), "settings": settings, "rows": rows}


def table(document: dict[str, Any]) -> str:
    head = ["lag-one autocorrelation of the updates", "true correlation", "intervals that hold it"]
    return markdown(
        head, [[str(r["autocorrelation"]), str(r["correlation"]), f"{r['held']:.0%}"] for r in document["rows"]]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    found = measure()
    write_document(parser.parse_args().output, found)
    print(table(found))
