"""The pictures of the documentation, drawn by the reports' own charts from result files:

    pip install kaleido; python benchmarks/figures.py

Each goes to docs/figures as SVG and PNG; sources.json there says from which state of the result files. Needs a Chrome
or Chromium (BROWSER_PATH=/usr/bin/chromium where it is not found).
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from entropy_polarity.report.asymmetry import family_chart
from entropy_polarity.report.audit import audit_charts
from entropy_polarity.report.comparison import comparison_charts

ROOT = Path(__file__).resolve().parents[1]
RESULTS, FIGURES, SOURCES = ROOT / "benchmarks/results", ROOT / "docs/figures", "sources.json"
WIDTH = 1000

Draw = Callable[[dict[str, Any]], go.Figure]
# Name of the picture: result file, and the chart of it.
PICTURES: dict[str, tuple[str, Draw]] = {
    "audit": ("audit", lambda document: audit_charts(document)[0].figure),
    "exact": ("audit-held", lambda document: audit_charts(document)[1].figure),
    "asymmetry": ("audit", lambda document: family_chart(document["asymmetry"]["map"], document["vocabulary"]).figure),
    "ablation": ("ablation", lambda document: comparison_charts(document)[0].figure),
    "ablation-entropy": ("ablation", lambda document: comparison_charts(document)[3].figure),
}


def sources() -> dict[str, str]:
    """The result file of each picture, and its hash."""
    files = {name: RESULTS / f"{source}.json" for name, (source, _) in PICTURES.items()}
    return {name: f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for name, file in files.items()}


def main() -> None:
    FIGURES.mkdir(exist_ok=True)
    for name, (source, draw) in PICTURES.items():
        figure = draw(json.loads((RESULTS / f"{source}.json").read_text(encoding="utf-8")))
        figure.update_layout(paper_bgcolor="white", font_family="sans-serif")
        height = figure.to_dict()["layout"].get("height", 400)
        figure.write_image(FIGURES / f"{name}.svg", width=WIDTH, height=height)
        figure.write_image(FIGURES / f"{name}.png", width=WIDTH, height=height, scale=1.5)
    (FIGURES / SOURCES).write_text(json.dumps(sources(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
