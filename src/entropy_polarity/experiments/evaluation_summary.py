"""From the attempts of several models to measures with intervals, paired differences, and examples for the page."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from entropy_polarity.evaluation import Attempts
from entropy_polarity.experiments.results import bounds, rounded
from entropy_polarity.statistics.intervals import DIFFERENCE, RATE, Estimate, paired_bootstrap
from entropy_polarity.support.json_files import without_nan
from entropy_polarity.tasks import Task

SHOWN_PROBLEMS, SHOWN_ATTEMPTS = 12, 4


def summarise(attempts: dict[str, list[Attempts]], task: Task, reference: str | None) -> dict[str, Any]:
    """Every measure of every model with its interval over problems and seeds, and its differences to `reference`."""
    scores = {label: _by_seed([made.measures() for made in rows]) for label, rows in attempts.items()}
    counts = {label: _by_seed([made.counts() for made in rows]) for label, rows in attempts.items()}
    rates = {name for found in scores.values() for name in found} - {"reward"}  # a reward may be anything
    models = {
        label: {
            "scores": {name: _estimate(values, name in rates) for name, values in scores[label].items()},
            "facts": {name: _estimate(values, False) for name, values in counts[label].items()},
            "verdicts": _mean_shares([made.verdicts(task.reasons) for made in rows]),
            "successes": [made.successes for made in rows],
            "greedy": rows[0].greedy_right,
        }
        for label, rows in attempts.items()
    }
    against = {}
    if reference is not None:
        theirs = scores[reference] | counts[reference]
        for label in (label for label in attempts if label != reference):
            mine = scores[label] | counts[label]
            shared = [name for name in mine if name in theirs and _complete(mine[name] + theirs[name]).any()]
            against[label] = {name: _difference(mine[name], theirs[name], name in rates) for name in shared}
    return {"models": models, "against": against}


def _by_seed(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """(seeds, problems) for each name that every seed has, of one problem at least."""
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0] if all(name in row for row in rows)}
    return {name: values for name, values in stacked.items() if _complete(values).any()}


def _complete(values: np.ndarray) -> np.ndarray:
    """The problems of which every seed has a number: an environment need not always count the same."""
    return np.logical_not(np.isnan(values).any(axis=0))


def _estimate(values: np.ndarray, rate: bool) -> dict[str, float | None]:
    estimate = Estimate.of(values[:, _complete(values)], RATE if rate else None)
    return without_nan({name: rounded(value) for name, value in asdict(estimate).items()})


def _difference(a: np.ndarray, b: np.ndarray, rate: bool) -> dict[str, Any]:
    """Over the problems that both have, and the same sampling seeds."""
    both = _complete(a + b)
    found = paired_bootstrap(a[:, both], b[:, both], within=DIFFERENCE if rate else None)
    return {"difference": rounded(found.value), "bootstrap": bounds(found)}


def _mean_shares(shares: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: rounded(sum(share[name] for share in shares) / len(shares)) for name in shares[0]}


def examples(attempts: dict[str, list[Attempts]]) -> list[dict[str, Any]]:
    """The problems that the page shows, with a few attempts of each model: those first whose numbers of right samples
    differ most between the models (with the first sampling seed); of one model the first problems."""
    first = {label: rows[0] for label, rows in attempts.items()}
    problems = next(iter(first.values())).problems
    counts = np.array([made.successes for made in first.values()])
    spread = counts.max(axis=0) - counts.min(axis=0)
    order = sorted(range(len(problems)), key=lambda i: (-spread[i], i))[:SHOWN_PROBLEMS]
    return [
        {
            "number": number,
            "prompt": problems[number].prompt,
            "facts": problems[number].metadata,
            "models": {
                label: {
                    "successes": sum(one.right for one in made.sampled[number]),
                    "samples": made.samples,
                    "attempts": [one.to_json() for one in made.sampled[number][:SHOWN_ATTEMPTS]],
                }
                for label, made in first.items()
            },
        }
        for number in order
    ]
