"""One constant per method, chosen with one budget for all on seeds and problems that the comparison never uses."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from entropy_polarity.experiments.compare.plan import Plan
from entropy_polarity.experiments.compare.summary import WINDOW, RunResults
from entropy_polarity.statistics.success import pass_at_k
from entropy_polarity.tasks import distinct_problems, make_task


class Candidate(NamedTuple):
    """A method with one value of its constant; `run_label` names its runs."""

    label: str
    key: str
    value: Any
    run_label: str
    table: dict[str, Any]


def candidates_of(plan: Plan) -> list[Candidate]:
    """Every value of every constant that `plan` searches for. Raises ValueError without a [search.values] table."""
    if not plan.search.values:
        raise ValueError(
            'nothing to search: the plan needs [search.values], like papo = {key = "level", values = [0.3]}'
        )
    return [
        Candidate(label, choice.key, value, f"{label}@{number}", table)
        for label, choice in plan.search.values.items()
        for number, (value, table) in enumerate(choice.candidates(plan.methods[label]), start=1)
    ]


def search_plan(plan: Plan) -> Plan:
    """The runs of the search as a plan of its own."""
    methods = {candidate.run_label: candidate.table for candidate in candidates_of(plan)}
    return replace(plan, set=[*plan.set, *plan.search.set], seeds=plan.search.seeds, seeds_of={}, methods=methods)


def unseen_problems(final: Plan, search: Plan) -> list[int]:
    """Which of the search's held-out problems the comparison does not have: streams of two seeds can share some."""
    keys = []
    for plan in (search, final):
        recipe = plan.recipe_of(next(iter(plan.methods)), plan.seeds[0])
        held_out = recipe.evaluation
        problems = distinct_problems(make_task(**recipe.task), held_out.seed, "test", held_out.problems)
        keys.append([problem.key for problem in problems])
    kept = [number for number, key in enumerate(keys[0]) if key not in {*keys[1]}]
    if not kept:
        raise ValueError("all problems of the search are problems of the comparison: set another evaluation.seed")
    return kept


def judge(
    candidates: Sequence[Candidate], runs: Sequence[RunResults], seeds: Sequence[int], kept: Sequence[int]
) -> list[dict[str, Any]]:
    """One row per candidate: means over seeds of the final pass@1, of pass@16 (or as many as were sampled) and entropy.
    Only the problems `kept` count. A candidate whose runs have not all finished has no numbers."""
    rows = []
    for candidate in candidates:
        own = [run for run in runs if run.label == candidate.run_label]
        row: dict[str, Any] = {name: getattr(candidate, name) for name in ("label", "key", "value", "run_label")}
        row["seeds"] = [run.seed for run in own]
        if {*row["seeds"]} == {*seeds}:
            right = np.array([run.after["successes"] for run in own])[:, list(kept)]
            samples = own[0].samples
            row["samples"] = many = min(16, samples)
            row["pass@1"] = round(float(pass_at_k(right, samples, 1).mean()), 6)
            row["pass@many"] = round(float(pass_at_k(right, samples, many).mean()), 6)
            ends = [np.nanmean(np.array(run.entropy["values"][-WINDOW:], dtype=float)) for run in own]
            row["entropy_end"] = round(float(np.mean(ends)), 6)
        rows.append(row)
    return rows


def choose(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any] | None]:
    """The best row of each label: the highest pass@1; among equals the highest pass@many, then the first.

    None for a label with a candidate that has no numbers: the budgets would not be the same.

    >>> row = {"label": "papo", "pass@many": 0.6}
    >>> choose([row | {"value": 0.3, "pass@1": 0.2}, row | {"value": 0.4, "pass@1": 0.3}])["papo"]["value"]
    0.4
    """
    chosen: dict[str, dict[str, Any] | None] = {}
    for label in dict.fromkeys(row["label"] for row in rows):
        own = [row for row in rows if row["label"] == label]
        whole = all("pass@1" in row for row in own)
        chosen[label] = max(own, key=lambda row: (row["pass@1"], row["pass@many"])) if whole else None
    return chosen
