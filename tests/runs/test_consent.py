"""A stranger's run folder: what it names is neither imported nor fetched until this command line says it again."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
from test_cli import papo

from entropy_polarity.experiments.compare.runs import Job
from entropy_polarity.policy.loading import check_folder, load_policy
from entropy_polarity.runs.consent import check_said_again, said_again, stay_offline
from entropy_polarity.runs.recipe import load_recipe, recipe_names
from entropy_polarity.tasks import make_task
from entropy_polarity.tasks.workers import Outcome, Workers

FACTORY = {"name": "env", "factory": "canary:Env", "settings": {"floors": 3}}


@pytest.fixture
def stranger(small_runs, tmp_path, monkeypatch):
    """Makes a run folder with the given tables in its config.toml; its canary tells whether a module was imported."""
    monkeypatch.setenv("CANARY", str(tmp_path / "imported"))
    monkeypatch.chdir(tmp_path)

    def made(**tables):
        run = tmp_path / "run"
        shutil.copytree(small_runs[0].directory, run)
        config = dict(small_runs[0].config)
        for name, table in tables.items():
            config[name] = table if name == "task" else config[name] | table
        (run / "config.toml").write_text(tomli_w.dumps(config), encoding="utf-8")
        return run

    return made


COMMANDS = {
    "eval": ("eval", "--model", "run", "--problems", "1", "--samples", "1"),
    "audit": ("audit", "--model", "run", "--steps", "4", "--output", "out"),
    "resume": ("train", "--resume", "run", "--max-steps", "8"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_class_that_a_run_names_is_not_imported(command, stranger, tmp_path, monkeypatch, capfd):
    stranger(task=FACTORY)
    code, out, err = papo(monkeypatch, capfd, *COMMANDS[command])
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.endswith("(made with floors=3); nothing of it was imported or fetched. If you trust it, say it again: "
                        "--set=task.factory=canary:Env\n")  # fmt: skip
    assert not (tmp_path / "imported").exists()


def test_what_is_said_again_is_used(stranger, tmp_path, monkeypatch, capfd):
    stranger(task={"name": "env", "factory": "canary:Env"})
    code, out, err = papo(monkeypatch, capfd, *COMMANDS["eval"], "--json", "--set=task.factory=canary:Env")
    assert code == 0, err
    assert json.loads(out)["task"] == {"name": "env", "factory": "canary:Env"}
    assert (tmp_path / "imported").exists(), "the canary sings"


@pytest.mark.parametrize("factory", ["subprocess:check_output", "canary:run", "collections:Counter", "os:environ"])
def test_what_is_no_class_of_an_environment_is_never_called(factory, tmp_path, monkeypatch):
    """Not even where the command line allows it."""
    monkeypatch.setenv("CANARY", str(tmp_path / "imported"))
    settings = {"args": ["touch", str(tmp_path / "called")]}
    with pytest.raises(ValueError, match=r"cannot be played: it (is a|has no) ") as told:
        make_task("env", factory=factory, settings=settings)
    assert "\n" not in str(told.value)
    assert not list(tmp_path.glob("*called"))


HUB = {"report_to": "none", "beta": 0.1, "bf16": False, "learning_rate": 1e-4, "optim": "sgd", "num_generations": 4}


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        ({"task": FACTORY}, ["--set=task.factory=canary:Env"]),
        ({"task": {"name": "math", "data": "someone/problems"}}, ["--set=task.data=someone/problems"]),
        ({"task": {"name": "math:gsm8k", "tools": ["calculator", "python"]}},
         ['--set=task.tools=["calculator", "python"]']),
        ({"trainer": {"report_to": ["wandb"]}}, ['--set=trainer.report_to=["wandb"]']),
        ({"trainer": {"push_to_hub": True, "hub_model_id": "me/model"}},
         ["--set=trainer.push_to_hub=true", "--set=trainer.hub_model_id=me/model"]),
        ({"trainer": {"trust_remote_code": True}}, ["--set=trainer.trust_remote_code=true"]),
        ({"trainer": {"model_init_kwargs": {"a": {"b": "1"}}}}, ['--set=trainer.model_init_kwargs.a.b="1"']),
        ({"trainer": {"vllm_mode": "server", "vllm_server_host": "198.51.100.7"}},
         ["--set=trainer.vllm_mode=server", "--set=trainer.vllm_server_host=198.51.100.7"]),
        ({"trainer": {"deepspeed": "ds.json"}}, ["--set=trainer.deepspeed=ds.json"]),
        ({"policy": {"model": "someone/model"}}, ["--set=policy.model=someone/model"]),
        ({"policy": {"model": "embedded:guess"}, "task": {"name": "math:gsm8k"}, "trainer": HUB}, []),
        ({"policy": {"model": "./somewhere"}, "task": {"name": "math", "data": __file__}}, []),
    ],
)  # fmt: skip
def test_what_reaches_beyond_a_folder_has_to_be_said(recipe, flags):
    assert said_again(recipe) == flags
    rest = [flag for flag in flags if not flag.startswith("--set=policy.model")]
    if rest:
        with pytest.raises(ValueError, match="say it again: ") as told:
            check_said_again("run", recipe, ())
        assert shlex.split(str(told.value).partition("say it again: ")[2]) == rest
    check_said_again("run", recipe, [flag.removeprefix("--set=") for flag in flags])


def test_the_recipes_that_come_with_the_package_can_be_resumed_without_a_word():
    for name in recipe_names():
        recipe = load_recipe(name).to_dict()
        check_said_again("run", recipe, ())
        assert all(flag.startswith("--set=policy.model=") for flag in said_again(recipe))


def test_a_resumed_run_keeps_its_recipe(stranger, monkeypatch, capfd):
    stranger()
    code, _, err = papo(monkeypatch, capfd, *COMMANDS["resume"], "--set", "trainer.learning_rate=1")
    assert code == 2
    assert "can only say again what the run itself says" in err
    code, _, err = papo(monkeypatch, capfd, *COMMANDS["resume"], "--set", "task.factory=canary:Env")
    assert code == 2
    assert "can only say again" in err


def test_a_model_of_the_hub_is_looked_for_on_this_machine_only(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    recipe = {"policy": {"model": "someone/no-such-model"}}
    with pytest.raises(
        ValueError, match=r"not on this machine: to ask the hub, add --set=policy\.model=someone/no-such-"
    ):
        stay_offline("run", recipe, ())
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    stay_offline("run", recipe, ["policy.model=someone/no-such-model"])
    assert os.environ["HF_HUB_OFFLINE"] == "0"


def test_a_comparison_says_again_what_its_own_plan_names(tmp_path):
    recipe = load_recipe("guess", ["task={name='env', factory='canary:Env'}"])
    job = Job("grpo", 0, recipe, tmp_path)
    job.directory.mkdir(parents=True)
    (job.directory / "config.toml").touch()
    command = job.prepare()
    assert command[-3:] == ["--resume", str(job.directory), "--set=task.factory=canary:Env"]
    assert command[1] == "-P", "modules of the current folder do not take the place of others"


def test_workers_do_not_take_modules_of_the_current_folder(tmp_path, monkeypatch):
    """A folder that somebody sent may hold a json.py."""
    monkeypatch.chdir(tmp_path)
    for name in ("json", "sitecustomize", "entropy_polarity"):
        (tmp_path / f"{name}.py").write_text(
            f"open({str(tmp_path / 'imported')!r}, 'w')\nraise SystemExit\n", encoding="utf-8"
        )
    (tmp_path / "lift.py").write_text("def double(x):\n    return 2 * x\n", encoding="utf-8")
    with Workers("operator:add", count=1) as workers:
        assert workers.map([(1, 2)]) == [Outcome(3)]
    with Workers("lift:double", count=1, last_folder=str(tmp_path)) as workers:
        assert workers.map([(4,)]) == [Outcome(8)]
    assert not (tmp_path / "imported").exists()


def _model(embedded, tmp_path, **changes):
    folder = tmp_path / "model"
    shutil.copytree(embedded, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "t5"}, "holds a model of type 't5'; expected a causal language model"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "canary.C"}}, "of type 'own'; expected a causal"),
        ({"attn_implementation": "someone/kernel"}, "wants a kernel of the hub"),
        ({"text_config": {"_attn_implementation_internal": {"": "someone/kernel:f"}}}, "wants a kernel of the hub"),
    ],
)
def test_a_model_brings_no_code_and_no_names(embedded, tmp_path, changes, said):
    with pytest.raises(ValueError, match=said) as told:
        load_policy(str(_model(embedded, tmp_path, **changes)))
    assert len(str(told.value)) < 400
    assert "\n" not in str(told.value)


def test_code_beside_a_known_model_is_left_alone(embedded, tmp_path, monkeypatch):
    monkeypatch.setenv("CANARY", str(tmp_path / "imported"))
    names = {"AutoConfig": "canary.C", "AutoModelForCausalLM": "canary.M", "AutoTokenizer": ["canary.T", "canary.T"]}
    folder = _model(embedded, tmp_path, auto_map=names)
    shutil.copy(Path(__file__).parents[1] / "canary.py", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"auto_map": names}), encoding="utf-8")
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__ }}"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    _, tokenizer = load_policy(str(folder))
    with pytest.raises(Exception, match=r"unsafe|undefined"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert not (tmp_path / "imported").exists()


def test_pickles_and_adapters_are_refused(embedded, tmp_path):
    folder = _model(embedded, tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"weights as a pickle \(pytorch_model.bin\)"):
        check_folder(folder)
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/model"}', encoding="utf-8")
    with pytest.raises(ValueError, match="holds an adapter, which names another model"):
        load_policy(str(folder))


def test_the_trainer_is_missed_in_one_line():
    """Without the extras the class says what to install, in a script as on the command line."""
    code = "import sys; sys.modules['trl'] = None\nfrom entropy_polarity.trainers.trl import PolarityTrainer"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: PolarityTrainer needs TRL")
    assert "pip install 'entropy-polarity[trl]'" in last
    assert "During handling" not in done.stderr
