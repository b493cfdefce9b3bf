"""Result files: one JSON document an experiment, with where and with what it was made."""

import json
import re
from pathlib import Path
from typing import Any

from entropy_polarity.record import environment


def provenance() -> dict[str, Any]:
    """Versions, commit, date and machine; seeds stand in the plan, and the command has paths of this machine."""
    return {key: value for key, value in environment(0).items() if key not in ("seed", "command")}


def write_document(path: Path, document: dict[str, Any]) -> None:
    """Indented JSON, but each list of numbers on one line; in one move, so that a kill leaves no half."""
    text = json.dumps(document, indent=1)
    text = re.sub(r"\[\n[^\[\]{}\"]*\]", lambda numbers: re.sub(r"\s+", "", numbers[0]), text)
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(text + "\n")
    draft.replace(path)
