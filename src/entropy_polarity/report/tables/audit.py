"""The tables of an audit."""

import math
from typing import Any

from entropy_polarity.report.intervals import estimated
from entropy_polarity.report.tables.text import Column, TextTable

_LEVELS = {
    "local": "local: Σ c T",
    "shared": "shared: -<g, G>",
    "preconditioned": "preconditioned: -η <g, M G>",
    "exact": "exact: <g, δθ>",
}
_INTERVALS = (
    "in brackets 95 % block-bootstrap intervals, which are short where updates hang together for long; a dash for runs "
    "of too few updates"
)
_DETRENDED = "Spearman of what a cubic in the update's number leaves of both: curves that only fall together have none."
_MISSING = "-"  # not known of this audit


def audit_tables(document: dict[str, Any]) -> list[TextTable]:
    """The levels on both sets of states, what each explains, the forecasts, the tokens, and what each tenth does."""
    constants = document["constants"]
    states = {"on the states that were trained on": document, "on held-out states": document["held_out"]}
    return [
        *(_levels(found, f"Predicted and realised change, {where}") for where, found in states.items()),
        *(_cheap(found["cheap"], f"Forecasts, {where}", constants) for where, found in states.items()),
        *(_explained(found["explained"], f"r² of each level, {where}") for where, found in states.items()),
        _tokens(document["tokens"], constants),
        _threshold(document["asymmetry"]),
        _by_probability(document["asymmetry"]),
    ]


def _levels(levels: dict[str, Any], title: str) -> TextTable:
    columns = [
        Column(
            "prediction",
            "Of the change of the mean entropy by one update, from what knows least to what knows most: every state on "
            "its own; all tokens move the same parameters; along the step that the optimiser's learning rate and "
            "metric make of the gradient; along the step that was made, momentum and decay included.",
        ),
        Column("Pearson", f"Correlation with the realised change over updates; {_INTERVALS}."),
        Column("Spearman", "The same of ranks."),
        Column("without the trend", _DETRENDED),
        Column("signs", "Share of updates whose predicted and realised change have one sign."),
        Column("slope", "Of the line that predicts best; nats per unit of the prediction. 1 is best for the last two."),
        Column("offset", "What that line adds to every update, in nats."),
    ]
    figures = ("pearson", "spearman", "detrended_spearman", "sign_agreement", "slope", "offset")
    rows = [
        [text, *(_estimate(levels[name][figure]) for figure in figures)]
        for name, text in _LEVELS.items()
        if levels[name] is not None
    ]
    return TextTable(title, columns, rows)


def _cheap(cheap: dict[str, Any], title: str, constants: dict[str, Any]) -> TextTable:
    part, every, first = round(1 / constants["share"]), constants["every"], constants["first"]
    columns = [
        Column(
            "forecast",
            "Of the change of the mean entropy by one update, with what a training has at hand; the first update of a "
            "run, before which nothing has come, is left out.",
        ),
        Column(
            "costs",
            "Local and momentum are made of what the training pass gives anyway. Momentum is the local prediction, "
            f"averaged over updates as the optimiser averages its gradients. The forecast is <ḡ, δθ>, ḡ from 1/{part} "
            f"of the sequences of every {every}. update, averaged. The last change is that of the update before, the "
            "mean so far that of all before: they need no polarity, but a measurement.",
        ),
        Column("Spearman", f"Correlation of ranks with the realised change; {_INTERVALS}."),
        Column("without the trend", _DETRENDED),
        Column("signs", "Share of updates whose forecast and realised change have one sign."),
        Column(
            "error",
            f"Of what is in nats: the mean absolute error over the mean size of a change, after the first {first} "
            "updates of a run.",
        ),
        Column("signs, fitted", "Of the line κ x + b that is fitted to the updates before, on the same updates."),
        Column("error, fitted", "The error of that line."),
    ]
    costs = {"forecast": f"a backward pass over 1/{part * every}", "local": "nothing", "momentum": "nothing"}
    rows = []
    for name, found in cheap.items():
        if name == "falls":
            continue
        figures = [_estimate(found[key]) for key in ("spearman", "detrended_spearman", "sign_agreement")]
        error = "" if name in ("local", "momentum") else _estimate(found["error"])
        fitted = found["fitted"] or {"sign_agreement": None, "error": None}
        of_line = (_estimate(fitted[key]) for key in ("sign_agreement", "error"))
        rows.append([name, costs.get(name, "a measurement"), *figures, error, *of_line])
    return TextTable(title, columns, [*rows, ['"it falls"', "nothing", "", "", f"{cheap['falls']:.3g}", "", "", ""]])


