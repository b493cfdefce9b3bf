"""A function of untrusted text, called in processes that can be killed: bounded time and memory, and nothing left over.

A library's own time limit is an alarm, which works in the main thread alone and cannot interrupt a long multiplication.
Here the parent watches: a worker that does not answer in time is killed and replaced, and its call has a failure in
place of a value. Arguments and values travel as JSON: nothing of a worker is unpickled.
"""

import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from queue import SimpleQueue
from time import monotonic
from typing import Any, Literal, NamedTuple

from entropy_polarity.tasks.boundary import Boundary

START_SECONDS = 120.0  # for the imports of a worker
GRACE_SECONDS = 1.0  # between the worker's own alarm and its end
PATIENCE = 20  # times the limit of processor time: on a machine this busy a call waits for its turn, and is not late
TIMED_OUT, OUT_OF_MEMORY, DIED = "timed out", "out of memory", "worker died"
_READY = {"ready": True}
_TIMERS = {"wall": (signal.ITIMER_REAL, signal.SIGALRM), "processor": (signal.ITIMER_PROF, signal.SIGPROF)}
_NEEDED = {"PATH", "LD_LIBRARY_PATH"}  # to start an interpreter at all


class NoWorkerError(RuntimeError):
    """No process can make the call, whatever its arguments: the machine or the installation is at fault."""


class _Terms(NamedTuple):
    """What a process is for, and what a call in it may take."""

    function: str
    seconds: float
    memory_bytes: int
    clock: Literal["wall", "processor"]
    preload: str
    isolated: bool
    last_folder: str
    reads_only: bool


class Outcome(NamedTuple):
    """What became of a call: its value, or in a few words why there is none; `failure` is empty where it went well."""

    value: Any
    failure: str = ""


class Workers(AbstractContextManager["Workers"]):
    """`count` processes that call `function`, an importable "module:name", with JSON arguments.

    >>> with Workers("operator:add", count=1) as workers:
    ...     workers.map([(1, 2), (1, "a")])
    [Outcome(value=3, failure=''), Outcome(value=None, failure='TypeError')]

    A call may take `seconds` and a process `memory_bytes` of address space; what takes more is ended, and so is
    every process that it started. `clock` "wall" is for what may sleep or wait; with "processor" only the call's
    own computing counts (and 20 times as long by the wall), so that its outcome does not depend on how busy the
    machine is. Failures: "timed out", "out of memory", "worker died", or the name of the exception. Processes start
    at the first call and end with `close`, with the object or with this process, even when it is killed. They
    import the function, and the module `preload`, before the clock of a call runs; what this process can import,
    they can, and last of all from `last_folder`. `isolated` ones get nothing else of this process's environment,
    where keys to services may be. Those that `reads_only` call the function inside the operating system's boundary,
    where there is one (tasks/boundary.py): they can read files and compute, and do nothing else. `map` may be called
    from any thread. Raises ValueError for limits that are not positive; the first call raises NoWorkerError, with the
    reason, where no worker can import these.
    """

    def __init__(
        self,
        function: str,
        *,
        seconds: float = 5.0,
        memory_bytes: int = 4 << 30,
        count: int | None = None,
        clock: Literal["wall", "processor"] = "wall",
        preload: str = "",
        isolated: bool = False,
        last_folder: str = "",
        reads_only: bool = False,
    ) -> None:
        count = max(1, os.cpu_count() or 1) if count is None else count
        if not (seconds > 0 and memory_bytes > 0 and count > 0):
            raise ValueError(
                f"Workers: seconds={seconds}, memory_bytes={memory_bytes}, count={count}; expected positive numbers"
            )
        self.count = count
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for _ in range(count):
            terms = _Terms(function, seconds, memory_bytes, clock, preload, isolated, last_folder, reads_only)
            self._idle.put(_Worker(terms))

    def map(self, calls: Sequence[Sequence[Any]]) -> list[Outcome]:
        """The outcome of every call, in order."""
        if min(self.count, len(calls)) < 2:
            return [self._call(call) for call in calls]  # threads cost more than a small call
        with ThreadPoolExecutor(self.count) as threads:
            return list(threads.map(self._call, calls))

    def map_distinct(self, calls: Sequence[Sequence[Any]]) -> list[Outcome]:
        """As `map`, of a pure function: equal calls are made once. Completions of one group are often the same."""
        keys = [json.dumps(list(call)) for call in calls]
        distinct = dict(zip(keys, calls, strict=True))
        outcomes = dict(zip(distinct, self.map([*distinct.values()]), strict=True))
        return [outcomes[key] for key in keys]

    def _call(self, arguments: Sequence[Any]) -> Outcome:
        worker = self._idle.get()
        try:
            return worker.call(arguments)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End all processes; a later call starts them again."""
        for worker in [self._idle.get() for _ in range(self.count)]:
            worker.end()
            self._idle.put(worker)

    def __exit__(self, *_: Any) -> None:
        self.close()


class _Worker:
    """One process, started when it is needed and after it was ended."""

    def __init__(self, terms: _Terms) -> None:
        self.terms = terms
        self.process: subprocess.Popen[bytes] | None = None

    def call(self, arguments: Sequence[Any]) -> Outcome:
        process = self.process or self._start()
        assert process.stdin is not None
        patience = PATIENCE if self.terms.clock == "processor" else 1
        deadline = monotonic() + patience * self.terms.seconds + GRACE_SECONDS
        try:
            # A worker reads a whole line before it computes, so that this never waits for a reader that is stuck.
            process.stdin.write(json.dumps(list(arguments)).encode() + b"\n")
            process.stdin.flush()
            answer = _read_line(process, deadline)
        except BrokenPipeError:
            answer = b""
        if answer is None or not answer.endswith(b"\n"):
            killed_itself = self.end() == -signal.SIGXCPU
            return Outcome(None, TIMED_OUT if answer is None or killed_itself else DIED)
        return Outcome(**json.loads(answer))

    def _start(self) -> "subprocess.Popen[bytes]":
        path = os.pathsep.join(entry for entry in sys.path if entry)
        # The current folder may be anybody's: a module in it must not take the place of one of ours. -I would leave out
        # the path and the order of sets too.
        flags = ["-P", "-s"] if self.terms.isolated else ["-P"]
        inherited = {name: value for name, value in os.environ.items() if not self.terms.isolated or name in _NEEDED}
        process = subprocess.Popen(
            [sys.executable, *flags, "-m", "entropy_polarity.tasks.workers", json.dumps(self.terms)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a group of its own, to be killed as one
            # One order of sets in every process: what a function makes of its arguments is the same everywhere.
            env=inherited | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        )
        self.process = process
        self._finalizer = weakref.finalize(self, _kill, process)
        hello = _read_line(process, monotonic() + START_SECONDS)
        if not hello or json.loads(hello) != _READY:
            self.end()
            why = json.loads(hello)["failure"] if hello else "it did not start"
            raise NoWorkerError(f"no worker can call {self.terms.function}: {why}")
        return process

    def end(self) -> int | None:
        """Kill the process and all that it started, and wait for it: no zombie stays. Returns its exit status."""
        if self.process is None:
            return None
        self._finalizer.detach()
        process, self.process = self.process, None
        return _kill(process)


def _kill(process: "subprocess.Popen[bytes]") -> int:
    died_of = process.poll()
    with suppress(ProcessLookupError, PermissionError):  # the group is gone
        os.killpg(process.pid, signal.SIGKILL)
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with suppress(BrokenPipeError):
            pipe.close()
    status = process.wait()
    return status if died_of is None else died_of


def _read_line(process: "subprocess.Popen[bytes]", deadline: float) -> bytes | None:
    """A line of the process's output; without its end where the process ended; None where the deadline passed."""
    assert process.stdout is not None
    descriptor, line = process.stdout.fileno(), b""
    while not line.endswith(b"\n"):
        readable, _, _ = select.select([descriptor], [], [], max(0.0, deadline - monotonic()))
        if not readable:
            return None
        chunk = os.read(descriptor, 1 << 16)
        if not chunk:
            return line
        line += chunk
    return line


