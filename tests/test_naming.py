"""One name, one algorithm: what a method is told where nothing, one thing, or everything is said beside its name."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from entropy_polarity import cli
from entropy_polarity.controllers import CONTROLLERS
from entropy_polarity.experiments.compare.ablation import ablation_plan
from entropy_polarity.experiments.compare.plan import load_plan
from entropy_polarity.experiments.compare.search import search_plan
from entropy_polarity.experiments.flags import audit_recipe
from entropy_polarity.methods import METHODS, given_beside, make_transform, name_of
from entropy_polarity.runs.recipe import load_recipe
from entropy_polarity.trainers.trl import PolarityConfig

ROOT = Path(__file__).parents[1]
RESULTS, PLANS = ROOT / "benchmarks/results", ROOT / "benchmarks/comparisons"
DEMO = {"name": "papo", "controller": "reference", "path": "linear", "level": 0.35, "horizon": 50}
DEFAULT = {"controller": "reference", "path": "linear", "fraction": 0.6, "horizon": 50, "gain": 5.0, "lambda_max": 0.8}
CONTROLLER_LINE = (
    "method.controller=thermostat: the recipe's path='linear', level=0.35, horizon=50 belonged to controller "
    "'reference' and are dropped"
)


def driven(settings: dict) -> list[float]:
    """λ of every rollout while the entropy falls, as a method with these settings has it."""
    from cases import rollout

    transform, lambdas = make_transform("papo", settings), []
    state = transform.init()
    for k in range(60):
        _, state, metrics = transform.update(rollout(k, entropy=1 - k / 100), state)
        lambdas.append(metrics["polarity/lambda"])
    return lambdas


def test_papo_without_settings_is_the_reference_on_a_line_to_six_tenths():
    untold = driven({})
    assert untold == driven(DEFAULT)
    assert len(set(untold)) > 20
    assert untold != driven({"controller": "trend"})
    assert driven({"gain": 2.0}) == driven(DEFAULT | {"gain": 2.0})  # one setting changes that setting alone


def test_papo_is_one_algorithm_in_every_way_to_ask_for_it(tmp_path):
    from entropy_polarity.trainers.trl import PolarityConfig

    config = PolarityConfig(str(tmp_path), method="papo", use_cpu=True, bf16=False, report_to="none")
    assert config.settings == {}
    assert load_recipe("countdown").method == DEMO  # what `papo train` does
    assert driven({k: v for k, v in DEMO.items() if k != "name"}) == driven(DEFAULT | {"fraction": None, "level": 0.35})
    for told in (
        load_recipe("countdown", ["method.gain=5"], "papo").method,
        load_plan("countdown", ["papo", "g=papo:gain=5"]).methods["g"],
        ablation_plan("countdown", [0], ["method.gain=5"]).methods["papo"],
        audit_recipe("countdown", None, None, "papo", 4, None, ["method.gain=5"]).method,
    ):
        assert told == DEMO | {"gain": 5}
    untold = tmp_path / "untold.toml"
    untold.write_text("[trainer]\nmax_steps = 2\n", encoding="utf-8")
    assert load_recipe(str(untold), ["method.gain=5"]).method == {"name": "papo", "gain": 5}


@pytest.mark.parametrize(
    ("given", "expected", "lines"),
    [
        ({}, DEMO, []),
        ({"name": "papo"}, DEMO, []),
        ({"gain": 2}, DEMO | {"gain": 2}, []),
        ({"conserve": True}, DEMO | {"conserve": True}, []),
        ({"controller": "reference", "horizon": 7}, DEMO | {"horizon": 7}, []),
        ({"level": 0.2}, DEMO | {"level": 0.2}, []),
        ({"fraction": 0.5}, {k: v for k, v in DEMO.items() if k != "level"} | {"fraction": 0.5}, []),
        ({"controller": "thermostat"}, {"name": "papo", "controller": "thermostat"}, [CONTROLLER_LINE]),
        (
            {"level": 0.4, "path": "cosine", "controller": "thermostat"},
            {"name": "papo", "controller": "thermostat", "level": 0.4, "path": "cosine"},
            [CONTROLLER_LINE.replace("path='linear', level=0.35, horizon=50", "horizon=50").replace("are", "is")],
        ),
        ({"name": "grpo"}, {"name": "grpo"}, []),
        ({"name": "dapo", "clip_high": 0.3}, {"name": "dapo", "clip_high": 0.3}, []),
    ],
)
def test_what_is_given_beside_a_name_changes_that_alone(given, expected, lines):
    said = []
    assert given_beside(DEMO, given, said.append) == expected
    assert said == lines
    # the same, in whatever order, as flags
    said.clear()
    flags = [f"method.{key}={json.dumps(value)}" for key, value in given.items()]
    assert load_recipe("countdown", flags, say=said.append).method == expected
    assert said == lines
    said.clear()
    settings = ",".join(f"{key}={json.dumps(value)}" for key, value in given.items() if key != "name")
    label = f"x={given.get('name', 'papo')}" + (f":{settings}" if settings else "")
    assert load_plan("countdown", [label], say=said.append).methods["x"] == expected
    assert said == [line.replace("method.", "methods.x.") for line in lines]


def test_what_is_given_beside_a_chain_changes_the_method_that_takes_it():
    told = {"name": "dapo+papo", "clip_high": 0.3, "papo": {"controller": "trend", "gain": 1.0}}
    said = []
    assert given_beside(told, {"controller": "balance"}, said.append) == {
        "name": "dapo+papo",
        "dapo": {"clip_high": 0.3},
        "papo": {"controller": "balance"},
    }
    assert len(said) == 1
    assert "gain=1.0 belonged to controller 'trend' and is dropped" in said[0]
    level = {"name": "dapo+papo", "level": 0.3}
    assert given_beside(level, {"papo": {"fraction": 0.5}}, print)["papo"] == {"fraction": 0.5}
    assert given_beside(level, {"name": ["dapo", "papo"], "gain": 2.0}, print)["papo"] == {"level": 0.3, "gain": 2.0}
    assert given_beside(level, {"name": "papo"}, print) == {"name": "papo"}


def test_the_sign_of_an_ablation_takes_the_interval_of_the_exact_one_away():
    exact = DEMO | {"sign_from": "exact", "every": 4}
    assert given_beside(exact, {"sign_from": "shuffled"}, print) == DEMO | {"sign_from": "shuffled"}
    assert given_beside(exact, {"every": 2}, print) == exact | {"every": 2}


def test_a_whole_table_is_all_that_a_method_is_told(tmp_path):
    table = 'method={name="papo", controller="thermostat", level=0.4}'
    said = []
    whole = load_recipe("countdown", ["method.gain=2", table], say=said.append).method
    assert whole == {"name": "papo", "controller": "thermostat", "level": 0.4}
    assert load_recipe("countdown", [table, "method.gain=2"], say=said.append).method == whole | {"gain": 2}
    (tmp_path / "plan.toml").write_text(
        '[methods]\npapo = { name = "papo", gain = 2.0 }\nsame = { name = "papo" }\n', encoding="utf-8"
    )
    planned = load_plan(str(tmp_path / "plan.toml")).methods
    assert planned == {"papo": {"name": "papo", "gain": 2.0}, "same": DEMO}
    assert said == []


def test_the_line_about_what_is_dropped_goes_to_standard_error(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["papo", "train", "--set", "method.controller=thermostat", "--max-steps", "0"])
    with pytest.raises(SystemExit):
        cli.main()
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines()[0] == f"papo: {CONTROLLER_LINE}"


# What was run stays what it was


def recorded(document) -> list[dict]:
    """Every method table in a result file."""
    if isinstance(document, list):
        return [table for part in document for table in recorded(part)]
    if not isinstance(document, dict):
        return []
    own = [document] if document.get("name") in METHODS and "seed" not in document else []
    return own + [table for part in document.values() for table in recorded(part)]


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_no_recorded_method_leans_on_a_default_that_has_changed(file):
    """A table says its controller, and one of `reference` its end, path and horizon: no default moves what it was."""
    for table in recorded(json.loads(file.read_text(encoding="utf-8"))):
        if table["name"] == "papo":
            assert table.get("controller") in CONTROLLERS, table
            if table["controller"] == "reference":
                assert {"path", "horizon"} <= table.keys(), table
                assert table.keys() & {"level", "fraction"}, table


COMMITTED = {
    "ablation": ["ablation"],
    "exact_sign": ["exact-sign"],
    "final": ["comparison-3", "comparison-4"],
    "guess-collapse-level": ["guess-collapse-level"],
    "guess-collapse": ["guess-collapse"],
    "guess": ["guess"],
    "gym": ["gym"],
    "keydoor": ["keydoor"],
    "papo": ["papo"],
    "screen": ["screen"],
    "search": ["search"],
}


def test_every_plan_has_its_results():
    assert {path.stem for path in PLANS.glob("*.toml")} == COMMITTED.keys()


def named(one: dict) -> str:
    """Today's name of what was run."""
    return name_of(one["method"]["name"], one["date"])


