"""Going on with a run: from which checkpoint, with which lines of its record, and what goes."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from entropy_polarity.runs.checkpoints import (
    checkpoint_step,
    finished,
    last_of,
    own_checkpoints,
    refuse_broken,
    refuse_in_the_way,
    remove_drafts,
)
from entropy_polarity.runs.layout import CHECKPOINTS, FILES, METRICS, ROLLOUTS, TOKENS, read_config
from entropy_polarity.runs.record import RunWriter
from entropy_polarity.support.files import DRAFT, refuse_links, remove_folder, write_text
from entropy_polarity.support.json_files import json_rows

Rows = list[dict[str, Any]]
_TOKENS_OF_STEP = re.compile(r"(\d{6,})\.parquet")
_OLD_DRAFT = re.compile(r"\d{6,}\.part")  # of versions before the random names


def resume_run(
    directory: Path, config: dict[str, Any], step: int | None = None, say: Callable[[str], None] = lambda line: None
) -> tuple[RunWriter, Path | None]:
    """The writer of an existing run and its last whole checkpoint; what was written after that is dropped.

    `config` takes the place of the old one: a resumed run may be longer. With `step` it goes on from the checkpoint of
    that step (0: from the beginning), whatever became of later ones and of the record before it. Raises ValueError or
    OSError, before anything is changed, where the checkpoint or the record is not whole, or something else stands where
    checkpoints will be written.
    """
    refuse_links(directory)
    written = read_config(directory)
    checkpoint = _checkpoint_to_resume(directory, step, say)
    reached = 0 if checkpoint is None else checkpoint_step(checkpoint)
    refuse_in_the_way(directory / CHECKPOINTS, reached, config.get("trainer", {}).get("max_steps", 0))
    kept = {name: _rows_until(directory / name, reached) for name in (METRICS, ROLLOUTS)}
    if step is None:
        _refuse_lost_rows(directory, reached, kept, recorded=written["record"]["completions"] > 0)
    for name, (rows, _) in kept.items():
        if (directory / name).exists():
            write_text(directory / name, "".join(json.dumps(row) + "\n" for row in rows))
    _drop_after(directory, reached)
    writer = RunWriter(directory)
    writer.write_config(config)
    return writer, checkpoint


def _checkpoint_to_resume(directory: Path, step: int | None, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from, that of `step` or the last, with its files checked; None for the beginning. Raises
    ValueError, which offers the last whole checkpoint, where its files are not those that were saved."""
    if step is None:
        checkpoint = last_of(directory / CHECKPOINTS, resumable=True)
    else:
        ours = own_checkpoints(directory / CHECKPOINTS)
        there = {checkpoint_step(path): path for path in ours if finished(path, resumable=True)}
        if step and step not in there:
            listed = ", ".join(map(str, there)) or "none"
            raise ValueError(f"{directory} has no checkpoint of step {step}; there are: {listed} (0: the beginning)")
        checkpoint = there.get(step)
    if checkpoint is None:
        return None

    def go_on(whole: Path) -> str:
        return f"{_command(directory, checkpoint_step(whole))} goes on from the last whole one"

    if not refuse_broken(checkpoint, go_on, f"{_command(directory, 0)} starts over"):
        say(f"{checkpoint} was saved by an older version, without sums: its files cannot be checked")
    return checkpoint


def _rows_until(path: Path, step: int) -> tuple[Rows, str | None]:
    """The rows of a file up to `step`, and what is wrong with the first damaged line before the last of them: what is
    damaged after that goes with the rest."""
    rows = json_rows(path)
    while rows and (isinstance(rows[-1], str) or rows[-1]["step"] > step):
        rows.pop()
    damage = next((row for row in rows if isinstance(row, str)), None)
    return [row for row in rows if isinstance(row, dict) and row["step"] <= step], damage


def _refuse_lost_rows(directory: Path, reached: int, kept: dict[str, tuple[Rows, str | None]], recorded: bool) -> None:
    """Raise ValueError where the record does not come as far as the checkpoint of step `reached`, or a line of it is
    damaged. `recorded`: whether the run keeps rollouts; the first of them is there before the first step ends."""
    go_on = f"{_command(directory, reached)} goes on without what is lost"
    for _, damage in kept.values():
        if damage:
            raise ValueError(f"{damage}, or {go_on}")
    ends = {name: rows[-1]["step"] if rows else 0 for name, (rows, _) in kept.items()}
    tokens = (_TOKENS_OF_STEP.fullmatch(path.name) for path in (directory / TOKENS).glob("*.parquet"))
    written = [int(found[1]) for found in tokens if found and int(found[1]) <= reached]
    due = max(written, default=int(recorded and reached > 0))
    for name, last in ((METRICS, reached), (ROLLOUTS, due)):
        if ends[name] < last:
            what = f"{name} ends at step {ends[name]}, the checkpoint is of step {reached}"
            before = [c for c in own_checkpoints(directory / CHECKPOINTS) if checkpoint_step(c) <= ends[name]]
            or_before = f"; {_command(directory, checkpoint_step(before[-1]))} from before that" if before else ""
            raise ValueError(f"{directory}: {what}: {go_on}{or_before}")


def _drop_after(directory: Path, step: int) -> None:
    """Delete what was written after `step`, and drafts: only under names that are ours."""
    for path in directory.iterdir():
        if (draft := DRAFT.fullmatch(path.name)) and draft["name"] in FILES:
            path.unlink()
    (directory / TOKENS).mkdir(exist_ok=True)
    for path in (directory / TOKENS).iterdir():
        draft, tokens = DRAFT.fullmatch(path.name), _TOKENS_OF_STEP.fullmatch(path.name)
        unfinished = _TOKENS_OF_STEP.fullmatch(draft["name"]) if draft else _OLD_DRAFT.fullmatch(path.name)
        if unfinished or (tokens and int(tokens[1]) > step):
            path.unlink()
    for path in own_checkpoints(directory / CHECKPOINTS):
        if checkpoint_step(path) > step or not finished(path):
            remove_folder(path)
    remove_drafts(directory / CHECKPOINTS)


def _command(directory: Path, step: int) -> str:
    return f"papo train --resume {directory} --from-checkpoint {step}"
