"""Recipes: what is shipped loads, what is written is what is meant, and a slip is named."""

from pathlib import Path

import pytest
import tomli_w

from entropy_polarity.experiments.setup import trainer_config
from entropy_polarity.methods import make_transform
from entropy_polarity.runs.recipe import DEFAULT_RECIPE, HeldOut, Recipe, load_recipe, recipe_names, with_flags
from entropy_polarity.tasks import make_task


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_makes_its_task_its_method_and_its_trainer(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.title
    assert recipe.cost
    assert recipe.expected
    try:
        method, task = dict(recipe.method), make_task(**recipe.task)
    except ImportError as missing:
        pytest.skip(str(missing))
    assert task.reasons
    assert make_transform(method.pop("name"), method).init() is not None
    assert trainer_config(recipe, tmp_path, task).max_steps > 0


def test_the_default_recipe_is_shipped():
    assert DEFAULT_RECIPE in recipe_names()


def test_a_recipe_is_what_its_file_says_and_defaults_for_the_rest(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('title = "Mine"\nseed = 3\n[method]\nname = "grpo"\n[evaluation]\nproblems = 7\n', encoding="utf-8")
    assert load_recipe(str(path)) == Recipe(
        title="Mine", seed=3, method={"name": "grpo"}, evaluation=HeldOut(problems=7)
    )


def test_a_recipe_written_out_is_read_back(tmp_path):
    recipe, path = load_recipe("countdown", ["seed=5", "trainer.beta=0.1"]), tmp_path / "again.toml"
    path.write_text(tomli_w.dumps(recipe.to_dict()), encoding="utf-8")
    assert load_recipe(str(path)) == recipe


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("trainer.learning_rate=1e-4", "trainer", "learning_rate", 1e-4),
        ("trainer.max_steps=7", "trainer", "max_steps", 7),
        ("trainer.bf16=true", "trainer", "bf16", True),
        ("trainer.run_name=first", "trainer", "run_name", "first"),  # a bare word is a string
        ('trainer.run_name="7"', "trainer", "run_name", "7"),
        ("trainer.run_name=a=b", "trainer", "run_name", "a=b"),
        ("trainer.report_to=[]", "trainer", "report_to", []),
        ("task.numbers=[3, 4]", "task", "numbers", [3, 4]),
        ("method.name=grpo", "method", "name", "grpo"),
        (" method.gain = 2.5", "method", "gain", 2.5),
        ("trainer.model_init_kwargs.dtype=float32", "trainer", "model_init_kwargs", {"dtype": "float32"}),
    ],
)
def test_an_override_is_read_as_toml(override, section, key, value):
    found = getattr(load_recipe("countdown", [override]), section)[key]
    assert found == value
    assert type(found) is type(value)


def test_overrides_reach_the_top_and_the_sections_and_the_last_one_counts():
    overrides = ["seed=4", "evaluation.samples=32", "record.completions=0", "seed=9", "policy.model=some/folder"]
    recipe = load_recipe("countdown", overrides)
    assert (recipe.seed, recipe.evaluation.samples, recipe.record.completions) == (9, 32, 0)
    assert recipe.policy.model == "some/folder"
    assert recipe.evaluation.problems == load_recipe("countdown").evaluation.problems


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("seed", "override 'seed' has no '=': write it like"),
        ("sed=1", "unknown recipe key 'sed': did you mean 'seed'"),
        ("trianer.max_steps=1", "unknown recipe key 'trianer': did you mean 'trainer'"),
        ("evaluation.problem=1", "'evaluation.problem': did you mean 'evaluation.problems'"),
        ("record.completion=1", "did you mean 'record.completions'"),
        ("policy.modle=x", "did you mean 'policy.model'"),
        ("method=grpo", r"recipe key 'method' is 'grpo'; expected a table \[method\]"),
        ("evaluation=5", r"expected a table \[evaluation\]"),
        ("=5", "unknown recipe key ''"),
        ("seed.value=5", "seed"),
        ("title.text=5", "title"),
        ("trainer.max_steps.value=5", "max_steps"),
        ("seed=many", "seed"),
        ("evaluation.problems=many", "problems"),
    ],
)
def test_a_slip_in_an_override_is_named(override, told):
    with pytest.raises(ValueError, match=told):
        load_recipe("countdown", [override])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('titel = "x"', "unknown recipe key 'titel': did you mean 'title'"),
        ("[evaluation]\nsample = 4", "'evaluation.sample': did you mean 'evaluation.samples'"),
        ('method = "papo"', r"expected a table \[method\]"),
        ('[method]\ncontroller = "trend"', r"recipe table \[method\] has no name"),
        ("[task]\nnumbers = [3]", r"recipe table \[task\] has no name"),
        ("seed = = 1", "is not valid TOML: .*line 1"),
        ("seed = 1\nseed = 2", "is not valid TOML"),
    ],
)
def test_a_slip_in_a_file_is_named(tmp_path, text, told):
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=told):
        load_recipe(str(path))


