"""Results in a terminal: evaluations, comparisons, audits, searches. Labels and reasons are other people's text."""

from typing import Any

import tomli_w
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from entropy_polarity.report.intervals import estimated
from entropy_polarity.report.tables.audit import audit_tables
from entropy_polarity.report.tables.comparison import comparison_tables, search_table
from entropy_polarity.report.tables.evaluation import evaluation_tables, name_of_pass, over_what
from entropy_polarity.report.tables.text import TextTable
from entropy_polarity.support.text import one_line, printable


def print_estimates(evaluations: dict[str, dict[str, Any]]) -> None:
    """A column for each evaluation, a row for each pass@k, the greedy answer and what a game's environments counted."""
    if not evaluations:
        return
    table = Table("", *map(_cell, evaluations))
    estimates = {
        name: {name_of_pass(k, found): e for k, e in found["pass_at"].items()}
        | {"greedy": found.get("greedy_pass")}
        | found.get("facts", {})
        for name, found in evaluations.items()
    }
    for row in next(iter(estimates.values())):
        cells = (found.get(row) for found in estimates.values())  # evaluations of older runs have no greedy answers
        table.add_row(_cell(row), *("-" if estimate is None else estimated(estimate) for estimate in cells))
    Console().print(table)


def print_comparison(document: dict[str, Any]) -> None:
    for table in comparison_tables(document["summary"]):
        _print_table(table)
    for name, line in document["failed"].items():
        print(one_line(f"failed: {name}: {line}"))


def print_evaluation(document: dict[str, Any]) -> None:
    """Tables, then how often each verdict was given, then how it was sampled."""
    for table in evaluation_tables(document):
        _print_table(table)
    for label, model in document["models"].items():
        shares = ", ".join(f"{reason} {share:.1%}" for reason, share in model["verdicts"].items())
        print(one_line(f"{label}: {shares}"))
    used = document["settings"]
    seeds = ", ".join(map(str, used["seeds"]))
    cut = "" if used["top_p"] == 1 else f", top-p {used['top_p']:g}"
    print(
        f"{used['problems']} problems x {used['samples']} samples, sampling seeds {seeds}, temperature "
        f"{used['temperature']:g}{cut}; 95 % bootstrap intervals over {over_what(document)}"
    )


def print_audit(document: dict[str, Any]) -> None:
    for table in audit_tables(document):
        _print_table(table)


def print_search(document: dict[str, Any]) -> None:
    """The candidates, and the method tables of the chosen, to paste into the plan."""
    _print_table(search_table(document))
    chosen = f"chosen: {document['criterion']}; {document['problems']} problems that the comparison does not have"
    print(one_line(chosen))
    for name, line in document["failed"].items():
        print(one_line(f"failed: {name}: {line}"))
    print(printable(tomli_w.dumps({"methods": document["chosen"]})))


def _print_table(table: TextTable) -> None:
    """As a table, as wide as it is; in a terminal too narrow for it one method after the other."""
    shown = Table(title=_cell(table.title), title_justify="left", show_lines=True)
    for column in table.columns:
        shown.add_column(_cell(column.name), no_wrap=True)
    for row in table.rows:
        shown.add_row(*map(_cell, row))
    console = Console()
    width = Console(width=10_000).measure(shown).maximum
    if console.is_terminal and width > console.width:
        shown = Table(title=_cell(table.title), title_justify="left", show_header=False)
        for row in table.rows:
            for column, cell in zip(table.columns, row, strict=True):
                if cell:
                    shown.add_row(_cell(column.name), _cell(cell.replace("\n", "  ")))
            shown.add_section()
    Console(width=max(width, console.width)).print(shown)


def _cell(text: str) -> str:
    return escape(printable(text))
