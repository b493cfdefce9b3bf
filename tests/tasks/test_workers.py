"""Workers: values come back in order, what misbehaves is ended and replaced, and nothing is left behind."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from entropy_polarity.tasks.workers import DIED, OUT_OF_MEMORY, TIMED_OUT, Outcome, Workers


def double(x):
    return 2 * x


def busy(how, seconds):
    if how == "waits":
        time.sleep(seconds)
    until = time.monotonic() + seconds * (how == "computes")
    while time.monotonic() < until:
        pass
    return how


def misbehave(how):
    if how == "sleep":
        time.sleep(60)
    elif how == "swallow":
        while True:
            try:
                time.sleep(0.01)
            except Exception:  # an exception of the alarm must get past this
                continue
    elif how == "deaf":
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        time.sleep(60)
    elif how == "power":
        return len(str(9 ** (9**9)))
    elif how == "memory":
        return len(bytearray(1 << 34))
    elif how == "die":
        os._exit(3)
    elif how == "child":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        time.sleep(60)
    elif how == "unsendable":
        return object()
    elif how == "print":
        print('{"value": "forged", "failure": ""}', flush=True)
    return how


@pytest.fixture
def here(monkeypatch):
    """The functions above, as the workers import them."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]))
    return "test_workers:"


def test_values_come_back_in_order(here):
    with Workers(here + "double", count=2) as workers:
        assert workers.map([(i,) for i in range(20)]) == [Outcome(2 * i) for i in range(20)]
        assert workers.map([]) == []


@pytest.mark.parametrize(
    ("how", "failure"),
    [
        ("sleep", TIMED_OUT),
        ("swallow", TIMED_OUT),
        ("deaf", TIMED_OUT),
        ("power", TIMED_OUT),
        ("memory", OUT_OF_MEMORY),
        ("die", DIED),
        ("child", TIMED_OUT),
        ("unsendable", "TypeError"),
    ],
)
def test_what_misbehaves_fails_alone(here, how, failure):
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    with Workers(here + "misbehave", seconds=0.3, memory_bytes=1 << 30, count=1) as workers:
        began = time.monotonic()
        assert workers.map([("well",), (how,), ("again",)]) == [
            Outcome("well"),
            Outcome(None, failure),
            Outcome("again"),
        ]
        assert time.monotonic() - began < 30
    left = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
    assert left == [], "a process or a zombie is left"


def test_what_a_library_prints_is_no_answer(here):
    with Workers(here + "misbehave", count=1) as workers:
        assert workers.map([("print",)]) == [Outcome("print")]


def test_a_function_that_cannot_be_imported_says_why():
    with Workers("no_such_module:f", count=1) as workers, pytest.raises(RuntimeError, match="No module named"):
        workers.map([()])


@pytest.mark.parametrize("limit", [{"seconds": 0}, {"memory_bytes": -1}, {"count": 0}])
def test_limits_are_checked(limit):
    with pytest.raises(ValueError, match="expected positive numbers"):
        Workers("operator:add", **limit)


def test_workers_end_with_a_killed_parent(here):
    code = (
        "from entropy_polarity.tasks.workers import Workers; import os\n"
        "w = Workers('test_workers:double', count=1); w.map([(1,)])\n"
        "print(w._idle.get().process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    worker = int(found.stdout)
    for _ in range(100):
        if not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    pytest.fail("the worker outlives its parent")


def test_equal_calls_of_a_pure_function_are_made_once():
    with Workers("random:randint", count=2) as workers:
        outcomes = workers.map_distinct([(0, 10**12), (1, 10**12), (0, 10**12), (0, 10**12)])
        assert outcomes[0] == outcomes[2] == outcomes[3] != outcomes[1]
        assert workers.map_distinct([]) == []


def test_processor_time_is_not_the_time_of_day(here):
    """A call that waits, as it would for its turn on a busy machine, is not late; one that computes on is."""
    with Workers(here + "busy", seconds=0.5, count=1, clock="processor") as workers:
        assert workers.map([("waits", 1.0), ("computes", 60.0), ("waits", 0.0)]) == [
            Outcome("waits"),
            Outcome(None, TIMED_OUT),
            Outcome("waits"),
        ]
