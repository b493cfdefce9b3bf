"""The run directory: the names in it, whether there is one, and its two settings files, read with doubt.

config.toml        the resolved recipe
environment.json   versions, commit, seed, machine
metrics.jsonl      one line per step
rollouts.jsonl     a few sampled completions of each rollout, with reward and verdict
tokens/            their statistics per token, one Parquet file per rollout
checkpoints/       what training resumes from
summary.json       status, evaluation before and after
report.html        the page
lock               held by the process that works here
"""

import tomllib
from pathlib import Path
from typing import Any

from entropy_polarity.support.files import LOCK
from entropy_polarity.support.json_files import json_object

CONFIG, ENVIRONMENT, METRICS, ROLLOUTS = "config.toml", "environment.json", "metrics.jsonl", "rollouts.jsonl"
TOKENS, CHECKPOINTS, SUMMARY, REPORT = "tokens", "checkpoints", "summary.json", "report.html"
FILES = {CONFIG, ENVIRONMENT, METRICS, ROLLOUTS, SUMMARY, REPORT}
_CURE = "write {} into it to go on without"


def read_config(directory: Path) -> dict[str, Any]:
    """The resolved recipe of a run. Raises FileNotFoundError if `directory` holds no run, ValueError if the file is
    damaged or cut off: a run would go on under defaults for what is lost."""
    path = directory / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no run: {CONFIG} is missing")
    try:
        text = path.read_bytes().decode("utf-8")
        config = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): put the whole file back") from None
    last = config.get("record")  # the table that a run writes last
    if not (isinstance(last, dict) and "completions" in last and text.endswith("\n")):
        raise ValueError(f"{path} is cut off (at its end is record.completions): put the whole file back")
    return config


def read_summary(directory: Path) -> dict[str, Any]:
    """The summary of a run. Raises FileNotFoundError or ValueError where it is gone or damaged."""
    return json_object(directory / SUMMARY, _CURE)


def read_environment(directory: Path) -> dict[str, Any]:
    """Where and with what a run was made. Raises FileNotFoundError or ValueError where the file is gone or damaged."""
    return json_object(directory / ENVIRONMENT, _CURE)


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
