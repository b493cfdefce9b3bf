"""The operating system's boundary: attacks from inside have no effect, with our names and hook and without them; where
there is no boundary nothing runs unasked, and attacks do succeed. All of it: benchmarks/reliability/sandbox.py.
"""

import errno
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from reliability.attacked import Scene
from reliability.attacks import ATTACKS
from reliability.sandbox import ANSWERED, swept

from entropy_polarity import cli
from entropy_polarity.cli import health as doctor
from entropy_polarity.tasks import boundary, make_task, tools
from entropy_polarity.tasks.boundary import BoundaryError, Examination, examine
from entropy_polarity.tasks.tools import known_tools, python
from entropy_polarity.tasks.workers import Workers

pytestmark = pytest.mark.skipif(bool(examine().lacking), reason=f"no boundary here: {examine().lacking}")
GROUPS = sorted({attack.group for attack in ATTACKS})
HARMLESS = [attack for attack in ATTACKS if attack.must_succeed]
ENDINGS = {"exit", "abort", "a wild pointer", "a wild jump", "the output", "the interpreter's own state", "the clock"}


@pytest.fixture(scope="module", params=["boundary", "all"])
def scene(request, tmp_path_factory):
    with Scene(tmp_path_factory.mktemp("scene"), request.param, seconds=1.0) as scene:
        yield scene


def test_there_are_enough_attacks_of_every_kind():
    assert len(ATTACKS) >= 250
    assert len({attack.code for attack in ATTACKS}) == len(ATTACKS)
    assert len(HARMLESS) >= 20


@pytest.mark.parametrize("group", GROUPS)
def test_no_attack_has_an_effect(scene, group):
    attacks = [a for a in ATTACKS if a.group == group and (group != "ends" or a.title in ENDINGS)]
    if scene.layers == "all":  # nearly all of them end at the first name: a part will do here
        attacks = [a for a in attacks if a.must_succeed or group in ("escapes", "environment")] or attacks[:4]
    effects = {attack.title: found for attack in attacks if (found := scene.attempt(attack, False)[0])}
    assert effects == {}
    assert [process.cmdline() for process in scene.strays()] == []


def test_the_kernel_itself_refuses(tmp_path):
    """With root and files within reach, and in words that are the kernel's: the filter alone."""
    refused = os.strerror(errno.EPERM)
    with Scene(tmp_path, "seccomp", seconds=1.0) as scene:
        said = {attack.title: scene.attempt(attack, False) for attack in HARMLESS if attack.group == "files"}
        fork = next(attack for attack in HARMLESS if attack.group == "processes")
        said[fork.title] = scene.attempt(fork)
    assert {title: found for title, (found, words) in said.items() if found or refused not in words} == {}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are those of x86-64")
def test_no_call_is_answered_but_those_of_the_list():
    found = swept("seccomp")
    assert set(found["answered"]) == ANSWERED
    assert found["tried"] > 1000


def test_without_a_boundary_attacks_succeed(tmp_path):
    chosen = {"files": 3, "escapes": 3, "signals": 2, "tracing": 2}
    with Scene(tmp_path, "none", seconds=0.5) as scene:
        for group, count in chosen.items():
            for attack in [attack for attack in HARMLESS if attack.group == group][:count]:
                if attack.group == "tracing" and os.geteuid() != 0:
                    continue
                assert scene.attempt(attack)[0], attack.title


