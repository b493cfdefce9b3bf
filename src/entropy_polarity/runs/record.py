"""A run directory, written so that a kill at any moment loses nothing but the tail, and read."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w

from entropy_polarity.runs.layout import (
    CHECKPOINTS,
    CONFIG,
    ENVIRONMENT,
    METRICS,
    REPORT,
    ROLLOUTS,
    SUMMARY,
    TOKENS,
    read_config,
    read_environment,
    read_summary,
    refuse_occupied,
)
from entropy_polarity.support.files import append_text, replacing, sync_file, write_text
from entropy_polarity.support.json_files import whole_rows, without_nan
from entropy_polarity.support.provenance import environment

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


@dataclass(frozen=True)
class RunWriter:
    """Writes a run directory. Nothing is ever overwritten but summary and report, and those in one move."""

    directory: Path

    @classmethod
    def create(cls, directory: Path, config: dict[str, Any], seed: int) -> "RunWriter":
        """A new run. Raises FileExistsError if `directory` already holds one, or anything else."""
        refuse_occupied(directory)
        (directory / TOKENS).mkdir(parents=True, exist_ok=True)
        (directory / CHECKPOINTS).mkdir(exist_ok=True)
        writer = cls(directory)
        write_text(directory / ENVIRONMENT, json.dumps(environment(seed), indent=2))
        writer.write_summary({"status": "running"})
        writer.write_config(config)  # last: now it is a run
        return writer

    def write_config(self, config: dict[str, Any]) -> None:
        write_text(self.directory / CONFIG, tomli_w.dumps(_without_none(config)))

    def metrics(self, row: dict[str, Any]) -> None:
        """Append a step's line; not-a-number becomes null, as JSON has none."""
        self._append(METRICS, [row])

    def rollouts(self, rows: list[dict[str, Any]], tokens: dict[str, list[Any]]) -> None:
        """Append the sampled completions of one step, and their token columns (as in TOKEN_COLUMNS)."""
        with replacing(self.directory / TOKENS / f"{rows[0]['step']:06d}.parquet") as file:
            pq.write_table(pa.table(tokens, schema=TOKEN_COLUMNS), file)
        self._append(ROLLOUTS, rows)  # last: a line in this file promises its tokens

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        append_text(self.directory / name, "".join(json.dumps(without_nan(row)) + "\n" for row in rows))

    def sync(self) -> None:
        """Put the lines so far on the disk: a checkpoint must not be there before those that lead to it."""
        for name in (METRICS, ROLLOUTS):
            if (self.directory / name).exists():
                sync_file(self.directory / name)

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_text(self.directory / SUMMARY, json.dumps(without_nan(summary), indent=2))

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
            read_environment(directory),
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


def _without_none(value: Any) -> Any:
    """TOML has no null."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list | tuple) else value
