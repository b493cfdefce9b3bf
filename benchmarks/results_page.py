"""The tables of docs/ that come from result files, page by page: `python benchmarks/results_page.py` writes them anew.

A page holds each table between two marker comments (blocks.py); PAGES says which page holds which. docs/performance.md
and README.md are written by kernel_tables.py and demo_seeds.py.
"""

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
DOCS, RESULTS = ROOT / "docs", ROOT / "benchmarks/results"
MISSING = "Not measured yet."
PAGES: dict[str, tuple[str, ...]] = {
    "results/countdown.md": ("comparison-4", "comparison-3"),
    "results/thermostat.md": ("thermostat", "thermostat:disturbances"),
    "results/ablation.md": ("ablation:entropy", "ablation"),
    "results/exact-signs.md": ("exact-sign:control", "exact-sign"),
    "results/gym.md": ("gym",),
    "results/guess.md": ("guess", "guess-collapse", "guess-collapse-level"),
    "results/keydoor.md": ("keydoor",),
    "results/methods.md": ("screen",),
    "results/settings.md": ("regime", "search", "papo", "levels"),
    "results/opefo.md": ("opefo",),
    "results/audit.md": ("audit:variants", "audit", "audit:coverage", "audit:few"),
    "results/forecast.md": ("audit:forecast", "audit:parts"),
    "scale.md": ("verl_driver",),
    "reliability.md": ("reliability",),
}
# What an audit was varied in, by result file.
AUDITS = {
    "audit": "AdamW, learning rate 1e-4",
    "audit-small": "AdamW, learning rate 1e-5",
    "audit-held": "AdamW, the thermostat holding 0.6 nats",
    "audit-larger": "AdamW, learning rate 1e-4, 6 layers of width 256",
    "audit-sgd": "SGD without momentum, learning rate 0.1",
}
Document = dict[str, Any]


def page(name: str, folder: Path = RESULTS) -> str:
    """The page docs/`name` with every block written anew from the result files in `folder`."""
    text = (DOCS / name).read_text(encoding="utf-8")
    return filled(text, {block: BLOCKS[block](folder) for block in PAGES[name]}, name)


def _from(file: str, table: Callable[[Document], str]) -> Callable[[Path], str]:
    """A block made of one result file."""

    def block(folder: Path) -> str:
        document = _read(folder / f"{file}.json")
        return table(document) if document else MISSING

    return block


def _searched(document: Document) -> str:
    return _markdown(_renamed(search_table(document), document))


def _compared(document: Document) -> str:
    return _titled([_renamed(table, document) for table in comparison_tables(document["summary"])], "{}")


def _renamed(table: TextTable, document: Document) -> TextTable:
    """The table with today's name for a rule that had another when it was measured; the file stays as it is."""
    date = document["environment"]["date"]
    return replace(table, rows=[[name_of(row[0], date), *row[1:]] for row in table.rows])


def _variants(folder: Path) -> str:
    """The local and the exact level of each audit, on both sets of states."""
    head = ["audit", "states", "local: Spearman", "local: signs", "exact: Pearson", "exact: signs", "exact: slope"]
    return _by_states(
        head,
        folder,
        lambda levels: [
            *(levels["local"][figure] for figure in ("spearman", "sign_agreement")),
            *(levels["exact"][figure] for figure in ("pearson", "sign_agreement", "slope")),
        ],
    )


def _forecasts(folder: Path) -> str:
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
        folder,
        lambda levels: [
            *(levels["cheap"][name][figure] for name in names for figure in figures.values()),
            levels["cheap"]["falls"],
        ],
    )


def _by_states(head: list[str], folder: Path, figures: Callable[[Document], list[Any]]) -> str:
    rows = []
    for name, title in AUDITS.items():
        document = _read(folder / f"{name}.json")
        for states, measured in (("trained on", document), ("held out", document["held_out"])) if document else ():
            numbers = (
                f"{n:.2f}" if isinstance(n, float) else f"{n['value']:.2f} [{n['low']:.2f}, {n['high']:.2f}]"
                for n in figures(measured)
            )
            rows.append([title, states, *numbers])
    return markdown(head, rows) if rows else MISSING


def _titled(tables: list[TextTable], title: str) -> str:
    return "\n\n".join(f"{title.format(table.title)}\n\n{_markdown(table)}" for table in tables)


def _markdown(table: TextTable) -> str:
    return markdown([column.name for column in table.columns], table.rows)


def _read(path: Path) -> Document | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


COMPARISONS = (
    "comparison-4", "comparison-3", "ablation", "exact-sign", "gym", "guess", "guess-collapse",
    "guess-collapse-level", "keydoor", "screen",
)  # fmt: skip
BLOCKS: dict[str, Callable[[Path], str]] = {
    **{name: _from(name, _compared) for name in COMPARISONS},
    **{name: _from(name, _searched) for name in ("search", "papo")},
    "thermostat": _from("thermostat", lambda document: thermostat.table(document["runs"])),
    "thermostat:disturbances": _from("thermostat", lambda document: thermostat.disturbances(document["runs"])),
    "regime": _from("regime", lambda document: regime.table(document["runs"])),
    "levels": _from("levels", lambda document: levels.table(document["runs"])),
    "ablation:entropy": _from("ablation", ablation.entropy),
    "exact-sign:control": _from("exact-sign", exact_sign.control),
    "opefo": _from("opefo", opefo.table),
    "audit": _from("audit", lambda document: _titled(audit_tables(document), "**{}**")),
    "audit:variants": _variants,
    "audit:forecast": _forecasts,
    "audit:coverage": _from("coverage", coverage.table),
    "audit:few": _from("coverage", coverage.tables_of_few),
    "audit:parts": _from("parts", parts.table),
    "verl_driver": _from("verl_driver", lambda document: verl_driver.table(document["results"])),
    "reliability": reliability_table,
}


if __name__ == "__main__":
    for name in PAGES:
        (DOCS / name).write_text(page(name), encoding="utf-8")
