"""The state of a method in a checkpoint: one small file, the same for every framework."""

import hashlib
import json
from pathlib import Path
from typing import Any

from entropy_polarity.controllers import State
from entropy_polarity.support.files import write_text
from entropy_polarity.support.json_files import parsed

STATE_FILE = "polarity_state.json"  # a checkpoint of TRL's in which it is finished is whole: it is written last
UNFINISHED = {"unfinished": True}
_NEEDED, _BEFORE = {"method", "settings", "state"}, {"method", "settings", "state", "resumable"}
_DIGEST = "sha256"


def save_state(
    folder: Path,
    method: str,
    settings: dict[str, Any],
    state: State,
    resumable: bool = True,
    files: dict[str, list[Any]] | None = None,
) -> None:
    """Write the state of a method into `folder`, in one move, so that a file that is there is whole. `resumable` says
    that no rollout was in progress. `files` are those of the checkpoint, with size and SHA-256 (`checkpoints.finish`);
    a framework that sums its own files gives none."""
    saved = {"method": method, "settings": settings, "state": state, "resumable": resumable, "folder": folder.name}
    if files is not None:
        saved["files"] = files
    saved = json.loads(json.dumps(saved))  # what will be read again, tuples as lists
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / STATE_FILE, json.dumps(saved | {_DIGEST: _digest(saved)}))


def read_state(folder: Path) -> dict[str, Any]:
    """What `save_state` wrote, or `UNFINISHED`. Raises FileNotFoundError where there is no file, ValueError where the
    file is not as it was written."""
    path = folder / STATE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {STATE_FILE}: no run of entropy-polarity saved it, or not to the end")
    try:
        saved = parsed(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    if saved == UNFINISHED:
        return saved
    if not isinstance(saved, dict) or not saved.keys() >= _NEEDED:
        raise ValueError(f"{path} is damaged: it is not what entropy-polarity writes")
    # Versions before the digest wrote no other keys.
    digest = saved.pop(_DIGEST, None)
    if digest != _digest(saved) and not (digest is None and saved.keys() <= _BEFORE):
        raise ValueError(f"{path} was changed after it was saved")
    return {"resumable": True} | saved


def load_state(folder: Path, method: str, settings: dict[str, Any], beginning: State) -> State:
    """The state that a run with the same method and settings saved.

    Raises FileNotFoundError where there is none, ValueError where it is damaged, belongs to another method or to the
    middle of a rollout, or holds other numbers than the method begins with: the same words meant another rule then.
    """
    saved = read_state(folder)
    if saved == UNFINISHED:
        raise ValueError(f"{folder} was not saved to its end: resume from an earlier checkpoint")
    if not saved["resumable"]:
        raise ValueError(f"{folder} was saved inside a rollout: resume from an earlier checkpoint")
    for name, now in (("method", method), ("settings", settings)):
        if saved[name] != now:
            raise ValueError(f"{folder} was trained with {name} {saved[name]!r}, not {now!r}")
    if _names(saved["state"]) != _names(beginning):
        raise ValueError(
            f"{folder} was trained when {method!r} with settings {settings!r} was another rule (papo's controller was "
            "'trend' in version 0.1): train again, or from its weights with --model"
        )
    return saved["state"]


def _names(state: Any) -> Any:
    return {name: _names(value) for name, value in state.items()} if isinstance(state, dict) else None


def _digest(saved: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(saved, sort_keys=True).encode()).hexdigest()
