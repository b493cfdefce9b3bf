"""`papo doctor`: what it finds when all is well, and what it says when it is not."""

import json
import os
import subprocess
import sys

import pytest
import torch

from entropy_polarity.cli import health as doctor
from entropy_polarity.cli.health import examine

BREAK_TRL = """
import trl, sys
trl.__version__ = "1.17.0"
from entropy_polarity.cli import main
sys.argv = ["papo", "doctor", "--json"]
main()
"""


def papo(*arguments: str, code: str | None = None, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "entropy_polarity.cli", *arguments]
    environment = os.environ | {"COLUMNS": "200"} | variables
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment)


def test_all_is_well_here():
    findings = {finding.part: finding for finding in examine()}
    assert not [finding for finding in findings.values() if finding.status == "problem"]
    assert "chunked" in findings["statistics on cpu, float32"].detail
    assert findings["GRPOTrainer._compute_loss"].status == "ok"


def test_a_forced_kernel_that_cannot_run_is_a_problem_and_the_exit_code_says_so():
    result = papo("doctor", PAPO_KERNEL="triton", TRITON_INTERPRET="")
    assert result.returncode == 1
    assert "TRITON_INTERPRET=1" in result.stdout
    assert "Traceback" not in result.stderr


def test_a_trl_that_was_not_tested_is_a_problem_in_words():
    result = papo(code=BREAK_TRL)
    findings = {finding["part"]: finding for finding in json.loads(result.stdout)}
    assert result.returncode == 1
    assert findings["PolarityTrainer"]["status"] == "problem"
    assert "pip install 'trl>=1.16,<1.17'" in findings["PolarityTrainer"]["detail"]


def test_a_kernel_that_computes_wrongly_is_a_problem(monkeypatch):
    right = doctor.token_stats

    def wrong(*arguments, **settings):
        stats = right(*arguments, **settings)
        return stats._replace(entropy=stats.entropy + 1e-4)

    monkeypatch.setattr(doctor, "token_stats", wrong)
    found = [f for f in examine() if f.part.startswith("statistics on cpu")]
    assert [f.status for f in found] == ["problem", "problem"]
    assert "of the error that is allowed" in found[0].detail


def test_a_kernel_that_gives_nan_is_a_problem(monkeypatch):
    right = doctor.linear_token_stats

    def broken(*arguments, **settings):
        stats = right(*arguments, **settings)
        return stats._replace(entropy=stats.entropy * float("nan"))

    monkeypatch.setattr(doctor, "linear_token_stats", broken)
    assert "problem" in [f.status for f in examine() if f.part.startswith("statistics on cpu")]


def test_a_wrong_gradient_is_a_problem(monkeypatch):
    right = doctor.linear_token_loss
    monkeypatch.setattr(doctor, "linear_token_loss", lambda *a, **k: (2 * right(*a, **k)[0], None))
    assert "problem" in [f.status for f in examine() if f.part.startswith("statistics on cpu")]


@pytest.mark.parametrize(("installed", "status"), [(None, "note"), ("3.5.1", "problem"), ("3.9.0", "ok")])
def test_versions_are_compared_with_the_oldest_that_is_supported(monkeypatch, installed, status):
    monkeypatch.setattr(doctor, "installed_version", lambda package: installed if package == "triton" else "99")
    assert {f.part: f.status for f in doctor._versions(["trl"])}["triton"] == status


def test_the_check_sees_an_error_in_the_head_too(monkeypatch):
    right = doctor.linear_token_stats
    monkeypatch.setattr(doctor, "linear_token_stats", lambda *a, **k: right(*a, **k, temperature=1.01))
    assert doctor._error(torch.device("cpu"), torch.float32) > 1


def test_each_framework_brings_its_own_requirements(monkeypatch):
    older = {"transformers": "5.9.0", "trl": None, "verl": "0.9.1", "TransferQueue": "0.1.11"}
    monkeypatch.setattr(doctor, "installed_version", lambda package: older.get(package, "99"))
    with_verl = {f.part: f.status for f in doctor._versions(["verl"])}
    assert (with_verl["verl"], with_verl["TransferQueue"]) == ("ok", "ok")
    assert "transformers" not in with_verl
    with_trl = {f.part: f.status for f in doctor._versions(["trl"])}
    assert with_trl["transformers"] == "problem"
    for here, there in (("trl", "verl"), ("verl", "trl")):
        (other,) = (f for f in doctor._versions([here]) if f.part == there)
        assert other.status == "note"
        assert f"pip install 'entropy-polarity[{there}]' in an environment of its own" in other.detail
    (missing,) = (f for f in doctor._versions([]) if f.part == "a framework to train with")
    assert missing.status == "problem"
    assert "entropy-polarity[trl]' or pip install 'entropy-polarity[verl]" in missing.detail


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({}, None),
        ({"VERL_USE_EXTERNAL_PLUGINS": "none"}, "VERL_USE_EXTERNAL_PLUGINS=none leaves 'entropy_polarity' out"),
        ({"VERL_USE_EXTERNAL_PLUGINS": "other, entropy_polarity"}, None),
        (
            {
                "VERL_USE_EXTERNAL_PLUGINS": "none",
                "VERL_USE_EXTERNAL_MODULES": "other,entropy_polarity.trainers.verl",
            },
            None,
        ),
    ],
)
def test_whether_verl_would_load_the_plug_in(environment, reason, monkeypatch):
    for name in ("VERL_USE_EXTERNAL_PLUGINS", "VERL_USE_EXTERNAL_MODULES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert doctor._why_verl_leaves_it_out() == reason
    monkeypatch.setattr(doctor, "entry_points", lambda group: [])
    without = doctor._why_verl_leaves_it_out()
    assert (without is None) == ("VERL_USE_EXTERNAL_MODULES" in environment)


def test_without_trl_the_commands_that_need_it_say_so():
    code = "import sys; sys.modules['trl'] = None; sys.argv = ['papo', 'train']; "
    code += "from entropy_polarity.cli import main; main()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert run.returncode == 2
    assert "this needs TRL" in run.stderr
    assert run.stderr.rstrip().endswith("pip install 'entropy-polarity[trl]'")
