"""The page of a comparison: one self-contained HTML file with tables, differences and curves."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import plotly.graph_objects as go

from entropy_polarity.report.forest import forest_plot
from entropy_polarity.report.html import (
    Chart,
    add_curve_over_k,
    blank_figure,
    label_of,
    legend_beside,
    render,
    short,
    smoothed,
    thinned,
)
from entropy_polarity.report.palette import GREY, Look, looks_of, transparent
from entropy_polarity.report.tables.comparison import comparison_tables, score_names

_SMOOTH = 10  # rollouts


def render_comparison(document: dict[str, Any]) -> str:
    """The page of a comparison document (comparison.json)."""
    title, charts = f"Comparison on {document['plan']['recipe']}", comparison_charts(document)
    commits = sorted({run["commit"] or "installed package" for run in document["runs"]})
    tables = comparison_tables(document["summary"])
    return render("comparison.html", title, document, charts, tables=tables, commits=commits)


def comparison_charts(document: dict[str, Any]) -> list[Chart]:
    summary = document["summary"]
    return [*_forests(summary), *_curves(document["runs"]), _pass_at_k(summary)]


def _forests(summary: dict[str, Any]) -> Iterator[Chart]:
    """For each baseline the paired differences of all others, one panel a score."""
    looks = looks_of(list(summary["methods"]))
    names = [name for name in score_names(summary) if name != "greedy"]
    for baseline, rows in summary["against"].items():
        if paired := {label: row for label, row in rows.items() if row["seeds"]}:
            yield Chart(
                f"Difference to {baseline}, held out",
                f"Each method minus {baseline} on the same seeds and problems; right of zero is better. Thick: 95 % "
                "bootstrap interval over seeds and problems. Thin: 95 % interval of Student's t over seeds, not drawn "
                "for a single seed.",
                forest_plot(paired, names, looks),
            )


def _curves(runs: list[dict[str, Any]]) -> Iterator[Chart]:
    legend = "Band: lowest to highest seed. A click on a name hides a method, a double click shows it alone."
    yield Chart(
        "Reward in training",
        f"Mean reward of each rollout batch, averaged over ten rollouts, then over seeds. {legend}",
        _seed_curves(runs, "reward"),
    )
    yield Chart(
        "Entropy in training",
        f"Mean entropy of the policy at the tokens it wrote, in nats, averaged likewise. {legend}",
        _seed_curves(runs, "entropy"),
    )


def _seed_curves(runs: list[dict[str, Any]], name: str) -> go.Figure:
    """A line and a band for each method, as far as all of its seeds have come."""
    labels = list(dict.fromkeys(run["label"] for run in runs))
    figure = blank_figure()
    for label, look in looks_of(labels).items():
        curves = [run[name] for run in runs if run["label"] == label]
        length = min(len(curve["values"]) for curve in curves)
        steps = thinned(curves[0]["steps"][:length])
        values = np.array([curve["values"][:length] for curve in curves], dtype=float)
        rows = np.array([smoothed(list(row), _SMOOTH) for row in values])
        line = {"color": look.colour, "width": 2, "dash": look.dash}
        shared = {"x": steps, "mode": "lines", "legendgroup": label}
        if len(rows) > 1:
            edge = shared | {"line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
            band = {"fill": "tonexty", "fillcolor": transparent(look.colour, 0.12)}
            figure.add_scatter(y=_shown(rows.min(axis=0)), **edge)
            figure.add_scatter(y=_shown(rows.max(axis=0)), **edge, **band)
        figure.add_scatter(y=_shown(rows.mean(axis=0)), name=label_of(label), line=line, **shared)
    legend_beside(figure, len(labels))
    figure.update_layout(xaxis_title="step", showlegend=True)
    return figure


def _pass_at_k(summary: dict[str, Any]) -> Chart:
    methods, figure = summary["methods"], blank_figure()
    before = next(iter(methods.values()))["pass_at"]["before"]
    lines = [("before training", before, Look(GREY, "dot", "circle"))]
    lines += [(label, methods[label]["pass_at"]["after"], look) for label, look in looks_of(list(methods)).items()]
    for label, curve, look in lines:
        add_curve_over_k(figure, label, {k: {"value": value} for k, value in curve.items()}, look)
    legend_beside(figure, len(methods))
    figure.update_layout(showlegend=True, yaxis_range=None, yaxis_rangemode="normal")
    return Chart(
        "pass@k, held out",
        "Unbiased pass@k before and after, mean over seeds and problems. pass@1 is what reinforcement raises; a pass@k "
        "at large k that ends below its start means that exploration died.",
        figure,
    )


def _shown(values: np.ndarray) -> list[float]:
    return [*map(short, thinned(values))]
