"""The forest plot: differences to a baseline with their intervals, as a picture."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from entropy_polarity.report.html import blank_figure, label_of
from entropy_polarity.report.intervals import between
from entropy_polarity.report.palette import INK, Look


def forest_plot(rows: Mapping[str, Mapping[str, Any]], names: Sequence[str], looks: Mapping[str, Look]) -> go.Figure:
    """For each label of `rows` its differences, one panel for each of `names`. A difference holds "difference",
    "bootstrap" and "t": (low, high), or None where it is not known."""
    figure = make_subplots(
        rows=1, cols=len(names), shared_yaxes=True, subplot_titles=[*map(label_of, names)], horizontal_spacing=0.03
    )
    figure.update_layout(blank_figure(height=110 + 34 * len(rows)).layout, margin={"t": 30, "l": 120})
    for column, name in enumerate(names, start=1):
        for label, row in rows.items():
            for trace in _interval_traces(label, row[name], looks[label]):
                figure.add_trace(trace, row=1, col=column)
        figure.update_xaxes(range=_range([row[name] for row in rows.values()]), col=column)
    figure.update_yaxes(
        ticksuffix="  ", autorange="reversed", categoryorder="array", categoryarray=[*map(label_of, rows)]
    )
    figure.update_xaxes(zeroline=True, zerolinecolor=INK, zerolinewidth=1)
    figure.update_layout(showlegend=False, hovermode="closest")
    return figure


def _interval_traces(label: str, number: Mapping[str, Any], look: Look) -> Iterator[go.Scatter]:
    """The t interval thin, the bootstrap interval thick, the difference as a point."""
    for bounds, width in ((number["t"], 1.5), (number["bootstrap"], 5)):
        if bounds:
            line = {"color": look.colour, "width": width}
            yield go.Scatter(x=bounds, y=[label_of(label)] * 2, mode="lines", line=line, hoverinfo="skip")
    yield go.Scatter(
        x=[number["difference"]],
        y=[label_of(label)],
        mode="markers",
        marker={"color": "white", "size": 9, "symbol": look.marker, "line": {"color": look.colour, "width": 2}},
        hovertemplate=f"%{{y}}: %{{x:+.3f}} {between(number['bootstrap'])}<extra></extra>",
    )


def _range(numbers: list[Mapping[str, Any]]) -> list[float]:
    """From the lowest to the highest bound, zero included, and a little more, so that no bar ends at the frame."""
    drawn = [[number["difference"], *(number["bootstrap"] or []), *(number["t"] or [])] for number in numbers]
    bounds = [0.0, *(bound for row in drawn for bound in row)]
    spare = 0.05 * (max(bounds) - min(bounds)) or 0.01
    return [min(bounds) - spare, max(bounds) + spare]
