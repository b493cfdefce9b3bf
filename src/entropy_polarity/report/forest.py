"""Differences to a baseline as a picture, and the colours that tell labels apart in it and beside it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from entropy_polarity.report.html import blank_figure
from entropy_polarity.report.html import label as label_of
from entropy_polarity.report.intervals import between

# Okabe and Ito's colours, which colour-blind eyes tell apart (black is the baselines' zero line, yellow too faint);
# where there are more methods than colours, dashes and markers tell them apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#6b4c9a")
_DASHES = ("solid", "dash", "dot", "dashdot")
_MARKERS = ("circle", "square", "diamond", "cross")
_INK = "#1d2129"


def styles(labels: list[str]) -> dict[str, dict[str, str]]:
    """Colour, dash and marker of each method, the same in every chart."""
    count = len(_COLOURS)
    return {
        label: {
            "colour": _COLOURS[i % count],
            "dash": _DASHES[i // count % len(_DASHES)],
            "marker": _MARKERS[i // count % len(_MARKERS)],
        }
        for i, label in enumerate(labels)
    }


def forest(
    rows: Mapping[str, Mapping[str, Any]], names: Sequence[str], looks: Mapping[str, Mapping[str, str]]
) -> go.Figure:
    """For each label of `rows` its differences, one panel for each of `names`.

    A difference holds "difference", "bootstrap" and "t": (low, high), or None where it is not known.
    """
    figure = make_subplots(
        rows=1, cols=len(names), shared_yaxes=True, subplot_titles=[*map(label_of, names)], horizontal_spacing=0.03
    )
    figure.update_layout(blank_figure(height=110 + 34 * len(rows)).layout, margin={"t": 30, "l": 120})
    for column, name in enumerate(names, start=1):
        for label, row in rows.items():
            for trace in _interval_traces(label, row[name], looks[label]):
                figure.add_trace(trace, row=1, col=column)
        figure.update_xaxes(range=_room([row[name] for row in rows.values()]), col=column)
    figure.update_yaxes(
        ticksuffix="  ", autorange="reversed", categoryorder="array", categoryarray=[*map(label_of, rows)]
    )
    figure.update_xaxes(zeroline=True, zerolinecolor=_INK, zerolinewidth=1)
    figure.update_layout(showlegend=False, hovermode="closest")
    return figure


def _interval_traces(label: str, number: Mapping[str, Any], style: Mapping[str, str]) -> Iterator[go.Scatter]:
    """The t interval thin, the bootstrap interval thick, the difference as a point."""
    for bounds, width in ((number["t"], 1.5), (number["bootstrap"], 5)):
        if bounds:
            line = {"color": style["colour"], "width": width}
            yield go.Scatter(x=bounds, y=[label_of(label)] * 2, mode="lines", line=line, hoverinfo="skip")
    shown = between(number["bootstrap"])
    yield go.Scatter(
        x=[number["difference"]],
        y=[label_of(label)],
        mode="markers",
        marker={"color": "white", "size": 9, "symbol": style["marker"], "line": {"color": style["colour"], "width": 2}},
        hovertemplate=f"%{{y}}: %{{x:+.3f}} {shown}<extra></extra>",
    )


def _room(numbers: list[Mapping[str, Any]]) -> list[float]:
    """From the lowest to the highest bound, zero included, and a little more, so that no bar ends at the frame."""
    drawn = [[number["difference"], *(number["bootstrap"] or []), *(number["t"] or [])] for number in numbers]
    bounds = [0.0, *(bound for row in drawn for bound in row)]
    spare = 0.05 * (max(bounds) - min(bounds)) or 0.01
    return [min(bounds) - spare, max(bounds) + spare]