def _explained(explained: dict[str, Any], title: str) -> TextTable:
    difference = (
        "r² minus that of the row above. Each r² is of one prediction alone, so that this is no share of the variance, "
        "depends on the order of the rows, and can be below 0."
    )
    columns = [
        Column("prediction", "As above."),
        Column("r²", f"Squared correlation with the realised change; {_INTERVALS}."),
        Column("difference", difference),
        Column("r² without the trend", "The same of what a cubic in the update's number leaves of both."),
        Column("difference without the trend", difference),
    ]
    figures = ("r2", "difference", "detrended_r2", "detrended_difference")
    rows = [
        [_LEVELS[name], *("" if i == 0 and "difference" in key else _estimate(found[key]) for key in figures)]
        for i, (name, found) in enumerate(explained.items())
    ]
    return TextTable(title, columns, rows)


def _tokens(tokens: dict[str, float | None], constants: dict[str, Any]) -> TextTable:
    columns = [
        Column("token by token", "Means over updates, each over the tokens of one update."),
        Column("Spearman", "Correlation of ranks."),
        Column("signs", "Share with one sign."),
        Column("falls", 'Share whose change is negative: what "it falls" has right.'),
        Column("signs, by |P|", "The same share, each counted by |P|: as much as it presses."),
        Column("falls, by |P|", 'What "it falls" has right of that.'),
    ]
    pairs = {
        "local": "P and the change of its own state",
        "state": f"Σ c T of a state that was visited {constants['visits']} times or more, and its change",
        "sensitivity": "T and exact T*, on the mean entropy",
    }
    figures = ("spearman", "sign_agreement", "falls", "weighted_sign_agreement", "weighted_falls")
    rows = []
    for name, text in pairs.items():
        if tokens[f"{name}_spearman"] is None:
            continue
        cells = [text]
        for figure in figures:
            value = tokens.get(f"{name}_{figure}")
            none = "" if name == "sensitivity" and "falls" in figure else _MISSING
            cells.append(none if value is None else f"{value:.3f}")
        rows.append(cells)
    return TextTable("Tokens", columns, rows)


def _threshold(asymmetry: dict[str, Any]) -> TextTable:
    quantiles = asymmetry["threshold_over_exp_minus_entropy"]
    meaning = "Quantile over tokens of p* e^H: by what factor C moves the threshold p* up from e^-H."
    columns = [
        *(Column(f"{float(name):.0%}", meaning) for name in quantiles),
        Column("between", "Share of tokens with e^-H < p < p*: they would be misjudged without C."),
    ]
    row = [*(f"{value:.3f}" for value in quantiles.values()), f"{asymmetry['between']:.1%}"]
    return TextTable("The threshold", columns, [row])


def _by_probability(asymmetry: dict[str, Any]) -> TextTable:
    columns = [
        Column(
            "p", "Probability of the sampled token, lowest and highest: a tenth of all tokens with A ≠ 0 in each range."
        ),
        Column("A", "Sign of the advantage: + is reinforced."),
        Column("tokens", "Share of all tokens with A ≠ 0."),
        Column("contract", "Share of these tokens whose polarity P is negative."),
        Column("expansion", "Their share of Σ|P| over all tokens where P > 0."),
        Column("contraction", "Their share of Σ|P| over all tokens where P < 0."),
        Column("change", "Mean realised change of the entropy of their own states in one update, in nats."),
    ]
    rows = [
        [
            f"{probability(row['from'])} to {probability(row['to'])}",
            "+" if row["advantage"] == "positive" else "-",
            *(f"{row[name]:.1%}" for name in ("share", "contracting", "expansion", "contraction")),
            f"{row['change']:+.5f}",
        ]
        for row in asymmetry["by_probability"]
    ]
    return TextTable("Who expands, who contracts", columns, rows)


def probability(p: float) -> str:
    """Near 1 by what is missing."""
    return f"1 - {1 - p:.1g}" if 0.99 < p < 1 else f"{p:.3g}"


def _estimate(estimate: dict[str, float | None] | None) -> str:
    if estimate is None or estimate["value"] is None or math.isnan(estimate["value"]):
        return _MISSING
    return estimated(estimate, ".3g")
