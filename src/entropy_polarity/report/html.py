"""The parts that all pages share: self-contained HTML from a template, charts that look alike, one way to smooth.

A page shows text of other people, so three things hold for all: text is escaped and made printable where it is put in,
none is longer than `MAX_TEXT` characters, and a policy in the page itself lets a browser run its two scripts and
nothing else, and load nothing from anywhere.
"""

import base64
import functools
import hashlib
import html
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from jinja2 import ChainableUndefined, Environment, PackageLoader
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from entropy_polarity.report.intervals import bars
from entropy_polarity.report.palette import Look
from entropy_polarity.support.text import cut, one_line, printable

MAX_TEXT = 4000  # characters of one text
MAX_LABEL = 120  # characters of a name in a chart
MAX_POINTS = 2000  # of a line

_DRAW = """
for (const chart of document.querySelectorAll(".chart")) {
  const figure = JSON.parse(chart.nextElementSibling.textContent);
  Plotly.newPlot(chart, figure.data, figure.layout, {displayModeBar: false, responsive: true});
}
"""


class Chart(NamedTuple):
    """A figure under its title and the sentences that say what it shows."""

    title: str
    text: str
    figure: go.Figure


def render(template: str, title: str, document: Any, charts: Sequence[Chart], **values: Any) -> str:
    """The page `template` of a result document or a run, with everything it needs inside."""
    templates = Environment(
        loader=PackageLoader("entropy_polarity.report"),
        autoescape=True,
        finalize=_shown,
        undefined=ChainableUndefined,  # files of other versions lack some keys
    )
    templates.filters["listed"] = _listed
    values["charts"] = [chart._asdict() | {"figure": _as_json(chart.figure)} for chart in charts]
    return templates.get_template(template).render(title=title, document=document, **_scripts(), **values)


@functools.cache
def _scripts() -> dict[str, Markup]:
    """Plotly, what draws with it, and the policy of a page that runs both: scripts are known by their hashes."""
    plotly = get_plotlyjs().replace("\r\n", "\n").replace("\r", "\n")  # as a browser reads it
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in (plotly, _DRAW))
    allowed = " ".join(f"'sha256-{found}'" for found in hashes)
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    return {"plotly": Markup(plotly), "draw": Markup(_DRAW), "policy": Markup(policy)}


def _as_json(figure: go.Figure) -> Markup:
    """For an element that no browser runs; nothing in it can end that element."""
    return Markup(str(figure.to_json()).replace("<", "\\u003c"))


def _shown(value: Any) -> Any:
    return value if isinstance(value, Markup) else cut(printable(value), MAX_TEXT)


def _listed(settings: Any) -> str:
    """Names and values of a table in a line; of a file of other people it may be no table."""
    if not isinstance(settings, Mapping):
        return str(settings)
    return ", ".join(f"{name} = {value}" for name, value in settings.items())


def label_of(text: Any) -> str:
    """A name as plotly may have it, which takes some tags in a text for markup."""
    return html.escape(one_line(text, MAX_LABEL))


def legend_beside(figure: go.Figure, count: int, lowest: int = 380) -> None:
    """A legend for `count` lines beside the chart, which grows with it: above, many lines would be covered."""
    figure.update_layout(
        height=max(lowest, 90 + 20 * count), showlegend=count > 1, legend={"orientation": "v", "x": 1.01, "y": 1}
    )


def thinned(values: Sequence[Any] | np.ndarray) -> list[Any]:
    """At most about `MAX_POINTS` of the values, evenly spread, and the last: more cannot be told apart on a page."""
    stride = -(-len(values) // MAX_POINTS) or 1
    return [*values[:-1:stride], *values[-1:]]


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


def add_curve_over_k(figure: go.Figure, name: str, points: Mapping[str, Mapping[str, Any]], look: Look) -> None:
    """Add a line through the value at each k, with its interval where `points` has one: k on a logarithmic axis,
    probabilities from 0 to 1."""
    sizes = [int(k) for k in points]
    figure.add_scatter(
        x=sizes,
        y=[point["value"] for point in points.values()],
        name=label_of(name),
        mode="lines+markers",
        line={"color": look.colour, "dash": look.dash},
        marker={"symbol": look.marker},
        error_y=bars(points.values()) if any("low" in point for point in points.values()) else None,
    )
    figure.update_xaxes(type="log", tickvals=sizes, ticktext=list(points))
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
