"""The asymmetry map: which tokens expand entropy, in theory and in a run."""

from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from entropy_polarity.diagnostics.asymmetry import family_sensitivity
from entropy_polarity.report.html import Chart, blank_figure, short
from entropy_polarity.report.palette import DARK_GREEN, INK

VOCABULARIES, TAILS = (32, 1024, 32768, 151936), {"even": "others even", "zipf": "others Zipf"}
_CELLS, _HIGHEST = 45, 6.0  # a side of each map; nats, or as high as the tokens go
_BOUND = 0.4  # nats: what is beyond has the last colour


def map_chart(cells: dict[str, Any]) -> Chart:
    figure = blank_figure(height=380)
    p, entropy, count = _measured(cells)
    figure.add_heatmap(
        x=p,
        y=entropy,
        z=_drawn(np.log10(np.where(count > 0, count, np.nan))),
        colorscale="Blues",
        colorbar={"title": "tokens", "tickvals": list(range(6)), "ticktext": ["1", "10", "100", "10³", "10⁴", "10⁵"]},
        hovertemplate="p %{x}, H %{y}<extra></extra>",
    )
    figure.add_scatter(**_border(cells["entropy"][-1]))
    figure.update_layout(
        xaxis_title="p of the sampled token", yaxis_title="entropy of its state, nats", hovermode="closest"
    )
    return Chart(
        "Where a run's tokens lie",
        "Shade: how many tokens, on a logarithmic scale, by the probability of the sampled token and the entropy "
        "of its state. Left of the line p = e^-H a reinforced token expands the entropy; right of it, and a little "
        "further for what C adds, it contracts.",
        figure,
    )


def family_chart(cells: dict[str, Any] | None = None, vocabulary: int | None = None) -> Chart:
    """T for families of distributions, with `cells`, the measured tokens of a run, on the map whose vocabulary is the
    nearest to `vocabulary`: by default, that of the embedded policies, the smallest."""
    column = int(np.argmin(np.abs(np.log(np.array(VOCABULARIES) / (vocabulary or VOCABULARIES[0])))))
    density = f" Green: where the tokens of the run lie, on the map of V = {VOCABULARIES[column]:,}."
    return Chart(
        "What reinforcing a token does, for any vocabulary",
        "Colour: T in nats, blue where reinforcing the token expands the entropy, red where it contracts, by its "
        "probability and the entropy of its state. Above, all other tokens that are there are equally likely; below, "
        "they follow Zipf's law; no such state exists where there is no colour. The line is p = e^-H: where the "
        f"colour turns right of it, C has moved the threshold p*.{'' if cells is None else density}",
        _families(cells, column),
    )


def _families(cells: dict[str, Any] | None, own: int) -> go.Figure:
    figure = make_subplots(
        rows=len(TAILS),
        cols=len(VOCABULARIES),
        shared_xaxes=True,
        shared_yaxes=True,
        subplot_titles=[f"V = {size:,}" for size in VOCABULARIES],
        row_titles=list(TAILS.values()),
        horizontal_spacing=0.02,
        vertical_spacing=0.05,
    )
    margin = {"t": 30, "l": 60, "r": 60}
    figure.update_layout(blank_figure(height=520).layout, margin=margin, hovermode="closest", showlegend=False)
    p = (np.arange(_CELLS) + 0.5) / _CELLS
    highest = _HIGHEST if cells is None else max(_HIGHEST, cells["entropy"][-1])
    entropy = p * highest
    for row, tail in enumerate(TAILS, start=1):
        for column, size in enumerate(VOCABULARIES, start=1):
            sensitivity = family_sensitivity(*np.meshgrid(p, entropy), vocabulary=size, tail=tail)
            figure.add_heatmap(
                x=[*map(short, p)],
                y=[*map(short, entropy)],
                z=_drawn(sensitivity),
                colorscale="RdBu",
                zmin=-_BOUND,
                zmax=_BOUND,
                showscale=row == column == 1,
                colorbar={"title": "T, nats", "thickness": 12, "x": 1.05},
                hovertemplate="p %{x}, H %{y}: T %{z}<extra></extra>",
                row=row,
                col=column,
            )
            figure.add_scatter(**_border(highest), row=row, col=column)
        if cells is not None:
            p_run, entropy_run, count = _measured(cells)
            figure.add_contour(
                x=p_run,
                y=entropy_run,
                z=_drawn(np.log10(1 + count)),
                contours={"coloring": "none", "start": 1, "end": 5, "size": 1},
                line={"color": DARK_GREEN, "width": 1},
                showscale=False,
                hoverinfo="skip",
                row=row,
                col=own + 1,
            )
    figure.update_xaxes(title="p", row=len(TAILS), range=[0, 1])
    figure.update_yaxes(title="H, nats", col=1)
    figure.update_yaxes(range=[0, highest])
    return figure


def _measured(cells: dict[str, Any]) -> tuple[list[float], list[float], np.ndarray]:
    """Middles of the cells in p and H, and how many tokens lie in each, H down the rows."""
    edges = (np.array(cells[name]) for name in ("p", "entropy"))
    p, entropy = ([*map(short, (e[1:] + e[:-1]) / 2)] for e in edges)
    return p, entropy, np.array(cells["tokens"], dtype=float).T


def _border(highest: float) -> dict[str, Any]:
    heights = np.linspace(0, highest, 100)
    x, y = ([*map(short, values)] for values in (np.exp(-heights), heights))
    return {"x": x, "y": y, "mode": "lines", "line": {"color": INK}, "name": "p = e^-H"}


def _drawn(values: np.ndarray) -> list[list[float | None]]:
    return [[None if np.isnan(value) else short(value) for value in row] for row in values]