def label_of(one: dict) -> str:
    return (
        one["label"].replace(one["method"]["name"], named(one)) if named(one) != one["method"]["name"] else one["label"]
    )


@pytest.mark.parametrize(("plan", "result"), [(plan, name) for plan, names in COMMITTED.items() for name in names])
def test_a_committed_plan_is_what_was_run(plan, result, monkeypatch):
    monkeypatch.chdir(ROOT)  # plans name recipes from there
    document = json.loads((RESULTS / f"{result}.json").read_text(encoding="utf-8"))
    file = str(PLANS / f"{plan}.toml")
    if "methods" in tomllib.loads(Path(file).read_text(encoding="utf-8")):
        planned = load_plan(file, overrides=["task.numbers=[3]"] if result == "comparison-3" else [])
    else:
        planned = ablation_plan(file, [0, 1, 2, 3])
    if planned.search.values:
        planned = search_plan(planned)
    run = {(label_of(one), one["seed"]): one["method"] | {"name": named(one)} for one in document["runs"]}
    assert run == {(label, seed): planned.methods[label] for label, seed in planned.pairs()}


# Names are answered without torch


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--method", "pap"], "unknown method 'pap': did you mean 'papo'"),
        (["train", "--set", "method.name=pap"], "unknown method 'pap'"),
        (["train", "--set", "method.gian=2"], "did you mean 'gain'"),
        (["train", "--set", "method.level=0"], "level is 0; expected an entropy above 0"),
        (["train", "--task", "countdwn"], "did you mean 'countdown'"),
        (["train", "--model", "./nowhere"], "no model at ./nowhere"),
        (["audit", "--method", "pap"], "unknown method 'pap'"),
        (["ablate", "--set", "method.gian=2"], "did you mean 'gain'"),
        (["compare", "--methods", "grpo", "pap"], "[methods.pap] unknown method 'pap'"),
        (["--version"], "entropy-polarity "),
    ],
)
def test_a_name_is_answered_before_anything_heavy_is_loaded(arguments, said):
    code = (
        "import sys\n"
        "class Heavy:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'trl', 'transformers', 'datasets'):\n"
        "            raise SystemError(f'{name} was loaded')\n"
        "sys.meta_path.insert(0, Heavy())\n"
        f"sys.argv = ['papo', *{arguments!r}]\n"
        "from entropy_polarity.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert said in done.stdout + done.stderr
    assert "was loaded" not in done.stderr
    assert done.returncode == (0 if arguments == ["--version"] else 2)


def test_a_comparison_and_a_trainer_take_a_chain():
    plan = load_plan("countdown", ["both=dapo+papo:level=0.3", "grpo"])
    assert plan.methods["both"] == {"name": "dapo+papo", "level": 0.3}
    settings = {"use_cpu": True, "bf16": False, "report_to": "none"}
    config = PolarityConfig("out", method=["dapo", "papo"], method_settings={"level": 0.3}, **settings)
    assert (config.method, config.epsilon_high, config.loss_type) == ("dapo+papo", 0.28, "dapo")
