"""docs/results.md from the result files: python benchmarks/results_page.py."""

import json
from pathlib import Path
from typing import Any

import regime
import thermostat
from blocks import filled, markdown

from entropy_polarity.report.tables import TextTable, comparison_tables, search_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results", ROOT / "docs/results.md"
MISSING = "Not measured yet."
SEARCHES = ("search", "papo")
COMPARISONS = ("screen", "comparison-3", "comparison-4")


def page(text: str, folder: Path = RESULTS) -> str:
    """The page with every marked block written anew."""
    held = _read(folder / "thermostat.json")
    collapse = _read(folder / "regime.json")
    blocks = {
        "thermostat": thermostat.table(held["runs"]) if held else MISSING,
        "thermostat:disturbances": thermostat.disturbances(held["runs"]) if held else MISSING,
        "regime": regime.table(collapse["runs"]) if collapse else MISSING,
    }
    for name in SEARCHES:
        searched = _read(folder / f"{name}.json")
        blocks[name] = _markdown(search_table(searched)) if searched else MISSING
    for name in COMPARISONS:
        compared = _read(folder / f"{name}.json")
        tables = comparison_tables(compared["summary"]) if compared else []
        blocks[name] = "\n\n".join(f"{t.title}\n\n{_markdown(t)}" for t in tables) or MISSING
    return filled(text, blocks, PAGE.name)


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def _markdown(table: TextTable) -> str:
    return markdown([column.name for column in table.columns], table.rows)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