def test_a_process_inside_is_nobody_and_dies_with_its_parent():
    if os.geteuid() == 0:
        assert "another user" in examine().parts
    assert {"seccomp", "no_new_privs", "end with parent"} <= set(examine().parts)
    code = (
        "import os, time\nfrom entropy_polarity.tasks import sandbox\nsandbox._modules = lambda: {}\n"
        "sandbox.run('while True: pass', 60.0)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    child = None
    while child is None or (os.geteuid() == 0 and child.uids().real == 0):
        assert parent.poll() is None
        child = next(iter(psutil.Process(parent.pid).children()), None)
    status = Path(f"/proc/{child.pid}/status")
    while "Seccomp:\t2" not in status.read_text(encoding="utf-8"):
        assert parent.poll() is None
    said = status.read_text(encoding="utf-8")
    assert "NoNewPrivs:\t1" in said
    if os.geteuid() == 0:
        assert "Uid:\t65534\t65534\t65534\t65534" in said
        assert "CapEff:\t0000000000000000" in said
        assert "Groups:\t\n" in said or "Groups:\t \n" in said
    parent.kill()
    parent.wait()
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


# ---- where there is none ------------------------------------------------------------------------------------


@pytest.fixture
def none_here(monkeypatch):
    monkeypatch.setattr(tools, "examine", lambda: Examination((), "pyseccomp is not installed"))
    monkeypatch.delenv(tools.CONSENT, raising=False)


CURES = r"pyseccomp is not installed.*pip install 'entropy-polarity\[tools\]'.*libseccomp2.*PAPO_UNSAFE_PYTHON=1"


def test_without_a_boundary_nothing_runs_unasked(none_here, monkeypatch, tmp_path):
    with pytest.raises(BoundaryError, match=CURES):
        python("print(1)")
    with pytest.raises(BoundaryError, match=CURES):
        known_tools(["calculator", "python"])
    (tmp_path / "sums.jsonl").write_text(json.dumps({"problem": "1 + 1", "answer": "2"}), encoding="utf-8")
    with pytest.raises(BoundaryError, match=CURES):
        make_task("math", data=str(tmp_path / "sums.jsonl"), tools=["python"])
    assert known_tools(["calculator"]) == ("calculator",)
    monkeypatch.setenv(tools.CONSENT, "yes")
    with pytest.raises(BoundaryError, match=CURES):
        python("print(1)")


def test_with_consent_code_runs_behind_the_other_layers(none_here, monkeypatch):
    monkeypatch.setenv(tools.CONSENT, "1")
    assert known_tools(["python"]) == ("python",)
    assert python("6 * 7") == "42"
    assert python("import os").startswith("error: ImportError")


def test_the_command_says_so_in_one_line_before_it_trains(none_here, monkeypatch, tmp_path, capsys):
    (tmp_path / "sums.jsonl").write_text(json.dumps({"problem": "1 + 1", "answer": "2"}), encoding="utf-8")
    out = tmp_path / "run"
    settings = ["--set", f"task.data={tmp_path / 'sums.jsonl'}", "--set", 'task.tools=["python"]']
    monkeypatch.setattr(sys, "argv", ["papo", "train", "--task", "math", "--output", str(out), *settings])
    with pytest.raises(SystemExit):
        cli.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(CURES, line)
    assert not out.exists()


@pytest.mark.parametrize(
    ("broken", "lacking"),
    [
        ({"pyseccomp": "raise RuntimeError('Unable to find libseccomp')"}, "libseccomp was not found"),
        ({"pyseccomp": "raise ImportError('x')"}, "pyseccomp is not installed"),
    ],
)
def test_an_examination_says_what_is_lacking(tmp_path, monkeypatch, broken, lacking):
    for name, text in broken.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    examine.cache_clear()
    try:
        assert examine() == Examination((), lacking)
    finally:
        monkeypatch.undo()
        examine.cache_clear()


def test_a_filter_that_lets_something_through_is_no_boundary(tmp_path, monkeypatch):
    """As on a kernel, or under an emulation of one, that takes a filter and does not follow it."""
    source = Path(boundary._seccomp().__file__).read_text(encoding="utf-8")
    (tmp_path / "pyseccomp.py").write_text(source + "\nSyscallFilter.load = lambda self: None\n", encoding="utf-8")
    (tmp_path / "landlockpy.py").write_text("def abi_version(): return 0\nLandlockError = OSError\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    examine.cache_clear()
    try:
        assert examine() == Examination((), "a process inside it could open a file")
    finally:
        monkeypatch.undo()
        examine.cache_clear()


def test_the_doctor_says_what_the_boundary_is_made_of(monkeypatch):
    (found,) = doctor._tool_python()
    assert (found.part, found.status) == ("tool python", "ok")
    assert "seccomp, no_new_privs" in found.detail
    monkeypatch.setattr(boundary, "examine", lambda: Examination((), "libseccomp was not found"))
    (found,) = doctor._tool_python()
    assert found.status == "note"
    assert found.detail.startswith("no boundary: libseccomp was not found: pip install")


# ---- those that only read ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "arguments", "failure"),
    [
        ("os:truncate", ["@", 0], "PermissionError"),
        ("os:unlink", ["@"], "PermissionError"),
        ("os:mkdir", ["@/../made"], "PermissionError"),
        ("os:open", ["@", os.O_WRONLY], "PermissionError"),
        ("os:open", ["@", os.O_RDONLY | os.O_TRUNC], "PermissionError"),
        ("os:open", ["@.new", os.O_RDONLY | os.O_CREAT], "PermissionError"),
        ("os:system", ["true"], None),
        ("os:kill", [os.getpid(), 0], "PermissionError"),
        ("socket:create_connection", [["127.0.0.1", 9]], "PermissionError"),
        ("subprocess:call", [["true"]], "PermissionError"),
    ],
)
def test_a_worker_that_only_reads_can_do_nothing_else(tmp_path, function, arguments, failure):
    kept = tmp_path / "kept"
    kept.write_text("kept", encoding="utf-8")
    arguments = [a.replace("@", str(kept)) if isinstance(a, str) else a for a in arguments]
    with Workers(function, count=1, reads_only=True) as workers:
        (outcome,) = workers.map([arguments])
    assert outcome.failure == failure if failure else outcome.value != 0
    assert kept.read_text(encoding="utf-8") == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_worker_that_only_reads_reads_imports_and_keeps_its_limits(tmp_path):
    (tmp_path / "kept").write_text("kept", encoding="utf-8")
    with Workers("linecache:getline", count=1, reads_only=True) as workers:
        assert workers.map([(str(tmp_path / "kept"), 1)])[0].value == "kept\n"
    with Workers("importlib:import_module", count=1, reads_only=True) as workers:
        assert workers.map([("_decimal",), ("colorsys",)])[0].failure == "TypeError"  # it came, and is no JSON
    with Workers("itertools:count", seconds=0.5, count=1, reads_only=True, clock="processor") as workers:
        assert workers.map([()])[0].failure == "TypeError"
    with Workers("builtins:sum", seconds=0.5, count=1, reads_only=True, clock="processor") as workers:
        assert workers.map([([1, 2],)])[0].value == 3
    with Workers("operator:pow", seconds=0.5, count=1, reads_only=True, clock="processor") as workers:
        assert workers.map([(9, 9**9)])[0].failure == "timed out"
