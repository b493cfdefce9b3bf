"""The run directory: what a run leaves behind, written so that a kill at any moment loses nothing but the tail.

config.toml        the resolved recipe
environment.json   versions, commit, seed, machine
metrics.jsonl      one line a step
rollouts.jsonl     a few sampled completions a rollout, with reward and verdict
tokens/            their per-token columns, one Parquet file a rollout
checkpoints/       what training resumes from
summary.json       status, evaluation before and after
report.html        the page
"""

import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w

from entropy_polarity.method_state import STATE_FILE

CONFIG, ENVIRONMENT, METRICS, ROLLOUTS = "config.toml", "environment.json", "metrics.jsonl", "rollouts.jsonl"
TOKENS, CHECKPOINTS, SUMMARY, REPORT = "tokens", "checkpoints", "summary.json", "report.html"
CHECKPOINT_PREFIX = "checkpoint-"

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
        _write(directory / ENVIRONMENT, json.dumps(environment(seed), indent=2))
        writer.write_summary({"status": "running"})
        _write(directory / CONFIG, tomli_w.dumps(_without_none(config)))  # last: now it is a run
        return writer

    @classmethod
    def resume(cls, directory: Path, config: dict[str, Any]) -> "tuple[RunWriter, Path | None]":
        """The writer of an existing run and its last whole checkpoint; what was written after that is dropped.

        `config` takes the place of the old one: a resumed run may be longer.
        """
        if not (directory / CONFIG).is_file():
            raise FileNotFoundError(f"{directory} holds no run: {CONFIG} is missing")
        writer, checkpoint = cls(directory), last_checkpoint(directory, resumable=True)
        writer._truncate(0 if checkpoint is None else checkpoint_step(checkpoint))
        _write(directory / CONFIG, tomli_w.dumps(_without_none(config)))
        return writer, checkpoint

    def _truncate(self, step: int) -> None:
        for name in (METRICS, ROLLOUTS):
            path = self.directory / name
            if path.exists():
                _write(path, "".join(json.dumps(row) + "\n" for row in _rows(path) if row["step"] <= step))
        for path in (self.directory / TOKENS).iterdir():
            if not path.stem.isdigit() or int(path.stem) > step:
                path.unlink()
        # Only checkpoints: a logger of the user's may write beside them.
        for path in _checkpoints(self.directory):
            if not (path / STATE_FILE).is_file() or checkpoint_step(path) > step:
                shutil.rmtree(path)

    def metrics(self, row: dict[str, Any]) -> None:
        """Append a step's line; not-a-number becomes null, as JSON has none."""
        self._append(METRICS, [row])

    def rollouts(self, rows: list[dict[str, Any]], tokens: dict[str, list[Any]]) -> None:
        """Append the sampled completions of one step, and their token columns (as in TOKEN_COLUMNS)."""
        path = self.directory / TOKENS / f"{rows[0]['step']:06d}.parquet"
        draft = path.with_suffix(".part")
        pq.write_table(pa.table(tokens, schema=TOKEN_COLUMNS), draft)
        draft.replace(path)
        self._append(ROLLOUTS, rows)  # last: a line in this file promises its tokens

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        with (self.directory / name).open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(_jsonable(row)) + "\n" for row in rows))

    def write_summary(self, summary: dict[str, Any]) -> None:
        _write(self.directory / SUMMARY, json.dumps(_jsonable(summary), indent=2))

    def write_report(self, html: str) -> Path:
        _write(self.directory / REPORT, html)
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
        """Raises FileNotFoundError if `directory` holds no run. A line cut off by a kill is left out."""
        if not (directory / CONFIG).is_file():
            raise FileNotFoundError(f"{directory} holds no run: {CONFIG} is missing")
        return cls(
            directory,
            tomllib.loads((directory / CONFIG).read_text(encoding="utf-8")),
            json.loads((directory / ENVIRONMENT).read_text(encoding="utf-8")),
            list(_rows(directory / METRICS)),
            list(_rows(directory / ROLLOUTS)),
            json.loads((directory / SUMMARY).read_text(encoding="utf-8")),
        )

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """The steps at which a metric was logged, and its values."""
        rows = [row for row in self.metrics if isinstance(row.get(name), int | float)]
        return [row["step"] for row in rows], [row[name] for row in rows]

    def tokens(self, step: int) -> list[dict[str, Any]]:
        """The token rows of the rollouts recorded at `step`."""
        return pq.read_table(self.directory / TOKENS / f"{step:06d}.parquet").to_pylist()


def refuse_occupied(directory: Path) -> None:
    """Raise FileExistsError unless a run can be made at `directory`: nothing there, or nothing but empty folders."""
    if (directory / CONFIG).exists():
        raise FileExistsError(
            f"{directory} already holds a run: give another --output, or --resume {directory} to go on with it"
        )
    if directory.exists() and (not directory.is_dir() or any(not path.is_dir() for path in directory.rglob("*"))):
        raise FileExistsError(f"{directory} is not an empty folder: give another --output")


def checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(CHECKPOINT_PREFIX))


def last_checkpoint(directory: Path, *, resumable: bool = False) -> Path | None:
    """The newest checkpoint that was written to its end; None if there is none.

    With `resumable` only those that fall between rollouts: a run that ended inside one keeps its last policy, but
    goes on from before.
    """
    whole = [c for c in _checkpoints(directory) if (c / STATE_FILE).is_file()]
    if resumable:
        whole = [c for c in whole if json.loads((c / STATE_FILE).read_text(encoding="utf-8"))["resumable"]]
    return max(whole, key=checkpoint_step, default=None)


def _checkpoints(directory: Path) -> list[Path]:
    found = (directory / CHECKPOINTS).glob(f"{CHECKPOINT_PREFIX}*")
    return [path for path in found if path.name.removeprefix(CHECKPOINT_PREFIX).isdigit()]


def environment(seed: int) -> dict[str, Any]:
    """Where and with what a run was made."""
    packages = ("entropy-polarity", "torch", "transformers", "trl", "accelerate", "datasets", "numpy", "peft")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "python": platform.python_version(),
        "packages": {name: found for name in packages if (found := _version(name))},
        "commit": _commit(),
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": os.environ.get("OMP_NUM_THREADS"),
        },
        "command": sys.argv[1:],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the source tree this code runs from; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(git, capture_output=True, encoding="utf-8", timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.endswith("\n"):
                return  # the writer was killed inside this line
            yield json.loads(line)


def _write(path: Path, text: str) -> None:
    """Replace the file in one move: a reader sees the old text or the new one."""
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


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
