"""Commands that tell what is here: methods, doctor."""

import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from entropy_polarity.cli.common import Json, print_json
from entropy_polarity.support.text import printable


def methods(as_json: Json = False) -> None:
    """List the methods: what each does, when it decides and what that costs, what it needs, its source and settings."""
    from entropy_polarity.methods.description import describe_methods

    rows = describe_methods()
    if as_json:
        return print_json(rows)
    table = Table("method", "what it does; from what it decides, and what that costs; its settings (? has no default)")
    table.show_lines = True
    for row in rows:
        needs = f"; needs {', '.join(row['needs'])}" if row["needs"] else ""
        lines = [
            row["summary"],
            f"from {row['decides']}{needs}; extra pass: {row['cost']}",
            *([_settings_line("fixes of the loss", row["fixes"])] if row["fixes"] else []),
            _settings_line("settings", row["settings"]),
            *(
                _settings_line(f"  {name} ({c['decides']}{', the default' * c['default']})", c["settings"])
                for name, c in row["controllers"].items()
            ),
            row["source"],
        ]
        table.add_row(row["name"], escape("\n".join(lines)))
    Console().print(table)


def _settings_line(owner: str, settings: dict[str, Any]) -> str:
    listed = (f"{name}={'?' if value == 'required' else repr(value)}" for name, value in settings.items())
    return f"{owner}: {', '.join(listed) or 'none'}"


def doctor(as_json: Json = False) -> None:
    """Say which kernels run here and why, and check versions, hooks and accuracy. Exit code 1 if something is wrong."""
    from entropy_polarity.cli.health import examine

    findings = examine()
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        colours = {"ok": "green", "note": "yellow", "problem": "red"}
        table = Table("what", "", "found")
        for finding in findings:
            mark = f"[{colours[finding.status]}]{finding.status}[/]"
            table.add_row(escape(printable(finding.part)), mark, escape(printable(finding.detail)))
        Console().print(table)
    if any(finding.status == "problem" for finding in findings):
        sys.exit(1)
