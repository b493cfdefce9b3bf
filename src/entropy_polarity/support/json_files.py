"""JSON read with doubt and written as JSON allows: what is damaged is said in one line that names the file."""

import json
import math
from pathlib import Path
from typing import Any


def parsed(text: bytes | str) -> Any:
    """The value of a JSON text. Raises ValueError, also for bytes that are not UTF-8 and for what is nested too deeply.

    >>> parsed(b'{"a": [1, null]}')
    {'a': [1, None]}
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError as error:
        raise ValueError(str(error)) from None


def json_object(path: Path, cure: str) -> dict[str, Any]:
    """The JSON object in a file. Raises FileNotFoundError or ValueError; `cure` says what to do then."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {cure}")
    try:
        return _object(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {cure}") from None


def json_rows(path: Path) -> list[dict[str, Any] | str]:
    """The rows of a file with one JSON object per line, each with a whole number `step`; none where there is no file. A
    damaged line is replaced by a text that says what is wrong with it. A last line without an end was cut off by a kill
    and is left out."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [_row(path, number, line) for number, line in enumerate(lines, start=1)]


def whole_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, as `json_rows`. Raises ValueError for the first damaged line."""
    rows = []
    for row in json_rows(path):
        if isinstance(row, str):
            raise ValueError(row)
        rows.append(row)
    return rows


def without_nan(document: Any) -> Any:
    """The document with null for NaN and infinities, which JSON does not have.

    >>> without_nan({"a": [1.0, float("nan")]})
    {'a': [1.0, None]}
    """
    if isinstance(document, dict):
        return {key: without_nan(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [without_nan(value) for value in document]
    return None if isinstance(document, float) and not math.isfinite(document) else document


def _row(path: Path, number: int, line: bytes) -> dict[str, Any] | str:
    try:
        row = _object(line)
        if type(row.get("step")) is int:
            return row
        wrong = "it has no step"
    except ValueError as error:
        wrong = str(error)
    return f"{path} is damaged in line {number} ({wrong}): delete that line to go on without it"


def _object(text: bytes) -> dict[str, Any]:
    found = parsed(text)
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, not a {type(found).__name__}")
    return found