def test_a_recipe_that_does_not_exist_is_named_with_those_that_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no recipe at .*missing.toml: .*countdown"):
        load_recipe(str(tmp_path / "missing.toml"))
    with pytest.raises(FileNotFoundError, match="no recipe at"):
        load_recipe(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="unknown recipe 'countdwn': did you mean 'countdown'"):
        load_recipe("countdwn")


def test_the_evaluation_has_a_seed_of_its_own():
    assert load_recipe("countdown", ["seed=5"]).evaluation.seed == 0
    assert load_recipe("countdown", ["evaluation.seed=5"]).evaluation.seed == 5
    with pytest.raises(ValueError, match=r"'evaluation.seed' is -1; expected at least 0"):
        load_recipe("countdown", ["evaluation.seed=-1"])


def test_another_method_takes_no_settings_along():
    assert load_recipe("countdown", method="grpo").method == {"name": "grpo"}
    # Overrides come after the choice of the method, so that they can be its settings.
    chosen = load_recipe("countdown", ["method.clip_high=0.4"], method="dapo")
    assert chosen.method == {"name": "dapo", "clip_high": 0.4}
    assert load_recipe("countdown", ["method.gain=3"], method="papo").method["level"] == 0.35


@pytest.mark.parametrize(
    ("overrides", "method", "title_holds"),
    [
        (["trainer.learning_rate=1e-3"], None, True),
        ([], "grpo", True),
        (["task={name='guess'}"], None, False),
        (["policy.model=elsewhere"], None, False),
    ],
)
def test_what_was_measured_is_said_of_nothing_else(overrides, method, title_holds):
    written = load_recipe("countdown")
    assert written.cost
    assert written.expected
    changed = load_recipe("countdown", overrides, method)
    assert (changed.cost, changed.expected) == ("", "")
    assert changed.title == (written.title if title_holds else "")
    assert load_recipe("countdown", [*overrides, "title=Mine"], method).title == "Mine"


def test_flags_change_what_was_said_and_nothing_else():
    recipe = load_recipe("countdown")
    assert with_flags(recipe) == recipe
    changed = with_flags(recipe, max_steps=0, seed=0, model="elsewhere")
    assert changed.method == recipe.method
    assert changed.trainer == recipe.trainer | {"max_steps": 0}
    assert (changed.seed, changed.policy.model) == (0, "elsewhere")
    assert changed.task == recipe.task


@pytest.mark.parametrize("name", ["zero2", "zero3", "fsdp"])
def test_the_launch_files_are_accelerates(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(Path(__file__).parents[2] / f"examples/accelerate/{name}.yaml"))
    assert config.num_processes == 8
    assert str(config.distributed_type) in ("DistributedType.DEEPSPEED", "DistributedType.FSDP", "DEEPSPEED", "FSDP")
    if name.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1])


@pytest.mark.parametrize("written", ['method = ["dapo", "papo"]', '[method]\nname = ["dapo", "papo"]'])
def test_a_recipe_names_a_chain_as_a_list(tmp_path, written):
    path = tmp_path / "chain.toml"
    path.write_text(f'cost = "a minute"\n{written}\n', encoding="utf-8")
    assert load_recipe(str(path)).method == {"name": "dapo+papo"}
    assert load_recipe(str(path)).cost == "a minute"
    told = load_recipe(str(path), ["method.level=0.3", "method.dapo.clip_high=0.3"]).method
    assert told == {"name": "dapo+papo", "dapo": {"clip_high": 0.3}, "papo": {"level": 0.3}}
    assert make_transform(told.pop("name"), told).loss.clip_high == 0.3
    assert load_recipe("countdown", ['method=["dapo", "papo"]']).method == {"name": "dapo+papo"}
    with pytest.raises(ValueError, match="unknown method 'dappo': did you mean 'dapo'"):
        make_transform(load_recipe("countdown", ['method=["dappo", "papo"]']).method["name"])
