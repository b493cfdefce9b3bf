"""The files of a run directory, read with doubt: what is damaged is said in a line that names the file."""

import json
import tomllib
from pathlib import Path
from typing import Any

CONFIG, ENVIRONMENT, METRICS, ROLLOUTS = "config.toml", "environment.json", "metrics.jsonl", "rollouts.jsonl"
TOKENS, CHECKPOINTS, SUMMARY, REPORT = "tokens", "checkpoints", "summary.json", "report.html"


def read_config(directory: Path) -> dict[str, Any]:
    """The resolved recipe of a run. Raises FileNotFoundError if `directory` holds none, ValueError if it is damaged: a
    run would go on under defaults for what was cut off."""
    path = directory / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no run: {CONFIG} is missing")
    try:
        text = path.read_bytes().decode("utf-8")
        config = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): put the whole file back") from None
    last = config.get("record")  # the table that a run writes last
    if not (isinstance(last, dict) and "completions" in last and text.endswith("\n")):
        raise ValueError(f"{path} is cut off (at its end is record.completions): put the whole file back")
    return config


def read_summary(directory: Path) -> dict[str, Any]:
    """The summary of a run. Raises FileNotFoundError or ValueError where it is gone or damaged."""
    return json_object(directory / SUMMARY, "write {} into it to go on without")


def json_object(path: Path, without: str) -> dict[str, Any]:
    """The JSON object in a file. Raises FileNotFoundError or ValueError; `without` says how to go on without it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {without}")
    try:
        found = _object(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): {without}") from None
    return found


def json_rows(path: Path) -> list[dict[str, Any] | str]:
    """The rows of a file with one JSON object a line, each with a whole number `step`; in place of a damaged line, what
    is wrong with it. A last line without an end was cut off by a kill and is left out; no file, no rows."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [_row(path, number, line) for number, line in enumerate(lines, start=1)]


def whole_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, all of them: raises ValueError for the first damaged line."""
    rows = []
    for row in json_rows(path):
        if isinstance(row, str):
            raise ValueError(row)
        rows.append(row)
    return rows


def _row(path: Path, number: int, line: bytes) -> dict[str, Any] | str:
    try:
        row = _object(line)
    except (ValueError, RecursionError) as error:
        return f"{path} is damaged in line {number} ({error}): delete that line to go on without it"
    if type(row.get("step")) is not int:
        return f"{path} is damaged in line {number} (it has no step): delete that line to go on without it"
    return row


def _object(text: bytes) -> dict[str, Any]:
    found = json.loads(text.decode("utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, not a {type(found).__name__}")
    return found
