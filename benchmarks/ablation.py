"""What reweighting does to the entropy of a run, arm by arm: the second table of ablation.toml."""

from typing import Any

import numpy as np
from blocks import markdown
from exact_sign import shown


def entropy(document: dict[str, Any]) -> str:
    """The mean entropy over each run, minus that of the first baseline with the same seed."""
    mean: dict[str, dict[int, float]] = {}
    for run in document["runs"]:
        values = np.array(run["entropy"]["values"], dtype=float)
        mean.setdefault(run["label"], {})[run["seed"]] = float(np.nanmean(values))
    name = document["plan"]["baselines"][0]
    rows = []
    for label, by_seed in mean.items():
        if label != name:
            paired = np.array([value - mean[name][seed] for seed, value in by_seed.items()])
            rows.append([label, shown(paired, 3), f"{(paired > 0).sum()} of {len(paired)}"])
    return markdown(["method", f"mean entropy minus that of {name}, nats", "seeds above"], rows)
