"""What version 0.1 left behind is read, or refused with one line that says what to change.

The folder version_0_1 is a run of three steps that 0.1 made, without its weights, its tokens and its page.
"""

import json
import shutil
from pathlib import Path

import pytest

from entropy_polarity.experiments.compare.plan import load_plan
from entropy_polarity.experiments.models import refuse_renamed
from entropy_polarity.methods import make_transform
from entropy_polarity.report.page import render_page
from entropy_polarity.runs.checkpoints import check, last_checkpoint
from entropy_polarity.runs.method_state import load_state, save_state
from entropy_polarity.runs.recipe import load_recipe
from entropy_polarity.runs.record import Run
from entropy_polarity.runs.resuming import resume_run

OLD = Path(__file__).parent / "version_0_1"
SETTINGS = {"controller": "reference", "path": "linear", "level": 0.35, "horizon": 50}


@pytest.fixture
def old(tmp_path):
    return Path(shutil.copytree(OLD, tmp_path / "run"))


def test_a_run_is_read_and_has_a_page():
    run = Run.read(OLD)
    assert [row["step"] for row in run.metrics] == [1, 2, 3]
    assert run.summary["status"] == "finished"
    assert run.environment["packages"]["trl"].startswith("1.16")
    page = render_page(run)
    assert "pass@1, held out" in page
    assert page.count("Left out: ") == 2, "the tokens of two rollouts, which are not in this folder"


def test_its_resolved_recipe_is_a_recipe():
    recipe = load_recipe(str(OLD / "config.toml"))
    assert recipe.method == {"name": "papo", **SETTINGS}
    assert recipe.trainer["max_steps"] == 3
    refuse_renamed(OLD)


def test_the_state_of_its_method_is_that_of_the_method_today():
    name, settings = "papo", SETTINGS
    beginning = {"entropy": None, "inner": make_transform(name, settings).init()}
    state = load_state(OLD / "checkpoints/checkpoint-2", name, settings, beginning)
    assert state["inner"]["controller"] == {"k": 1, "first_entropy": state["entropy"]}


def test_a_checkpoint_that_lost_its_weights_is_refused_by_the_name_of_the_file(old):
    assert last_checkpoint(old).name == "checkpoint-2"
    with pytest.raises(FileNotFoundError, match=r"checkpoint-2/config.json is missing"):
        check(old / "checkpoints/checkpoint-2")
    before = {path: path.read_bytes() for path in old.rglob("*.*") if path.is_file()}
    with pytest.raises(FileNotFoundError, match=r"is missing; .*--from-checkpoint 0 starts over"):
        resume_run(old, load_recipe(str(old / "config.toml")).to_dict())
    assert before == {path: path.read_bytes() for path in old.rglob("*.*") if path.is_file()}


def test_a_run_starts_over_where_nothing_else_is_left(old):
    writer, checkpoint = resume_run(old, load_recipe(str(old / "config.toml")).to_dict(), 0)
    assert checkpoint is None
    assert Run.read(writer.directory).metrics == []


def test_papo_of_0_1_without_settings_does_not_go_on_as_another_rule(tmp_path):
    save_state(tmp_path, "papo", {}, {"inner": {"controller": {"fast": 1.0, "slow": 1.0}}})
    with pytest.raises(ValueError, match=r"'trend' in version 0\.1.*: train again, or from its weights with --model"):
        load_state(tmp_path, "papo", {}, make_transform("papo", {}).init())


def test_opefo_of_0_1_does_not_go_on_as_the_opefo_of_today(old):
    config = (old / "config.toml").read_text(encoding="utf-8")
    start, end = config.index("[method]"), config.index("[trainer]")
    (old / "config.toml").write_text(f'{config[:start]}[method]\nname = "opefo"\n\n{config[end:]}', encoding="utf-8")
    environment = json.loads((old / "environment.json").read_text(encoding="utf-8"))
    (old / "environment.json").write_text(json.dumps(environment | {"date": "2026-11-20"}), encoding="utf-8")
    with pytest.raises(ValueError, match="'opefo' was what 'opefo_polarity' is now, and cannot go on as 'opefo'"):
        refuse_renamed(old)


def test_a_recipe_and_a_plan_of_0_1_are_read(tmp_path):
    recipe, plan = tmp_path / "recipe.toml", tmp_path / "plan.toml"
    recipe.write_text(
        'seed = 3\n[method]\nname = "papo"\ncontroller = "trend"\n[trainer]\nmax_steps = 5\n', encoding="utf-8"
    )
    assert load_recipe(str(recipe)).method == {"name": "papo", "controller": "trend"}
    plan.write_text(f'recipe = "{recipe}"\nseeds = [0]\n[methods.grpo]\nname = "grpo"\n', encoding="utf-8")
    assert load_plan(str(plan)).pairs() == [("grpo", 0)]
