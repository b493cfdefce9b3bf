"""The summary of an audit: every level and every cheap forecast against the realised change, and token by token."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from entropy_polarity.diagnostics.asymmetry import by_probability, threshold
from entropy_polarity.diagnostics.audit import LEVELS, TokenAccount
from entropy_polarity.diagnostics.forecast import EVERY, SHARE
from entropy_polarity.statistics.agreement import (
    agreement_of,
    average,
    block_bootstrap,
    detrended,
    one_ahead,
    pearson,
    sign_agreement,
    spearman,
)
from entropy_polarity.support.json_files import without_nan

MAP = 24  # cells a side of the map over p_a and H
FIRST = 5  # updates of a run before the first whose error is judged
TREND = 8  # updates that a run needs for a trend to be told from its updates
VISITS = 8  # of a state, before its tokens are added up
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
TOKEN_PAIRS = ("local", "state", "sensitivity")
TOKEN_FIGURES = ("spearman", "sign_agreement", "falls", "weighted_sign_agreement", "weighted_falls")
MAPPED = ("p", "entropy", "correction", "pressure", "sensitivity", "change")  # columns that `asymmetry` reads

Updates = Sequence[list[dict[str, Any]]]
Series = list[np.ndarray]


def summarise(updates: Updates) -> dict[str, Any]:
    """Over the updates of all runs, each level against the realised change, on the batch's own states and on held-out
    ones."""
    batch, held_out = (
        {name: _level(updates, states, name) for name in LEVELS}
        | {"explained": _explained(updates, states), "cheap": _cheap(updates, states)}
        for states in ("batch", "held_out")
    )
    tokens: dict[str, float | None] = {}
    of_updates = [row.get("tokens", {}) for rows in updates for row in rows]
    for name in (f"{pair}_{figure}" for pair in TOKEN_PAIRS for figure in TOKEN_FIGURES):
        known = [found[name] for found in of_updates if found.get(name) is not None]
        tokens[name] = float(np.mean(known)) if known else None
    constants = {"share": SHARE, "every": EVERY, "visits": VISITS, "first": FIRST}
    return {**batch, "held_out": held_out, "tokens": tokens, "constants": constants}


def _level(updates: Updates, states: str, name: str) -> dict[str, Any] | None:
    x, y = _series(updates, states, name), _series(updates, states, "realised")
    if x is None or y is None:
        return None
    return asdict(agreement_of(list(zip(x, y, strict=True)))) | {"detrended_spearman": _detrended_spearman(x, y)}


def _series(updates: Updates, states: str, name: str) -> Series | None:
    """One level of each run, update by update; None where it is not known for all updates."""
    runs = [[row[states][name] for row in rows] for rows in updates]
    return None if any(value is None for run in runs for value in run) else [np.array(run) for run in runs]


def _detrended_spearman(x: Series, y: Series) -> dict[str, float] | None:
    """The Spearman correlation without a cubic trend of each series; None for runs that are too short for that."""
    if min(map(len, x)) < TREND:
        return None
    return asdict(block_bootstrap([(detrended(a), detrended(b)) for a, b in zip(x, y, strict=True)], spearman))


def _explained(updates: Updates, states: str) -> dict[str, dict[str, Any]]:
    """r² of each level, and its difference to that of the level before, with and without the trend of a run. Each r² is
    of a line of that level alone: differences depend on the order of the levels, and can be below 0."""
    known = {name: found for name in LEVELS if (found := _series(updates, states, name)) is not None}
    realised = _series(updates, states, "realised")
    assert realised is not None
    found, before = {}, None
    for name, level in known.items():
        found[name] = {
            prefix + figure: value
            for prefix, change in (("", lambda values: values), ("detrended_", detrended))
            for figure, value in _r2(level, before, realised, change).items()
        }
        before = level
    return found


def _r2(level: Series, before: Series | None, realised: Series, change: Callable[..., Any]) -> dict[str, Any]:
    if change is detrended and min(map(len, level)) < TREND:
        return {"r2": None, "difference": None}
    runs = [tuple(map(change, run)) for run in zip(realised, level, before or level, strict=True)]
    r2 = block_bootstrap(runs, lambda y, x, _: pearson(x, y) ** 2)
    if before is None:
        return {"r2": asdict(r2), "difference": None}
    difference = block_bootstrap(runs, lambda y, x, other: pearson(x, y) ** 2 - pearson(other, y) ** 2)
    return {"r2": asdict(r2), "difference": asdict(difference)}


def _cheap(updates: Updates, states: str) -> dict[str, Any]:
    """Forecasts that a training can afford, and two that know nothing of polarity: each as it is, and in nats by a line
    that is fitted to the updates so far. The first update of a run has none before it and is left out."""
    realised, local, forecast = (_series(updates, states, name) for name in ("realised", "local", "forecast"))
    assert realised is not None
    assert local is not None
    in_nats = {
        "forecast": forecast,
        "the last change": [values[:-1] for values in realised],
        "the mean so far": [np.cumsum(values[:-1]) / np.arange(1, len(values)) for values in realised],
    }
    momenta = {row["momentum"] for rows in updates for row in rows}
    without_units = {"local": local}
    if len(momenta) == 1 and None not in momenta:
        without_units["momentum"] = [average(values, *momenta) for values in local]
    changes = [values[1:] for values in realised]
    rows = {
        name: _judged([values[-len(y) :] for values, y in zip(found, changes, strict=True)], changes, name in in_nats)
        for name, found in (without_units | in_nats).items()
        if found is not None
    }
    return rows | {"falls": float(np.mean(np.concatenate(changes) < 0))}


def _judged(forecast: Series, changes: Series, in_nats: bool) -> dict[str, Any]:
    """A forecast against the realised change. An error is the mean absolute one over the mean size of a change, on the
    updates after the first `FIRST`, where a line can be fitted as well."""
    pairs = list(zip(forecast, changes, strict=True))
    found = asdict(agreement_of(pairs))
    fitted = [(one_ahead(x, y)[FIRST - 1 :], y[FIRST - 1 :]) for x, y in pairs]
    long = min(len(y) for _, y in fitted) >= 3
    signs = asdict(agreement_of(fitted))["sign_agreement"] if long else None
    return {
        "spearman": found["spearman"],
        "detrended_spearman": _detrended_spearman(forecast, changes),
        "sign_agreement": found["sign_agreement"],
        "error": _error([(x[FIRST - 1 :], y[FIRST - 1 :]) for x, y in pairs]) if long and in_nats else None,
        "fitted": {"sign_agreement": signs, "error": _error(fitted)} if long else None,
    }


def _error(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    return asdict(block_bootstrap(pairs, lambda x, y: np.abs(x - y).mean(-1) / np.abs(y).mean(-1)))


def by_token(tokens: TokenAccount) -> dict[str, float | None]:
    """One update, token by token: the local formula against its own state's change, and T against exact polarity. A
    weighted share counts each token by |P|, as much as it presses; `falls` is the share whose change is negative, what
    "it falls" would have right. None where there are fewer than three tokens, or where nothing varies."""
    moved = (tokens.pressure != 0).numpy()
    sensitivity, exact = tokens.sensitivity.double().numpy(), tokens.exact_sensitivity.double().numpy()
    polarity, change = (tokens.pressure * tokens.sensitivity).double().numpy(), tokens.change.double().numpy()
    together, of_state = _by_state(tokens)
    agreements = {
        "local": _compared(polarity[moved], change[moved], np.abs(polarity[moved])),
        "state": _compared(together, of_state, np.abs(together)),
        "sensitivity": _compared(sensitivity, exact, np.abs(polarity)) | {"falls": None, "weighted_falls": None},
    }
    named = {f"{pair}_{figure}": value for pair, found in agreements.items() for figure, value in found.items()}
    return named | {"states": len(together)}


def _compared(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> dict[str, float | None]:
    if len(x) < 3:
        return dict.fromkeys(TOKEN_FIGURES)
    agree, fall = np.sign(x) == np.sign(y), y < 0
    total = weight.sum() or np.nan
    found = (spearman(x, y), sign_agreement(x, y), fall.mean(), weight @ agree / total, weight @ fall / total)
    return without_nan(dict(zip(TOKEN_FIGURES, map(float, found), strict=True)))


def _by_state(tokens: TokenAccount) -> tuple[np.ndarray, np.ndarray]:
    """Σ c T over all tokens of a state, and its change, for the states that were visited `VISITS` times or more."""
    _, place, visits = tokens.state.unique(return_inverse=True, return_counts=True)
    together, change = (
        torch.zeros(len(visits), dtype=torch.float64).index_add(0, place, column.double())
        for column in (tokens.pressure * tokens.sensitivity, tokens.change)
    )
    often = visits >= VISITS
    return together[often].numpy(), (change / visits)[often].numpy()


def asymmetry(tokens: dict[str, np.ndarray]) -> dict[str, Any]:
    """The asymmetry map of all tokens that were trained on, and how far C moves the threshold from e^-H."""
    p, entropy = tokens["p"], tokens["entropy"]
    border, plain = threshold(entropy, tokens["correction"].clip(min=0)), np.exp(-entropy)
    quantiles = zip(map(str, QUANTILES), np.quantile(border / plain, QUANTILES).tolist(), strict=True)
    area = ((0.0, 1.0), (0.0, float(entropy.max()) or 1.0))
    cells, p_edges, entropy_edges = np.histogram2d(p, entropy, bins=MAP, range=area)
    return {
        "tokens": len(p),
        "by_probability": by_probability(p, tokens["pressure"], tokens["sensitivity"], tokens["change"]),
        "threshold_over_exp_minus_entropy": dict(quantiles),
        "between": float(np.mean((p > plain) & (p < border))),
        "map": {"p": p_edges.tolist(), "entropy": entropy_edges.tolist(), "tokens": cells.astype(int).tolist()},
    }
