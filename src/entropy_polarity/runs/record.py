"""The run directory: what a run leaves behind, written so that a kill at any moment loses nothing but the tail.

config.toml        the resolved recipe
environment.json   versions, commit, seed, machine
metrics.jsonl      one line a step
rollouts.jsonl     a few sampled completions a rollout, with reward and verdict
tokens/            their per-token columns, one Parquet file a rollout
checkpoints/       what training resumes from
summary.json       status, evaluation before and after
report.html        the page
lock               held by the process that works here
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w

from entropy_polarity.support.environment import environment
from entropy_polarity.support.files import LOCK, append_text, refuse_links, replacing, sync_file, write_text
from entropy_polarity.support.reading import (
    CHECKPOINTS,
    CONFIG,
    ENVIRONMENT,
    METRICS,
    REPORT,
    ROLLOUTS,
    SUMMARY,
    TOKENS,
    json_object,
    read_config,
    read_summary,
    whole_rows,
)
from entropy_polarity.runs.checkpoints import checkpoint_step, last_of, refuse_in_the_way
from entropy_polarity.runs.resuming import drop_after, refuse_lost_rows, rows_until, to_resume

TOKEN_COLUMNS = pa.schema(
    [
        ("rollout", pa.int32()),
        ("position", pa.int32()),
        ("token", pa.string()),
        ("logp", pa.float32()),
        ("entropy", pa.float32()),
        ("sensitivity", pa.float32()),
        ("polarity", pa.float32()),
        ("weight", pa.float32()),
        ("from_policy", pa.bool_()),  # False: an environment said it, and the other columns are NaN
    ]
)


class RunWriter:
    """Writes a run directory. Nothing is ever overwritten but summary and report, and those in one move."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @classmethod
    def create(cls, directory: Path, config: dict[str, Any], seed: int) -> "RunWriter":
        """A new run. Raises FileExistsError if `directory` already holds one, or anything else."""
        refuse_occupied(directory)
        (directory / TOKENS).mkdir(parents=True, exist_ok=True)
        (directory / CHECKPOINTS).mkdir(exist_ok=True)
        writer = cls(directory)
        write_text(directory / ENVIRONMENT, json.dumps(environment(seed), indent=2))
        writer.write_summary({"status": "running"})
        write_text(directory / CONFIG, tomli_w.dumps(_without_none(config)))  # last: now it is a run
        return writer

    @classmethod
    def resume(
        cls,
        directory: Path,
        config: dict[str, Any],
        step: int | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> "tuple[RunWriter, Path | None]":
        """The writer of an existing run and its last whole checkpoint; what was written after that is dropped.

        `config` takes the place of the old one: a resumed run may be longer. With `step` it goes on from the
        checkpoint of that step (0: from the beginning), whatever became of later ones and of the record before it.
        Raises ValueError or OSError, before anything is changed, where the checkpoint or the record is not whole, or
        something else stands where checkpoints will be written.
        """
        refuse_links(directory)
        written = read_config(directory)
        checkpoint = to_resume(directory, step, say)
        reached = 0 if checkpoint is None else checkpoint_step(checkpoint)
        refuse_in_the_way(directory / CHECKPOINTS, reached, config.get("trainer", {}).get("max_steps", 0))
        kept = {name: rows_until(directory / name, reached) for name in (METRICS, ROLLOUTS)}
        if step is None:
            refuse_lost_rows(directory, reached, kept, recorded=written["record"]["completions"] > 0)
        for name, (rows, _) in kept.items():
            if (directory / name).exists():
                write_text(directory / name, "".join(json.dumps(row) + "\n" for row in rows))
        drop_after(directory, reached)
        write_text(directory / CONFIG, tomli_w.dumps(_without_none(config)))
        return cls(directory), checkpoint

    def metrics(self, row: dict[str, Any]) -> None:
        """Append a step's line; not-a-number becomes null, as JSON has none."""
        self._append(METRICS, [row])

    def rollouts(self, rows: list[dict[str, Any]], tokens: dict[str, list[Any]]) -> None:
        """Append the sampled completions of one step, and their token columns (as in TOKEN_COLUMNS)."""
        with replacing(self.directory / TOKENS / f"{rows[0]['step']:06d}.parquet") as file:
            pq.write_table(pa.table(tokens, schema=TOKEN_COLUMNS), file)
        self._append(ROLLOUTS, rows)  # last: a line in this file promises its tokens

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        append_text(self.directory / name, "".join(json.dumps(_jsonable(row)) + "\n" for row in rows))

    def sync(self) -> None:
        """Put the lines so far on the disk: a checkpoint must not be there before those that lead to it."""
        for name in (METRICS, ROLLOUTS):
            if (self.directory / name).exists():
                sync_file(self.directory / name)

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_text(self.directory / SUMMARY, json.dumps(_jsonable(summary), indent=2))

    def write_report(self, html: str) -> Path:
        write_text(self.directory / REPORT, html)
        return self.directory / REPORT


@dataclass(frozen=True)
class Run:
    """A run directory, read."""

    directory: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    rollouts: list[dict[str, Any]]
    summary: dict[str, Any]

    @classmethod
    def read(cls, directory: Path) -> "Run":
        """Raises FileNotFoundError if `directory` holds no run, ValueError for the first file that is damaged. A line
        cut off by a kill is left out."""
        return cls(
            directory,
            read_config(directory),
            json_object(directory / ENVIRONMENT, "write {} into it to go on without"),
            whole_rows(directory / METRICS),
            whole_rows(directory / ROLLOUTS),
            read_summary(directory),
        )

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """The steps at which a metric was logged, and its values."""
        rows = [row for row in self.metrics if isinstance(row.get(name), int | float)]
        return [row["step"] for row in rows], [row[name] for row in rows]

    def tokens(self, step: int) -> list[dict[str, Any]]:
        """The token rows of the rollouts recorded at `step`. Raises FileNotFoundError or ValueError, which names the
        file, where they are gone or damaged."""
        path = self.directory / TOKENS / f"{step:06d}.parquet"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing")
        try:
            return pq.read_table(path).select(TOKEN_COLUMNS.names).cast(TOKEN_COLUMNS).to_pylist()
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise ValueError(f"{path} is damaged ({error})") from None


def refuse_occupied(directory: Path) -> None:
    """Raise FileExistsError unless a run can be made at `directory`: nothing there, or nothing but empty folders."""
    if (directory / CONFIG).exists():
        raise FileExistsError(
            f"{directory} already holds a run: give another --output, or --resume {directory} to go on with it"
        )
    if directory.exists() and (not directory.is_dir() or any(map(_is_somebodys, directory.rglob("*")))):
        raise FileExistsError(f"{directory} is not an empty folder: give another --output")


def _is_somebodys(path: Path) -> bool:
    return path.is_symlink() or not (path.is_dir() or path.name == LOCK)


def last_checkpoint(directory: Path, *, resumable: bool = False) -> Path | None:
    """The newest checkpoint of a run that was written to its end; None if there is none. As `checkpoints.last_of`."""
    return last_of(directory / CHECKPOINTS, resumable=resumable)


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _without_none(value: Any) -> Any:
    """TOML has no null."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list | tuple) else value
