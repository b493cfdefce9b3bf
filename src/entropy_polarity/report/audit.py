"""The page of an audit: one self-contained HTML file with tables and pictures."""

import itertools
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from entropy_polarity.report.asymmetry import family_chart, map_chart
from entropy_polarity.report.html import Chart, blank_figure, render, short, thinned
from entropy_polarity.report.palette import COLOURS, INK
from entropy_polarity.report.tables.audit import audit_tables, probability

_LEVELS = ("local", "shared", "preconditioned", "exact")


def render_audit(document: dict[str, Any]) -> str:
    """The page of an audit document (audit.json)."""
    title, runs = f"Audit on {document['recipe']['task']['name']}", document["runs"]
    updates, seeds = sum(len(run["updates"]) for run in runs), [run["seed"] for run in runs]
    charts, tables = audit_charts(document), audit_tables(document)
    return render("audit.html", title, document, charts, tables=tables, seeds=seeds, updates=updates)


def audit_charts(document: dict[str, Any]) -> list[Chart]:
    return [
        Chart(
            "Predicted and realised change, update by update",
            "Each point is one update; colours are seeds, open points held-out states. A prediction to be trusted "
            "lies on a line through the origin. The two on the left are per unit of step size, the others in nats.",
            _scatter(document["runs"]),
        ),
        Chart(
            "The entropy, and what was predicted of it",
            "Realised changes of the trained-on states added up from the first update (solid), and their exact "
            "first-order predictions (dotted), in nats. They part where second order counts.",
            _sums(document["runs"]),
        ),
        map_chart(document["asymmetry"]["map"]),
        family_chart(document["asymmetry"]["map"], document["vocabulary"]),
        Chart(
            "Who expands, who contracts",
            "The share of Σ|P| of each tenth of the tokens, from the rarest to the most probable: above zero "
            "expansion, below contraction. Reinforced tokens are filled, discouraged ones hatched.",
            _deciles(document["asymmetry"]["by_probability"]),
        ),
    ]


def _scatter(runs: list[dict[str, Any]]) -> go.Figure:
    names = [name for name in _LEVELS if runs[0]["updates"][0]["batch"][name] is not None]
    figure = make_subplots(rows=1, cols=len(names), shared_yaxes=True, subplot_titles=names, horizontal_spacing=0.03)
    figure.update_layout(blank_figure(height=340).layout, margin={"t": 30, "l": 80}, hovermode="closest")
    for column, name in enumerate(names, start=1):
        for run, colour in zip(runs, itertools.cycle(COLOURS), strict=False):
            for states, symbol in (("batch", "circle"), ("held_out", "circle-open")):
                points = [row[states] for row in thinned(run["updates"])]
                figure.add_scatter(
                    x=[short(point[name]) for point in points],
                    y=[short(point["realised"]) for point in points],
                    mode="markers",
                    marker={"color": colour, "symbol": symbol, "size": 6},
                    name=f"seed {run['seed']}, {states.replace('_', ' ')}",
                    showlegend=False,
                    row=1,
                    col=column,
                )
    for update in (figure.update_xaxes, figure.update_yaxes):
        update(zeroline=True, zerolinecolor=INK, zerolinewidth=1)
    figure.update_yaxes(title="realised change, nats", col=1)
    return figure


def _sums(runs: list[dict[str, Any]]) -> go.Figure:
    figure = blank_figure(height=300)
    for run, colour in zip(runs, itertools.cycle(COLOURS), strict=False):
        steps = thinned([row["step"] for row in run["updates"]])
        for name, dash in (("realised", "solid"), ("exact", "dot")):
            sums = np.cumsum([row["batch"][name] for row in run["updates"]])
            figure.add_scatter(
                x=steps,
                y=[*map(short, thinned(sums))],
                name=f"seed {run['seed']}, {name}",
                line={"color": colour, "dash": dash},
            )
    figure.update_layout(xaxis_title="update", yaxis_title="nats")
    return figure


def _deciles(rows: list[dict[str, Any]]) -> go.Figure:
    figure = blank_figure(height=320)
    for sign, pattern in (("positive", ""), ("negative", "/")):
        chosen = [row for row in rows if row["advantage"] == sign]
        labels = [f"{probability(row['from'])} to {probability(row['to'])}" for row in chosen]
        word = "reinforced" if sign == "positive" else "discouraged"
        for part, colour, way in (("expansion", COLOURS[0], 1), ("contraction", COLOURS[1], -1)):
            figure.add_bar(
                x=labels,
                y=[short(way * row[part]) for row in chosen],
                name=f"{part}, {word}",
                marker={"color": colour, "pattern": {"shape": pattern}},
            )
    figure.update_layout(
        barmode="relative", xaxis_title="p of the sampled token", yaxis_title="share of Σ|P|", yaxis_tickformat=".0%",
        legend={"orientation": "v", "x": 1.01, "y": 1},
    )  # fmt: skip
    figure.update_xaxes(type="category")
    return figure
