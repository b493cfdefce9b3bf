"""The checkpoints of a run: which are ours, which are whole, and which are deleted.

A checkpoint is a folder `checkpoint-<step>` with a `polarity_state.json`. That file is written first, as unfinished,
and again last, with the size and the SHA-256 of every other file: in between the folder is no checkpoint. A folder with
another name, or without that file, belongs to somebody else and is never touched.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from entropy_polarity.runs.layout import CHECKPOINTS
from entropy_polarity.runs.method_state import STATE_FILE, UNFINISHED, read_state, save_state
from entropy_polarity.support.files import (
    DRAFT,
    new_folder,
    refuse_links,
    remove_folder,
    sync_file,
    sync_folder,
    write_text,
)

PREFIX = "checkpoint-"
# What training goes on from and a policy does not need: people delete the optimiser's files to save space.
_TRAINING = re.compile(r"(optimizer|scheduler|scaler|rng_state|training_args|trainer_state|global_step|README).*")
_UNSUMMED = "README.md"  # a card for people
# SHA-256 of files that this process has read, by their state on the disk: the trainer checks again the checkpoint that
# a run goes on from, and to sum the files of a large model takes minutes.
_right: dict[tuple[Any, ...], str] = {}


def checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def own_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder` that this package made, by step, whole or not."""
    found = [path for path in folder.glob(f"{PREFIX}*") if re.fullmatch(r"0|[1-9]\d*", path.name.removeprefix(PREFIX))]
    return sorted((path for path in found if _ours(path)), key=checkpoint_step)


def strangers(folder: Path) -> list[Path]:
    """Paths in `folder` that have the name of a checkpoint and are none of ours."""
    named = (path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal())
    return sorted(set(named) - set(own_checkpoints(folder)), key=checkpoint_step)


def refuse_in_the_way(folder: Path, reached: int, last: float, cure: str = "") -> None:
    """Raise ValueError where a path that is not ours has the name of a checkpoint after step `reached`, up to `last`:
    training may come to it, or it was the last of the run. `cure` is said in place of moving it away."""
    for path in strangers(folder):
        empty = path.is_dir() and not any(path.iterdir())
        if reached < checkpoint_step(path) <= last and not empty:
            said = f"the one before it is whole: {cure}" if cure else "training would write there: move it away"
            raise ValueError(f"{path} is no checkpoint of this run, or was not saved to its end, and {said}")


def finished(checkpoint: Path, resumable: bool = False) -> bool:
    """Whether a checkpoint was saved to its end, and with `resumable` between rollouts. One whose own file is damaged
    counts: what is wrong with it has to be said."""
    try:
        saved = read_state(checkpoint)
    except ValueError:
        return True
    return saved != UNFINISHED and (saved["resumable"] or not resumable)


def last_of(folder: Path, *, resumable: bool = False) -> Path | None:
    """The newest checkpoint in `folder` that was saved to its end, with `resumable` between rollouts; None if there is
    none. A run that ended inside a rollout keeps its last policy, but goes on from before."""
    return max((c for c in own_checkpoints(folder) if finished(c, resumable)), key=checkpoint_step, default=None)


def last_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run directory that was saved to its end; None if there is none."""
    return last_of(run / CHECKPOINTS)


def begin(folder: Path) -> None:
    """Make the folder of a checkpoint, marked as unfinished, in place of one of ours with the same name. Raises OSError
    where the folder is somebody else's, or a link."""
    if folder.is_symlink():
        raise OSError(f"{folder} is a link, and no checkpoint is written through one: remove it")
    if _ours(folder):
        remove_folder(folder)
    if folder.exists():
        refuse_links(folder)
        if any(folder.iterdir()):
            raise OSError(f"{folder} is no checkpoint of ours, and one would be written there: move it away")
    with new_folder(folder) as draft:  # there is no moment at which it is nobody's
        write_text(draft / STATE_FILE, json.dumps(UNFINISHED))


