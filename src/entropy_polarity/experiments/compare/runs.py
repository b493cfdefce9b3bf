"""The runs of a plan in one directory: several at a time, and whatever is killed goes on where it stopped.

recipes/<label>-<seed>.toml    the resolved recipe of a run
runs/<label>-<seed>/           its run directory, as `papo train` makes it
logs/<label>-<seed>.log        what it printed
lock                           held by the comparison that works here, and by its runs
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from entropy_polarity.experiments.compare import die_with_parent
from entropy_polarity.experiments.models import refuse_renamed
from entropy_polarity.report.progress import RunState
from entropy_polarity.runs.consent import said_again
from entropy_polarity.runs.layout import CONFIG, ENVIRONMENT, METRICS, SUMMARY, read_summary
from entropy_polarity.runs.recipe import Recipe, flattened, load_recipe
from entropy_polarity.support.files import DRAFT, LOCK, refuse_links, write_text
from entropy_polarity.support.files import locked as locked_folder

# Without the current folder, which may be anybody's, in front of the path of modules.
TRAIN = [sys.executable, "-P", "-m", "entropy_polarity.cli", "train"]
# What a run directory can hold before it is a run (`RunWriter.create`), drafts included.
_UNBORN = {ENVIRONMENT, SUMMARY, LOCK}
_LOOK = 0.5  # seconds between two looks at the runs
_LET_GO = 2.0  # seconds that runs of a killed comparison may take to die


@dataclass(frozen=True, eq=False)
class Job:
    """One run: where it lives and what it trains."""

    label: str
    seed: int
    recipe: Recipe
    root: Path

    @property
    def name(self) -> str:
        return f"{self.label}-{self.seed}"

    @property
    def directory(self) -> Path:
        return self.root / "runs" / self.name

    @property
    def log(self) -> Path:
        return self.root / "logs" / f"{self.name}.log"

    @property
    def finished(self) -> bool:
        """What counts is what the run wrote, not how its process ended."""
        return (self.directory / CONFIG).is_file() and read_summary(self.directory).get("status") == "finished"

    def prepare(self) -> list[str]:
        """The command that trains this run, from its beginning or from where it stopped; all it needs is written."""
        if (self.directory / CONFIG).is_file():
            return [*TRAIN, "--resume", str(self.directory), *said_again(self.recipe.to_dict())]
        shutil.rmtree(self.directory, ignore_errors=True)  # `refuse_others` looked into it
        recipe = self.root / "recipes" / f"{self.name}.toml"
        write_text(recipe, tomli_w.dumps(self.recipe.to_dict()))
        return [*TRAIN, str(recipe), "--output", str(self.directory)]

    def state(self, kind: str, note: str = "") -> RunState:
        steps = 0
        if kind != "waiting" and (metrics := self.directory / METRICS).is_file():
            steps = metrics.read_bytes().count(b"\n")  # one line a step
        return RunState(self.label, self.seed, kind, steps, self.recipe.trainer["max_steps"], note)


def claim(directory: Path) -> None:
    """Make the directory of a comparison. Raises FileExistsError for a folder that holds something else, OSError where
    links lead out of it."""
    is_ours = (directory / LOCK).exists()
    if directory.exists() and not is_ours and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} is neither an empty folder nor a comparison: give another --output")
    directory.mkdir(parents=True, exist_ok=True)
    refuse_links(directory)
    (directory / LOCK).touch()


def locked(directory: Path) -> AbstractContextManager[int]:
    """Hold the lock of a comparison directory; runs that inherit the handle hold it as long as they live. Raises
    BlockingIOError if another comparison, or a run that it left behind, works there."""
    claim(directory)
    return locked_folder(directory, "comparison", patience=_LET_GO)


def refuse_others(jobs: Sequence[Job]) -> None:
    """Raise ValueError if a run directory holds a run with other settings than the plan's, or something else."""
    for job in jobs:
        if (job.directory / CONFIG).is_file():
            refuse_renamed(job.directory)
            there = flattened(load_recipe(str(job.directory / CONFIG)).to_dict())
            planned = flattened(job.recipe.to_dict())
            for key in sorted(there.keys() | planned.keys()):
                if there.get(key) != planned.get(key):
                    raise ValueError(
                        f"{job.directory} was made with {key}={there.get(key)!r}, the plan says "
                        f"{planned.get(key)!r}: give another --output, or delete that run"
                    )
        elif others := [p for p in job.directory.rglob("*") if not p.is_dir() and not _of_unborn(p.name)]:
            raise ValueError(f"{job.directory} is no run, but holds {others[0].name}: give another --output")


def _of_unborn(name: str) -> bool:
    draft = DRAFT.fullmatch(name)
    return draft["name"] in _UNBORN | {CONFIG} if draft else name in _UNBORN


class Queue:
    """Runs jobs, `at_once` of them at a time, in the given order. `watch` gets the state of all, again and again. The
    first SIGINT or SIGTERM starts nothing more and passes one SIGINT on: each run stops with a checkpoint at its next
    rollout boundary. Another one is passed on too: then they stop at once."""

    def __init__(self, jobs: Sequence[Job], at_once: int, lock: int, watch: Callable[[list[RunState]], None]) -> None:
        self.jobs, self.at_once, self.lock, self.watch = jobs, at_once, lock, watch
        self.processes: dict[Job, subprocess.Popen] = {}
        self.notes: dict[str, str] = {}  # name -> why it failed
        self.stopping = False
        self.states = {job.name: job.state("finished" if job.finished else "waiting") for job in jobs}

    def run(self) -> dict[str, str]:
        """Work until nothing is left; the last line of the log of each run that failed, by name. Raises
        KeyboardInterrupt after a stop, when all runs have ended."""
        waiting = deque(job for job in self.jobs if self.states[job.name].kind == "waiting")
        previous = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self.processes or (waiting and not self.stopping):
                while waiting and len(self.processes) < self.at_once and not self.stopping:
                    self._start(waiting.popleft())
                self._look()
                time.sleep(_LOOK)
            if any(state.kind in ("waiting", "stopped") for state in self.states.values()):
                raise KeyboardInterrupt
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            for process in self.processes.values():  # only after an error of our own
                process.kill()
        return self.notes

    def _start(self, job: Job) -> None:
        command = [sys.executable, "-P", die_with_parent.__file__, str(os.getpid()), *job.prepare()]
        with job.log.open("ab") as log:
            self.processes[job] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": "1"} | os.environ,
                process_group=0,  # a terminal's Ctrl-C reaches us alone, so that runs get it once
                pass_fds=(self.lock,),
            )
        if self.stopping:  # asked while the process was being made
            self.processes[job].send_signal(signal.SIGINT)

    def _look(self) -> None:
        for job, process in list(self.processes.items()):
            if process.poll() is None:
                self.states[job.name] = job.state("stopping" if self.stopping else "running")
                continue
            del self.processes[job]
            kind = "finished" if job.finished else "stopped" if self.stopping else "failed"
            if kind == "failed":
                self.notes[job.name] = _reason(process.returncode, job.log)
            self.states[job.name] = job.state(kind, self.notes.get(job.name, ""))
        self.watch(list(self.states.values()))

    def _stop(self, number: int, frame: Any) -> None:
        self.stopping = True
        for process in self.processes.values():
            process.send_signal(signal.SIGINT)


def _reason(code: int, log: Path) -> str:
    """Why a run failed: the signal that killed it, or what it said last."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit code {code}"
