"""Rollouts as coloured text: each token's background says which way, and how strongly, it moves the entropy."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from entropy_polarity._success import degree
from entropy_polarity.record import Run

EXPANDS, CONTRACTS = "33, 102, 214", "214, 48, 49"  # blue and red that survive colour-blind eyes


@dataclass(frozen=True)
class ColouredToken:
    """`colour` is None where the environment said it."""

    text: str
    colour: str | None
    facts: list[tuple[str, str]]


@dataclass(frozen=True)
class ColouredRollout:
    """`turns` begin where the environment speaks again; a completion without environment is one. `degree` is how far
    the reward is a success, the class of the verdict's colour."""

    step: int
    prompt: str
    verdict: str
    degree: str
    reward: str
    advantage: float
    turns: list[list[ColouredToken]]


def coloured_rollouts(run: Run, count: int = 12) -> list[ColouredRollout]:
    """About `count` recorded rollouts, from the beginning, the middle and the end of the run."""
    by_step: dict[int, list[dict[str, Any]]] = {}
    for row in run.rollouts:
        by_step.setdefault(row["step"], []).append(row)
    if not by_step:
        return []
    steps = sorted(by_step)
    shown = list(dict.fromkeys(steps[round(i)] for i in np.linspace(0, len(steps) - 1, 3)))
    # Where the whole group has one reward there is nothing to see: those come last.
    rows = [
        row
        for step in shown
        for row in sorted(by_step[step], key=lambda row: row["advantage"] == 0)[: count // len(shown)]
    ]
    tokens = {step: run.tokens(step) for step in shown}
    strengths = [abs(t["polarity"]) for ts in tokens.values() for t in ts if math.isfinite(t["polarity"])]
    # One scale for the page; the strongest few saturate, so that the others can be told apart.
    scale = float(np.quantile([s for s in strengths if s > 0] or [1.0], 0.9))
    return [
        ColouredRollout(
            row["step"],
            row["prompt"],
            row["verdict"],
            degree(row["reward"]),
            "-" if row["reward"] is None else f"{row['reward']:.3g}",
            row["advantage"],
            _turns([_coloured(t, scale) for t in tokens[row["step"]] if t["rollout"] == row["rollout"]]),
        )
        for row in rows
    ]


def _turns(tokens: list[ColouredToken]) -> list[list[ColouredToken]]:
    turns: list[list[ColouredToken]] = [[]]
    for token in tokens:
        answered = turns[-1] and turns[-1][-1].colour is not None
        if token.colour is None and answered:
            turns.append([])
        turns[-1].append(token)
    return turns


def _coloured(token: dict[str, Any], scale: float) -> ColouredToken:
    if not token.get("from_policy", True):
        return ColouredToken(token["token"], None, [])
    polarity = token["polarity"]
    strength = min(1.0, abs(polarity) / scale) if math.isfinite(polarity) else 0.0
    colour = EXPANDS if polarity > 0 else CONTRACTS
    facts = [
        ("p", f"{math.exp(token['logp']):.3f}"),
        ("H", f"{token['entropy']:.3f} nats"),
        ("T", f"{token['sensitivity']:+.4f}"),
        ("P", f"{polarity:+.4f}"),
        ("weight", f"{token['weight']:.2f}"),
    ]
    return ColouredToken(token["token"], f"rgba({colour}, {0.08 + 0.72 * strength if strength else 0:.2f})", facts)
