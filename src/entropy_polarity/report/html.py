"""What all pages share: self-contained HTML from a template, charts that look alike, one way to smooth."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader
from plotly.offline import get_plotlyjs


class Chart(NamedTuple):
    """A figure under its title and the sentences that say what it shows."""

    title: str
    text: str
    figure: go.Figure


def render(template: str, charts: Sequence[Chart], **values: Any) -> str:
    """The page `template` with everything it needs inside. All text that is not ours is escaped."""
    templates = Environment(loader=PackageLoader("entropy_polarity.report"), autoescape=True)
    options: dict[str, Any] = {"displayModeBar": False, "responsive": True}
    drawn = [
        {
            "title": chart.title,
            "text": chart.text,
            "html": chart.figure.to_html(
                full_html=False, include_plotlyjs=False, div_id=f"chart-{number}", config=options
            ),
        }
        for number, chart in enumerate(charts)
    ]
    return templates.get_template(template).render(charts=drawn, plotly=get_plotlyjs(), **values)


def blank_figure(height: int = 280) -> go.Figure:
    return go.Figure(
        layout={
            "template": "plotly_white",
            "height": height,
            "margin": {"l": 48, "r": 12, "t": 8, "b": 40},
            "legend": {"orientation": "h", "y": 1.12, "x": 0},
            "hovermode": "x unified",
            "font": {"family": "system-ui, sans-serif", "size": 12},
        }
    )


def pass_at_k_axes(figure: go.Figure, sizes: Sequence[str]) -> None:
    """k as powers of two, probabilities from 0 to 1."""
    figure.update_xaxes(type="log", tickvals=[int(k) for k in sizes], ticktext=list(sizes))
    figure.update_layout(xaxis_title="k", yaxis_rangemode="tozero", yaxis_range=[0, 1])


def short(value: float) -> float:
    """Four digits: more make the page heavy and cannot be seen."""
    return float(f"{value:.4g}")


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and those before it, `window` at most.

    >>> smoothed([1.0, 2.0, 6.0], window=2)
    [1.0, 1.5, 4.0]
    """
    parts = [values[max(0, i - window + 1) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]
