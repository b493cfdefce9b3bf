"""Writes decisions.json: what version 0.1, whose Tokens were padded, made of three rollouts with every method.

Run in a checkout of commit 01dfe53, the last with that version:

    PYTHONPATH=tests:src:examples python THIS_FILE decisions.json

The file has `batches`, each with the columns of its model tokens in the order of responses and positions, and `cases`:
a method, its settings and, rollout by rollout, which tokens it kept, its outputs on those, the metrics, and the state
after the last. In the second batch one group has equal rewards, so that there is something to drop; the first one has
an exact sensitivity.
"""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

# The modules of that version are imported where they are used: today's have other names.
COLUMNS = ("advantages", "logp", "old_logp", "entropy", "sensitivity", "importance", "exact_sensitivity")
RESPONSES = ("reward", "group", "sample_id")
OUTPUTS = ("advantages", "entropy_bonus", "ratio_penalty")


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.12g}")
    return value


def make_batches() -> list[Any]:
    from batches import in_double, sampled_batch

    first, second, third = (in_double(sampled_batch(seed, scale)) for seed, scale in ((1, 2.0), (2, 2.0), (3, 6.0)))
    equal = second.group == 2
    return [
        replace(first, exact_sensitivity=torch.where(first.mask, -0.5 * first.sensitivity.flip(0), 0.0)),
        replace(
            second,
            reward=second.reward.masked_fill(equal, 1.0),
            advantages=second.advantages.masked_fill(equal[:, None], 0.0),
        ),
        third,
    ]


def main() -> None:
    from test_methods import CASES

    from entropy_polarity.methods import make_transform

    torch.set_num_threads(1)
    batches = make_batches()
    written = []
    for batch in batches:
        response, position = batch.mask.nonzero().unbind(1)
        columns = {name: x[batch.mask].tolist() for name in COLUMNS if (x := getattr(batch, name)) is not None}
        columns |= {name: getattr(batch, name).tolist() for name in RESPONSES}
        written.append({"response": response.tolist(), "position": position.tolist(), **columns})
    cases = {}
    for case, (method, settings) in CASES.items():
        transform = make_transform(method, settings)
        state, rollouts = transform.init(), []
        for batch in batches:
            after, state, metrics = transform.update(batch, state)
            made = {
                name: column[after.mask].tolist() for name in OUTPUTS if (column := getattr(after, name)) is not None
            }
            kept = after.mask[batch.mask].nonzero().flatten().tolist()
            rollouts.append({"kept": None if len(kept) == batch.mask.sum() else kept, **made, "metrics": metrics})
        cases[case] = {"method": method, "settings": settings, "rollouts": rollouts, "state": state}
    text = json.dumps(rounded({"batches": written, "cases": cases}), separators=(",", ":"))
    Path(sys.argv[1]).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