def finish(folder: Path, method: str, settings: dict[str, Any], state: dict[str, Any], resumable: bool) -> None:
    """Put every file of a checkpoint on the disk, sum it, and mark the checkpoint as whole."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name not in (STATE_FILE, _UNSUMMED)]
    with ThreadPoolExecutor() as pool:
        sums = dict(zip([file.relative_to(folder).as_posix() for file in files], pool.map(_kept, files), strict=True))
    for parent in {file.parent for file in files}:
        sync_folder(parent)
    save_state(folder, method, settings, state, resumable, sums)
    sync_folder(folder.parent)


def check(folder: Path, *, policy_only: bool = False) -> bool:
    """Whether the files of a checkpoint are those that were saved; False if an older version saved it, without sums.
    With `policy_only` the files of training do not matter. Raises ValueError or OSError, which names the file."""
    saved = read_state(folder)
    if saved == UNFINISHED:
        raise ValueError(f"{folder} was not saved to its end")
    if "files" not in saved:
        return False
    if not _are_sums(saved["files"]):
        raise ValueError(f"{folder / STATE_FILE} is damaged: its sums are none")
    sums = {name: kept for name, kept in saved["files"].items() if not (policy_only and _TRAINING.match(name))}
    for name, (size, _) in sums.items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing")
        if (found := (folder / name).stat().st_size) != size:
            raise ValueError(f"{folder / name} has {found} bytes, not the {size} that were saved")
    states = {name: _state_of(folder / name) for name in sums}
    unread = [name for name in sums if _right.get(states[name]) != sums[name][1]]
    with ThreadPoolExecutor() as pool:
        for name, found in zip(unread, pool.map(_sum, (folder / name for name in unread)), strict=True):
            if found != sums[name][1]:
                raise ValueError(f"{folder / name} was changed after it was saved: its SHA-256 is another")
            _right[states[name]] = found
    return True


def refuse_broken(
    folder: Path,
    go_on: Callable[[Path], str],
    otherwise: str = "no other checkpoint beside it is whole",
    *,
    policy_only: bool = False,
) -> bool:
    """As `check`, but the error also offers the last whole checkpoint beside it, in the words of `go_on`."""
    try:
        return check(folder, policy_only=policy_only)
    except (ValueError, OSError) as error:
        beside = [c for c in reversed(own_checkpoints(folder.parent)) if c.name != folder.name]
        whole = next((c for c in beside if finished(c, not policy_only) and _whole(c, policy_only)), None)
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{error}; {otherwise if whole is None else go_on(whole)}") from None


def rotate(newest: Path, limit: int | None, best: Path | None = None) -> None:
    """Delete the checkpoints of the lowest steps until `limit` are left, but never the newest and the best. No limit,
    or one below 1, deletes nothing. By step, not by date: a clock can be set back. A higher step is not of this run,
    which has not come that far."""
    if limit is None or limit < 1:
        return
    there = [path for path in own_checkpoints(newest.parent) if checkpoint_step(path) <= checkpoint_step(newest)]
    kept = {newest.resolve(), *([best.resolve()] if best else [])}
    old = [path for path in there if path.resolve() not in kept]
    # A save that was cut off is worth nothing and is deleted first.
    old.sort(key=lambda path: (finished(path), checkpoint_step(path)))
    for path in old[: max(0, len(there) - max(limit, len(kept)))]:
        remove_folder(path)
    remove_drafts(newest.parent)


def remove_drafts(folder: Path) -> None:
    """Delete what kills left of checkpoints that were begun or removed."""
    for path in folder.glob(f"{PREFIX}*"):
        draft = DRAFT.fullmatch(path.name)
        if draft and draft["name"].removeprefix(PREFIX).isdecimal() and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def _ours(path: Path) -> bool:
    """Whether a folder is a checkpoint, not a copy of one under another name."""
    if path.is_symlink() or not (path / STATE_FILE).is_file():
        return False
    try:
        return read_state(path).get("folder", path.name) == path.name
    except ValueError:
        return True


def _are_sums(files: Any) -> bool:
    return isinstance(files, dict) and all(
        isinstance(kept, list) and [type(value) for value in kept] == [int, str] for kept in files.values()
    )


def _whole(checkpoint: Path, policy_only: bool) -> bool:
    try:
        check(checkpoint, policy_only=policy_only)
    except (ValueError, OSError):
        return False
    return True


def _state_of(file: Path) -> tuple[Any, ...]:
    """What changes with the file: its place, and the system's number, size and times of it."""
    found = file.stat()
    return str(file.resolve()), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _kept(file: Path) -> list[Any]:
    """[size, SHA-256] of a file that is on the disk."""
    sync_file(file)
    return [file.stat().st_size, _sum(file)]


def _sum(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
