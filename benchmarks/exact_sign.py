"""How well PAPO holds the entropy on its path, by where its signs are from: the second table of exact_sign.toml."""

from dataclasses import astuple
from typing import Any

import numpy as np
from blocks import markdown

from entropy_polarity.controllers.settings import entropy_path
from entropy_polarity.statistics.intervals import t_interval


def control(document: dict[str, Any]) -> str:
    """Mean |H - path| over the rollouts of each run, and its paired difference to the first label that has a path."""
    off: dict[str, dict[int, float]] = {}
    for run in document["runs"]:
        if "level" in run["method"]:
            off.setdefault(run["label"], {})[run["seed"]] = _off_path(run)
    base = next(iter(off.values()))
    rows = []
    for label, by_seed in off.items():
        found = np.array(list(by_seed.values()))
        paired = np.array([by_seed[seed] - base[seed] for seed in by_seed])
        interval = "" if by_seed is base else shown(paired)
        rows.append([label, f"{found.mean():.4f} ± {found.std(ddof=1):.4f}", interval])
    return markdown(["method", "mean distance from the path, nats", "against papo"], rows)


def _off_path(run: dict[str, Any]) -> float:
    method = run["method"]
    wanted = entropy_path("papo", method["level"], None, method["path"], method["horizon"])
    entropy = run["entropy"]["values"]
    return float(np.mean([abs(value - wanted(k, entropy[0])) for k, value in enumerate(entropy)]))


def shown(paired: np.ndarray, digits: int = 4) -> str:
    value, low, high = (f"{x:+.{digits}f}" for x in astuple(t_interval(paired)))
    return f"{value} t [{low}, {high}]"
