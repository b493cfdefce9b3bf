"""The command for the day there is a GPU: a part that fails or hangs takes nothing from the others."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import accelerator
import pytest
from accelerator import Part, Place, StoppedError, run_parts, verdicts

SCRIPT = Path(accelerator.__file__)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator, "machine", lambda place: {"card": "none"})
    for folder in ("output", "work"):
        (tmp_path / folder).mkdir()
    return Place(tmp_path / "output", tmp_path / "work", True, time.monotonic() + 60)


def fine(place):
    place.command("-c", "print('fine')")
    return {"n": 1}


def broken(place):
    place.command("-c", "import sys; sys.exit('the reason')")
    return {}


def hanging(place):
    code = "import subprocess, time; subprocess.Popen(['sleep', '987654']); time.sleep(987654)"
    place.command("-c", code)
    return {}


def on_disk(place):
    return json.loads((place.output / accelerator.SUMMARY).read_text(encoding="utf-8"))["parts"]


def test_what_fails_is_told_with_its_reason_and_the_next_part_runs(place, capsys):
    run_parts(place, ["broken", "fine"], {"broken": Part(broken, 1), "fine": Part(fine, 1)})
    parts = on_disk(place)
    assert parts["broken"]["status"] == "failed"
    assert "exit code 1" in parts["broken"]["why"]
    assert "the reason" in parts["broken"]["why"]
    assert (parts["fine"]["status"], parts["fine"]["found"]) == ("done", {"n": 1})
    assert "the reason" in capsys.readouterr().out


def test_a_part_that_hangs_is_ended_with_all_it_started(place):
    run_parts(place, ["hanging"], {"hanging": Part(hanging, 1.5 / 60)})
    assert on_disk(place)["hanging"]["why"] == "StoppedError: out of time"
    assert subprocess.run(["pgrep", "-f", "sleep 987654"], capture_output=True).returncode == 1


def test_nothing_is_begun_without_time_and_the_rest_goes_on_later(place):
    calls = []
    parts = {name: Part(lambda place, name=name: calls.append(name) or {}, 1) for name in ("fine", "later")}
    run_parts(place, ["fine"], parts)
    place.deadline = time.monotonic() + 5
    run_parts(place, ["fine", "later"], parts)
    assert on_disk(place)["later"]["status"] == "not begun"
    place.deadline = time.monotonic() + 60
    run_parts(place, ["fine", "later"], parts)
    assert on_disk(place)["later"]["status"] == "done"
    assert calls == ["fine", "later"]  # done is done, unless it is asked for
    run_parts(place, ["fine"], parts, again=True)
    assert calls == ["fine", "later", "fine"]


def test_figures_of_a_rehearsal_never_take_the_place_of_a_cards(place):
    assert place.result("kernels").name == "kernels_rehearsal.json"
    run_parts(place, ["fine"], {"fine": Part(fine, 1)})
    place.rehearsal = False
    assert place.result("kernels").name == "kernels_cuda.json"
    with pytest.raises(SystemExit, match="is of a rehearsal: give another --output"):
        run_parts(place, ["fine"], {"fine": Part(fine, 1)})


def test_a_test_that_failed_or_had_an_error_is_named(tmp_path):
    report = tmp_path / "report.xml"
    children = {"a": "", "b": "<failure/>", "c": "<error/>", "d": "<skipped/>"}
    cases = "".join(f'<testcase name="{name}">{child}</testcase>' for name, child in children.items())
    report.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>", encoding="utf-8")
    assert verdicts(report) == ({"passed": 1, "failed": 2, "skipped": 1}, ["b", "c"])


def test_the_report_of_a_former_try_is_no_result_of_this_one(place, monkeypatch):
    (place.work / "checks.xml").write_text('<testsuite><testcase name="a"/></testsuite>', encoding="utf-8")

    def late(*arguments, **_):
        raise StoppedError("out of time")

    monkeypatch.setattr(place, "command", late)
    with pytest.raises(StoppedError, match="out of time"):
        accelerator.checks(place)


def test_checks_without_a_single_test_that_ran_have_failed(place, monkeypatch):
    def nothing(*arguments, **_):
        (place.work / "checks.xml").write_text("<testsuites><testsuite/></testsuites>", encoding="utf-8")

    monkeypatch.setattr(place, "command", nothing)
    with pytest.raises(StoppedError, match="'passed': 0"):
        accelerator.checks(place)


@pytest.mark.slow
def test_the_rehearsal_does_every_part(tmp_path):
    command = [sys.executable, str(SCRIPT), "--rehearse", "--output", str(tmp_path / "found")]
    result = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stdout + result.stderr
    parts = json.loads((tmp_path / "found" / accelerator.SUMMARY).read_text(encoding="utf-8"))["parts"]
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(accelerator.PARTS, "done")


def test_the_tests_that_it_runs_exist():
    named = re.findall(r"tests/[\w/]+\.py", SCRIPT.read_text(encoding="utf-8"))
    assert named
    assert all((SCRIPT.parents[1] / name).is_file() for name in named)
