"""The numbers of an audit as text, for a terminal and a page alike; each column has a sentence that explains it."""

from typing import Any

from entropy_polarity.report.tables import Column, TextTable

_LEVELS = {
    "local": "local: Σ c T",
    "shared": "shared: -<g, G>",
    "preconditioned": "preconditioned: -η <g, M G>",
    "exact": "exact: <g, δθ>",
}
_STATES = {"batch": "on the states that were trained on", "held_out": "on held-out states"}


def audit_tables(document: dict[str, Any]) -> list[TextTable]:
    """The levels on both sets of states, what closes the gap, the tokens, and what each decile of p_a does."""
    return [
        *(_levels(_of(document, states), f"Predicted and realised change, {text}") for states, text in _STATES.items()),
        *(_cheap(_of(document, states)["cheap"], f"Forecasts, {text}") for states, text in _STATES.items()),
        _gap(document),
        _tokens(document["tokens"]),
        _threshold(document["asymmetry"]),
        _by_probability(document["asymmetry"]),
    ]


def _of(document: dict[str, Any], states: str) -> dict[str, Any]:
    return document if states == "batch" else document[states]


def _levels(levels: dict[str, Any], title: str) -> TextTable:
    columns = [
        Column(
            "prediction",
            "Of the change of the mean entropy by one update, from what knows least to what knows most: every state on "
            "its own; all tokens move the same parameters; along the step that the optimiser's learning rate and "
            "metric make of the gradient; along the step that was made, momentum and decay included.",
        ),
        Column(
            "Pearson", "Correlation with the realised change over updates; in brackets 95 % block-bootstrap intervals."
        ),
        Column("Spearman", "The same of ranks."),
        Column("signs", "Share of updates whose predicted and realised change have one sign."),
        Column("slope", "Of the line that predicts best; nats per unit of the prediction. 1 is best for the last two."),
        Column("offset", "What that line adds to every update, in nats."),
    ]
    rows = [
        [text, *(_estimate(levels[name][key]) for key in ("pearson", "spearman", "sign_agreement", "slope", "offset"))]
        for name, text in _LEVELS.items()
        if levels[name] is not None
    ]
    return TextTable(title, columns, rows)


def _cheap(cheap: dict[str, Any], title: str) -> TextTable:
    columns = [
        Column("what foretells", "Of the change of the mean entropy by one update, with what a training has at hand."),
        Column(
            "costs",
            "Local and momentum are made of what the training pass gives anyway. Momentum is the local prediction, "
            "averaged over updates as the optimiser averages its gradients. The forecast is <ḡ, δθ>, ḡ from a "
            "sixteenth of the sequences of every second update, averaged. The last change is that of the update "
            "before: it needs no polarity, but a measurement.",
        ),
        Column(
            "Spearman", "Correlation of ranks with the realised change; in brackets 95 % block-bootstrap intervals."
        ),
        Column("signs", "Share of updates whose forecast and realised change have one sign."),
        Column(
            "signs, fitted",
            "The same of the line κ x + b that is fitted to the updates before, from the sixth update of a run on.",
        ),
        Column("error, fitted", "Of that line: the mean absolute error, over the mean size of a change."),
    ]
    costs = {"forecast": "a backward pass over 1/32", "the last change": "a measurement"}
    rows = [
        [
            name,
            costs.get(name, "nothing"),
            _estimate(found["spearman"]),
            _estimate(found["sign_agreement"]),
            *(
                (_estimate(found["fitted"]["sign_agreement"]), f"{found['fitted']['error']:.2f}")
                if found["fitted"]
                else ("too few updates", "")
            ),
        ]
        for name, found in cheap.items()
        if name != "falls"
    ]
    rows.append(['"it falls"', "nothing", "", f"{cheap['falls']:.3g}", "", ""])
    return TextTable(title, columns, rows)


def _gap(document: dict[str, Any]) -> TextTable:
    columns = [
        Column(
            "what the local formula leaves out", "Each row adds one thing; a level's r² is the square of its Pearson."
        ),
        *(
            Column(text, "By how much r² rises with it: a share of the variance of the realised change over updates.")
            for text in _STATES.values()
        ),
    ]
    gaps = [_of(document, states)["gap"] for states in _STATES]
    return TextTable(
        "What closes the gap", columns, [[name, *(f"{gap[name]:+.3f}" for gap in gaps)] for name in gaps[0]]
    )


def _tokens(tokens: dict[str, float | None]) -> TextTable:
    columns = [
        Column("token by token", "Means over updates, each over the tokens of one update."),
        Column("Spearman", "Correlation of ranks."),
        Column("signs", "Share of tokens with one sign."),
    ]
    pairs = {
        "local": "P and the change of its own state",
        "state": "Σ c T of a state that was visited 8 times or more, and its change",
        "sensitivity": "T and exact T*, on the mean entropy",
    }
    rows = [
        [text, f"{tokens[f'{name}_spearman']:.3f}", f"{tokens[f'{name}_sign_agreement']:.3f}"]
        for name, text in pairs.items()
        if tokens[f"{name}_spearman"] is not None
    ]
    return TextTable("Tokens", columns, rows)


def _threshold(asymmetry: dict[str, Any]) -> TextTable:
    quantiles = asymmetry["threshold_over_exp_minus_entropy"]
    columns = [
        *(
            Column(
                f"{float(name):.0%}",
                "Quantile over tokens of p* e^H: by what factor C moves the threshold p* up from e^-H.",
            )
            for name in quantiles
        ),
        Column("between", "Share of tokens with e^-H < p < p*: they would be misjudged without C."),
    ]
    return TextTable(
        "The threshold", columns, [[*(f"{value:.3f}" for value in quantiles.values()), f"{asymmetry['between']:.1%}"]]
    )


def _by_probability(asymmetry: dict[str, Any]) -> TextTable:
    columns = [
        Column("p", "Probability of the sampled token: a tenth of all tokens with A ≠ 0 in each range."),
        Column("A", "Sign of the advantage: + is reinforced."),
        Column("tokens", "Share of all tokens."),
        Column("contract", "Share of these tokens whose polarity P is negative."),
        Column("expansion", "Their share of Σ|P| over all tokens where P > 0."),
        Column("contraction", "Their share of Σ|P| over all tokens where P < 0."),
        Column("change", "Mean realised change of the entropy of their own states in one update, in nats."),
    ]
    rows = [
        [
            f"{row['from']:.3g} to {row['to']:.3g}",
            "+" if row["advantage"] == "positive" else "-",
            *(f"{row[name]:.1%}" for name in ("share", "contracting", "expansion", "contraction")),
            f"{row['change']:+.5f}",
        ]
        for row in asymmetry["by_probability"]
    ]
    return TextTable("Who expands, who contracts", columns, rows)


def _estimate(estimate: dict[str, float]) -> str:
    value, low, high = (f"{estimate[key]:.3g}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
