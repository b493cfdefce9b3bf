"""The state of a method in a checkpoint: one small file, the same for every framework."""

import json
import os
from pathlib import Path
from typing import Any

from entropy_polarity.phase import State

STATE_FILE = "polarity_state.json"  # a checkpoint of TRL's that has it is whole: it is written last


def save_state(folder: Path, method: str, settings: dict[str, Any], state: State, resumable: bool = True) -> None:
    """Write it, moved into place: a file that is there is whole. `resumable`: not in the middle of a rollout."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f"{STATE_FILE}.part"
    draft.write_text(
        json.dumps({"method": method, "settings": settings, "state": state, "resumable": resumable}), encoding="utf-8"
    )
    os.replace(draft, folder / STATE_FILE)


def load_state(folder: Path, method: str, settings: dict[str, Any]) -> State:
    """The state a run with the same method and settings saved. Raises FileNotFoundError where none was, ValueError
    where it is that of another method or of the middle of a rollout.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {STATE_FILE}: no run of entropy-polarity saved it, or not to the end")
    saved = json.loads(path.read_text(encoding="utf-8"))
    if not saved.get("resumable", True):
        raise ValueError(f"{folder} was saved inside a rollout: resume from an earlier checkpoint")
    for name, now in (("method", method), ("settings", settings)):
        if saved[name] != now:
            raise ValueError(f"{folder} was trained with {name} {saved[name]!r}, not {now!r}")
    return saved["state"]
