"""`papo audit`: made, kept, read again, and what it says of bad input."""

import json
import subprocess
import sys

import pytest
from small import SMALL

from entropy_polarity.experiments.auditing import audit, audited_before
from entropy_polarity.experiments.flags import ON_POLICY, audit_folder, audit_recipe
from entropy_polarity.runs.recipe import load_recipe
from entropy_polarity.support.json_files import without_nan

TINY = (*SMALL, "evaluation.problems=8", "trainer.max_completion_length=16")


def comparable(document):
    return without_nan({key: value for key, value in document.items() if key != "environment"})


def test_an_audit_is_made_kept_and_read_again(tmp_path):
    recipe = load_recipe("countdown", [*TINY, *ON_POLICY, "trainer.max_steps=4"], "grpo")
    seen = []
    document = audit(recipe, [0, 1], tmp_path, lambda *line: seen.append(line))
    assert [line[:2] for line in seen] == [(seed, step) for seed in (0, 1) for step in range(1, 5)]
    stored = json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))
    for levels in (stored, stored["held_out"]):
        figures = {"pearson", "spearman", "sign_agreement", "slope", "offset", "detrended_spearman"}
        assert set(levels["exact"]) == figures
    page = (tmp_path / "audit.html").read_text(encoding="utf-8")
    assert "r² of each level" in page
    assert page.count("<h3>") == 5
    again = []
    kept = audit(recipe, [0, 1], tmp_path, lambda *line: again.append(line))
    assert again == []
    assert comparable(kept) == comparable(document)
    with pytest.raises(ValueError, match="holds an audit of another recipe"):
        audit(load_recipe("countdown", [*TINY, *ON_POLICY], "dapo"), [0], tmp_path)
    summed = audited_before(tmp_path / "audit.json", tmp_path / "trainer")
    assert without_nan(summed) == json.loads((tmp_path / "trainer/audit.json").read_text(encoding="utf-8"))
    assert comparable(summed) == comparable(document)
    # one of the two files of a seed is gone, or cannot be read
    (tmp_path / "tokens-0.npz").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokens-0.npz is damaged .*: remove it, and the seed is trained again"):
        audit(recipe, [0], tmp_path)
    (tmp_path / "tokens-0.npz").unlink()
    lines = []
    audit(recipe, [0], tmp_path, lambda *line: lines.append(line))
    assert len(lines) == 4
    (tmp_path / "seed-0.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"seed-0.json is damaged"):
        audit(recipe, [0], tmp_path)
    (tmp_path / "notes.txt").write_text("", encoding="utf-8")
    with pytest.raises(FileExistsError, match=r"no folder of an audit \(it holds notes.txt\)"):
        audit(recipe, [0], tmp_path)
    with pytest.raises(FileExistsError, match=r"notes\.txt is a file"):
        audit(recipe, [0], tmp_path / "notes.txt")


def test_the_recipe_is_the_runs_own_and_the_folder_says_what_is_used(small_runs):
    own = audit_recipe("countdown", str(small_runs[0].directory), None, None, 4)
    assert own.method == small_runs[0].config["method"]
    assert audit_recipe("countdown", str(small_runs[0].directory), None, "grpo", 4).method == {"name": "grpo"}
    plain = audit_recipe("countdown", None, None, None, 4)
    assert plain.method == {"name": "grpo"}
    assert "optim" not in plain.trainer
    assert str(audit_folder("countdown", plain)) == "runs/audit-countdown-grpo-adamw"
    sgd = audit_recipe("countdown", None, None, None, 4, None, ["trainer.optim=sgd"])
    assert str(audit_folder("countdown", sgd)) == "runs/audit-countdown-grpo-sgd"
    assert audit_recipe("countdown", None, None, None, 4, "adamw").trainer["optim"] == "adamw_torch"


def test_a_run_in_which_nobody_has_an_advantage_is_one_line(tmp_path):
    recipe = load_recipe(
        "countdown", [*TINY, *ON_POLICY, "trainer.max_steps=4", "trainer.max_completion_length=1"], "grpo"
    )
    with pytest.raises(ValueError, match="seed 0: 4 updates had a token to look at, 0 one with an advantage"):
        audit(recipe, [0], tmp_path)


def test_the_command_prints_one_document(tmp_path):
    flags = [f"--set={override}" for override in TINY]
    command = [sys.executable, "-m", "entropy_polarity.cli", "audit", "--steps", "4", "--optimizer", "sgd", "--json"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "a"), *flags], capture_output=True, encoding="utf-8", check=True
    )
    document = json.loads(done.stdout)
    assert -1 <= document["exact"]["pearson"]["value"] <= 1
    assert document["local"]["spearman"]["high"] is None  # four updates are too few to say
    assert "update 4/4" in done.stderr


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--method", "grop"], "grop"),
        (["--steps", "0"], "max_steps is 0"),
        (["--steps", "3"], "3 updates, seeds [0]: an audit needs 4 updates"),
        (["--seeds", "0", "0"], "40 updates, seeds [0, 0]: an audit needs 4 updates or more, and different"),
        (["--from", "x.json", "--method", "grpo"], "--method cannot be given with --from"),
        (["--model", "nowhere"], "cannot load a model from 'nowhere'"),
        (["--optimizer", "lion"], "lion"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, flags, told):
    command = [sys.executable, "-m", "entropy_polarity.cli", "audit", "--output", str(tmp_path / "a"), *flags]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "a").exists()
