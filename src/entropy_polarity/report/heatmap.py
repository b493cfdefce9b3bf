"""Rollouts as coloured text: each token's background says which way, and how strongly, it moves the entropy."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from entropy_polarity.report.palette import CONTRACTS, EXPANDS, transparent
from entropy_polarity.runs.layout import ROLLOUTS
from entropy_polarity.runs.record import Run
from entropy_polarity.support.success import degree
from entropy_polarity.support.text import cut

_KEYS = {"rollout", "prompt", "verdict", "reward", "advantage"}
MAX_TOKENS = 1000  # of a rollout, half of them its first and half its last: each has a tip, which makes a page heavy
MAX_TOKEN = 80  # characters of one


@dataclass(frozen=True)
class ColouredToken:
    """`colour` is None where the environment said it."""

    text: str
    colour: str | None
    statistics: list[tuple[str, str]]


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


class Heatmap(NamedTuple):
    """The rollouts that are shown, and a line for each reason why others are not."""

    rollouts: list[ColouredRollout]
    left_out: list[str]


def heatmap_of(run: Run, count: int = 12) -> Heatmap:
    """About `count` recorded rollouts, from the beginning, the middle and the end of the run."""
    by_step = _rows_of_shown_steps(run)
    odd = sum(not row.keys() >= _KEYS for row in run.rollouts)
    left_out = [f"{odd} rows of {ROLLOUTS}: they lack one of {', '.join(sorted(_KEYS))}"] if odd else []
    tokens = {}
    for step in by_step:
        try:
            tokens[step] = run.tokens(step)
        except (OSError, ValueError) as error:
            left_out.append(str(error))
    strengths = [abs(t["polarity"]) for ts in tokens.values() for t in ts if math.isfinite(t["polarity"])]
    # One scale for the page; the strongest few saturate, so that the others can be told apart.
    scale = float(np.quantile([s for s in strengths if s > 0] or [1.0], 0.9))
    rollouts = [
        _rollout(row, [_coloured(t, scale) for t in tokens[step] if t["rollout"] == row["rollout"]])
        for step, rows in by_step.items()
        if step in tokens
        # Where the whole group has one reward there is nothing to see: those come last.
        for row in sorted(rows, key=lambda row: row["advantage"] == 0)[: count // len(by_step)]
    ]
    return Heatmap(rollouts, left_out)


def _rollout(row: dict[str, Any], tokens: list[ColouredToken]) -> ColouredRollout:
    reward = "-" if row["reward"] is None else f"{row['reward']:.3g}"
    shown = (row["step"], row["prompt"], row["verdict"], degree(row["reward"]), reward, row["advantage"])
    return ColouredRollout(*shown, _turns(tokens))


def _rows_of_shown_steps(run: Run) -> dict[int, list[dict[str, Any]]]:
    by_step: dict[int, list[dict[str, Any]]] = {}
    for row in run.rollouts:
        if row.keys() >= _KEYS:
            by_step.setdefault(row["step"], []).append(row)
    steps = sorted(by_step)
    places = np.linspace(0, len(steps) - 1, 3) if steps else ()
    return {steps[round(place)]: by_step[steps[round(place)]] for place in places}


def _turns(tokens: list[ColouredToken]) -> list[list[ColouredToken]]:
    turns: list[list[ColouredToken]] = [[]]
    for token in _bounded(tokens):
        if token.colour is None and turns[-1] and turns[-1][-1].colour is not None:
            turns.append([])
        turns[-1].append(token)
    return turns


def _bounded(tokens: list[ColouredToken]) -> list[ColouredToken]:
    more, half = len(tokens) - MAX_TOKENS, MAX_TOKENS // 2
    if more <= 0:
        return tokens
    return [*tokens[:half], ColouredToken(f" … {more:,} tokens left out … ", None, []), *tokens[-half:]]


def _coloured(token: dict[str, Any], scale: float) -> ColouredToken:
    if not token.get("from_policy", True):
        return ColouredToken(cut(token["token"], MAX_TOKEN), None, [])
    polarity = token["polarity"]
    strength = min(1.0, abs(polarity) / scale) if math.isfinite(polarity) else 0.0
    colour = transparent(EXPANDS if polarity > 0 else CONTRACTS, 0.08 + 0.72 * strength if strength else 0)
    statistics = [
        ("p", f"{math.exp(token['logp']):.3f}"),
        ("H", f"{token['entropy']:.3f} nats"),
        ("T", f"{token['sensitivity']:+.4f}"),
        ("P", f"{polarity:+.4f}"),
        ("weight", f"{token['weight']:.2f}"),
    ]
    return ColouredToken(cut(token["token"], MAX_TOKEN), colour, statistics)
