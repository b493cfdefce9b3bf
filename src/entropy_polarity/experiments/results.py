"""Result files: one JSON document per experiment, with the place and the versions that made it."""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from entropy_polarity.statistics.intervals import Estimate
from entropy_polarity.support.files import write_text
from entropy_polarity.support.json_files import parsed, without_nan
from entropy_polarity.support.provenance import environment


def provenance() -> dict[str, Any]:
    """Versions, commit, date and machine; seeds stand in the plan, and the command has paths of this machine."""
    return {key: value for key, value in environment(0).items() if key not in ("seed", "command")}


def write_document(path: Path, document: dict[str, Any]) -> None:
    """Indented JSON, but each list of numbers on one line; in one move, so that a kill leaves no half."""
    text = json.dumps(without_nan(document), indent=1, allow_nan=False)
    text = re.sub(r"\[\n[^\[\]{}\"]*\]", lambda numbers: re.sub(r"\s+", "", numbers[0]), text)
    write_text(path, text + "\n")


def read_document(file: Path, kind: str, versions: tuple[int, ...] = (1,)) -> dict[str, Any]:
    """The document of a result file, whose key `kind` holds the version of the layout. Raises FileNotFoundError or
    ValueError for anything else than a `kind`.json that papo wrote."""
    expected = f"expected a file {kind}.json that papo wrote"
    try:
        document = parsed(file.read_bytes())
    except OSError as error:
        raise FileNotFoundError(f"cannot read {file} ({error.strerror}): {expected}") from None
    except ValueError:
        raise ValueError(f"{file} is not JSON: {expected}") from None
    if not isinstance(document, dict) or document.get(kind) not in versions:
        raise ValueError(f"{file} is no {kind} of this version: {expected}")
    return document


@contextmanager
def as_written(file: Path) -> Iterator[None]:
    """A context in which `file` is read: where it has another form than papo gives it, one ValueError says so."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file} does not hold what papo writes there ({said}): take the file as it was") from error


def rounded(value: float) -> float:
    """Six decimals: far below any interval here, and zero stays zero."""
    return round(value, 6) + 0.0


def bounds(estimate: Estimate) -> list[float] | None:
    """The interval of an estimate, rounded; None where too little was seen to say."""
    return None if math.isnan(estimate.low) else [rounded(estimate.low), rounded(estimate.high)]