def _serve(terms: _Terms) -> None:
    """The loop of a worker: a line of arguments in, a line of outcome out, until the parent is gone."""
    calls, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # and what it reads is no call

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    if terms.last_folder:
        sys.path.append(terms.last_folder)
    try:
        module, _, attribute = terms.function.partition(":")
        function = getattr(importlib.import_module(module), attribute)
        if terms.preload:
            importlib.import_module(terms.preload)
    except Exception as error:
        answer(failure=f"{type(error).__name__}: {error}")
        return
    resource.setrlimit(resource.RLIMIT_AS, (terms.memory_bytes, terms.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    timer, alarm = _TIMERS[terms.clock]
    signal.signal(alarm, _alarm)
    if terms.reads_only:
        with suppress(OSError):  # where the system has no such boundary, all stays as it is
            boundary = Boundary([answers.fileno(), 1, 2], "reading")
            boundary.withdraw()
            boundary.seal()
    answer(**_READY)
    for line in calls:
        answer(**_outcome(function, json.loads(line), terms.seconds, timer)._asdict())


def _outcome(function: Callable[..., Any], arguments: list[Any], seconds: float, timer: int) -> Outcome:
    # The system's limit ends this process also where the parent is gone and the alarm is not heard.
    used, (_, hard) = resource.getrusage(resource.RUSAGE_SELF), resource.getrlimit(resource.RLIMIT_CPU)
    soft = int(used.ru_utime + used.ru_stime + seconds + GRACE_SECONDS) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))
    try:
        signal.setitimer(timer, seconds)
        value = function(*arguments)
        json.dumps(value)
        return Outcome(value)
    except _TimedOutError:
        return Outcome(None, TIMED_OUT)
    except MemoryError:
        return Outcome(None, OUT_OF_MEMORY)
    except Exception as error:
        return Outcome(None, type(error).__name__)
    finally:
        signal.setitimer(timer, 0)


class _TimedOutError(BaseException):
    """Not an Exception: a library that catches everything must not swallow it."""


def _alarm(number: int, frame: Any) -> None:
    raise _TimedOutError


if __name__ == "__main__":
    _serve(_Terms(*json.loads(sys.argv[1])))
