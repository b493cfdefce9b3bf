"""docs/results.md and the numbers of theory.md, scale.md and reliability.md in docs, from result files."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ablation
import coverage
import exact_sign
import levels
import opefo
import parts
import regime
import thermostat
import verl_driver
from blocks import filled, markdown
from reliability.table import table as reliability_table

from entropy_polarity.methods import name_of
from entropy_polarity.report.tables.audit import audit_tables
from entropy_polarity.report.tables.comparison import comparison_tables, search_table
from entropy_polarity.report.tables.text import TextTable

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE, THEORY = ROOT / "benchmarks/results", ROOT / "docs/results.md", ROOT / "docs/theory.md"
SCALE, RELIABILITY = ROOT / "docs/scale.md", ROOT / "docs/reliability.md"
MISSING = "Not measured yet."
SEARCHES = ("search", "papo")
COMPARISONS = (
    "screen",
    "comparison-3",
    "comparison-4",
    "gym",
    "guess",
    "guess-collapse",
    "guess-collapse-level",
    "keydoor",
    "ablation",
    "exact-sign",
)
# What an audit was varied in, by result file.
AUDITS = {
    "audit": "AdamW, learning rate 1e-4",
    "audit-small": "AdamW, learning rate 1e-5",
    "audit-held": "AdamW, the thermostat holding 0.6 nats",
    "audit-larger": "AdamW, learning rate 1e-4, 6 layers of width 256",
    "audit-sgd": "SGD without momentum, learning rate 0.1",
}


def page(text: str, folder: Path = RESULTS) -> str:
    """The page with every marked block written anew."""
    held = _read(folder / "thermostat.json")
    collapse = _read(folder / "regime.json")
    alone = _read(folder / "levels.json")
    blocks = {
        "thermostat": thermostat.table(held["runs"]) if held else MISSING,
        "thermostat:disturbances": thermostat.disturbances(held["runs"]) if held else MISSING,
        "regime": regime.table(collapse["runs"]) if collapse else MISSING,
        "levels": levels.table(alone["runs"]) if alone else MISSING,
    }
    for name in SEARCHES:
        searched = _read(folder / f"{name}.json")
        blocks[name] = _markdown(_renamed(search_table(searched), searched)) if searched else MISSING
    for name in COMPARISONS:
        compared = _read(folder / f"{name}.json")
        tables = [_renamed(t, compared) for t in comparison_tables(compared["summary"])] if compared else []
        blocks[name] = "\n\n".join(f"{t.title}\n\n{_markdown(t)}" for t in tables) or MISSING
    parted = _read(folder / "ablation.json")
    blocks["ablation:entropy"] = ablation.entropy(parted) if parted else MISSING
    signs = _read(folder / "exact-sign.json")
    blocks["exact-sign:control"] = exact_sign.control(signs) if signs else MISSING
    balanced = _read(folder / "opefo.json")
    blocks["opefo"] = opefo.table(balanced) if balanced else MISSING
    return filled(text, blocks, PAGE.name)


def _renamed(table: TextTable, document: dict[str, Any]) -> TextTable:
    """The table with today's name for a rule that had another when it was measured; the file stays as it is."""
    date = document["environment"]["date"]
    return replace(table, rows=[[name_of(row[0], date), *row[1:]] for row in table.rows])


def theory(text: str, folder: Path = RESULTS) -> str:
    """The page of the theory with the numbers of the audits written anew."""
    found = {name: document for name in AUDITS if (document := _read(folder / f"{name}.json"))}
    restricted = _read(folder / "parts.json")
    tables = audit_tables(found["audit"]) if "audit" in found else []
    covered = _read(folder / "coverage.json")
    blocks = {
        "audit": "\n\n".join(f"**{t.title}**\n\n{_markdown(t)}" for t in tables) or MISSING,
        "audit:variants": _variants(found) if found else MISSING,
        "audit:forecast": _forecasts(found) if found else MISSING,
        "audit:coverage": coverage.table(covered) if covered else MISSING,
        "audit:few": coverage.tables_of_few(covered) if covered else MISSING,
        "audit:parts": parts.table(restricted) if restricted else MISSING,
    }
    return filled(text, blocks, THEORY.name)


def scale(text: str, folder: Path = RESULTS) -> str:
    """The page for several machines, with the driver's work written anew."""
    measured = _read(folder / "verl_driver.json")
    return filled(text, {"verl_driver": verl_driver.table(measured["results"]) if measured else MISSING}, SCALE.name)


def reliability(text: str, folder: Path = RESULTS) -> str:
    """The page on reliability, with what was tried and how much of it held written anew."""
    return filled(text, {"reliability": reliability_table(folder)}, RELIABILITY.name)


def _variants(found: dict[str, dict[str, Any]]) -> str:
    """The local and the exact level of each audit, on both sets of states."""
    head = ["audit", "states", "local: Spearman", "local: signs", "exact: Pearson", "exact: signs", "exact: slope"]
    return _by_states(
        head,
        found,
        lambda levels: [
            *(levels["local"][figure] for figure in ("spearman", "sign_agreement")),
            *(levels["exact"][figure] for figure in ("pearson", "sign_agreement", "slope")),
        ],
    )


def _forecasts(found: dict[str, dict[str, Any]]) -> str:
    """The forecast of each audit beside the last change, on both sets of states."""
    figures = {
        "Spearman": "spearman",
        "without the trend": "detrended_spearman",
        "signs": "sign_agreement",
        "error": "error",
    }
    names = ("forecast", "the last change")
    head = ["audit", "states", *(f"{name}: {what}" for name in names for what in figures), "it falls"]
    return _by_states(
        head,
        found,
        lambda levels: [
            *(levels["cheap"][name][figure] for name in names for figure in figures.values()),
            levels["cheap"]["falls"],
        ],
    )


def _by_states(
    head: list[str], found: dict[str, dict[str, Any]], figures: Callable[[dict[str, Any]], list[Any]]
) -> str:
    rows = []
    for name, document in found.items():
        for states, measured in (("trained on", document), ("held out", document["held_out"])):
            numbers = (
                f"{n:.2f}" if isinstance(n, float) else f"{n['value']:.2f} [{n['low']:.2f}, {n['high']:.2f}]"
                for n in figures(measured)
            )
            rows.append([AUDITS[name], states, *numbers])
    return markdown(head, rows)


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _markdown(table: TextTable) -> str:
    return markdown([column.name for column in table.columns], table.rows)


if __name__ == "__main__":
    for path, made in {PAGE: page, THEORY: theory, SCALE: scale, RELIABILITY: reliability}.items():
        path.write_text(made(path.read_text(encoding="utf-8")), encoding="utf-8")
