"""A comparison: the plan says what is meant, a stop anywhere loses nothing, and the numbers are those of the runs.

Most runs here are scripted (scripted_train.py); a few are trained.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import scripted_train
from small import SMALL

from entropy_polarity import cli
from entropy_polarity.experiments.compare import runs as runs_module
from entropy_polarity.experiments.compare.ablation import ARMS, ablation_plan
from entropy_polarity.experiments.compare.experiment import compare, default_jobs, read_comparison, search, write_page
from entropy_polarity.experiments.compare.plan import Plan, Search, load_plan, methods_of
from entropy_polarity.experiments.compare.runs import Job, Queue, locked, refuse_others
from entropy_polarity.experiments.compare.search import candidates_of, choose, judge, search_plan, unseen_problems
from entropy_polarity.experiments.compare.summary import RunResults, summarise
from entropy_polarity.experiments.setup import check_recipe, prompts_of
from entropy_polarity.methods import make_transform
from entropy_polarity.report.comparison import render_comparison
from entropy_polarity.report.progress import ComparisonView, RunState
from entropy_polarity.report.tables.comparison import comparison_tables
from entropy_polarity.runs.recipe import load_recipe
from entropy_polarity.runs.record import Run

PAPO = [sys.executable, "-m", "entropy_polarity.cli"]
TINY = (*SMALL, "trainer.max_steps=2", "evaluation.samples=16")
PLAN = """
recipe = "countdown"
set = ["task.numbers=[4]"]
seeds = [0, 1, 2]
baselines = ["grpo"]
[methods.grpo]
name = "grpo"
[methods.held]
name = "papo"
controller = "reference"
level = 0.4
[search]
seeds = [100, 101]
set = ["evaluation.seed=1000"]
[search.values]
held = {key = "level", values = [0.3, 0.4]}
grpo = {}
"""


@pytest.fixture
def scripted(monkeypatch):
    """Runs are scripted; call it with what they do."""
    monkeypatch.setattr(runs_module, "TRAIN", [sys.executable, scripted_train.__file__])
    monkeypatch.setattr(runs_module, "_LOOK", 0.05)
    return lambda **acts: monkeypatch.setenv("SCRIPT", json.dumps(acts))


def plan_of(*methods: str, seeds=(0, 1), overrides=TINY, **more) -> Plan:
    return load_plan("countdown", methods or ("grpo", "papo:controller=trend"), seeds, overrides=overrides, **more)


def starts(directory: Path) -> dict[str, int]:
    """How often each run was started."""
    return {log.stem: log.read_text(encoding="utf-8").count("started") for log in (directory / "logs").iterdir()}


def undated(run: dict, *without: str) -> dict:
    return {key: value for key, value in run.items() if key not in ("date", *without)}


def jobs_of(plan: Plan, root: Path) -> list[Job]:
    for folder in ("recipes", "runs", "logs"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    return [Job(label, seed, plan.recipe_of(label, seed), root) for seed in plan.seeds for label in plan.methods]


# The plan


@pytest.mark.parametrize(
    ("specification", "tables"),
    [
        ("grpo", {"grpo": {"name": "grpo"}}),
        ("held=papo", {"held": {"name": "papo"}}),
        ("papo:controller=reference,level=0.4", {"papo": {"name": "papo", "controller": "reference", "level": 0.4}}),
        ("a=papo:betas=[1, 2],on=true", {"a": {"name": "papo", "betas": [1, 2], "on": True}}),
        ('papo:text="1,2"', {"papo": {"name": "papo", "text": "1,2"}}),
    ],
)
def test_a_method_is_written_as_a_word(specification, tables):
    assert methods_of([specification]) == tables


def test_a_plan_of_flags_is_the_plan_of_a_file(tmp_path):
    (tmp_path / "plan.toml").write_text(PLAN, encoding="utf-8")
    planned = load_plan(str(tmp_path / "plan.toml"))
    flags = load_plan("countdown", ("grpo", "held=papo:level=0.4"), overrides=["task.numbers=[4]"])
    # What a flag says stands beside the recipe's method; the table of a file is all that its method is told.
    assert flags.methods["held"] == load_recipe("countdown").method | planned.methods["held"]
    assert replace(planned, search=Search()) == replace(flags, methods=planned.methods)
    shorter = load_plan(str(tmp_path / "plan.toml"), seeds=[7], baselines=["held"], overrides=["trainer.max_steps=5"])
    assert (shorter.seeds, shorter.baselines) == ([7], ["held"])
    recipe = shorter.recipe_of("held", 7)
    assert (recipe.seed, recipe.method, recipe.trainer["max_steps"]) == (7, planned.methods["held"], 5)


def test_baselines_are_grpo_and_dapo_where_they_are_else_the_first():
    assert load_plan("countdown", ["papo", "dapo=grpo", "grpo"]).baselines == ["grpo", "dapo"]
    assert load_plan("countdown", ["papo", "other=papo:gain=2"]).baselines == ["papo"]


def test_a_method_that_is_only_named_has_the_settings_of_a_recipe_about_it():
    plan = load_plan("countdown", ["papo", "grpo"])
    assert plan.methods["papo"]["level"] == 0.35  # as `papo train --method papo`
    assert plan.methods["grpo"] == {"name": "grpo"}


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("baselines =", "baseline =", "unknown plan key 'baseline': did you mean 'baselines'"),
        ('"grpo"]', '"grop"]', "unknown baseline 'grop': did you mean 'grpo'"),
        ("[0, 1, 2]", "[0, 1, 1]", "'seeds' is .* expected different whole numbers"),
        ("[0, 1, 2]", "[]", "at least one"),
        ("[0, 1, 2]", "3", "'seeds' is 3; expected a value of type list"),
        ('["task.numbers=[4]"]', "[4]", "'set' has 4; expected texts"),
        ("task.numbers", "task_numbers", "unknown recipe key 'task_numbers'"),
        ("task.numbers=[4]", "seed=4", "would not last: the plan has seeds"),
        ("task.numbers=[4]", "method.level=4", "would not last: the plan has methods"),
        ("[methods.held]\nname", "[methods.held]\nnme", "'methods.held' is .*; expected a table with a name"),
        ("[methods.held]", '[methods."a/b"]', "label 'a/b' names files"),
        ('"countdown"', '"countdwn"', "unknown recipe 'countdwn'"),
        ("[search]", "[serch]", "unknown plan key 'serch': did you mean 'search'"),
        ("held = {key", "hold = {key", "'search.values.hold': did you mean 'search.values.held'"),
        ("{key =", "{kee =", "did you mean 'search.values.held.key'"),
        ('{key = "level", ', "{", "needs both key and values"),
        ("grpo = {}", 'grpo = {key = "x", values = [1, 2, 3]}', r"the same budget.* \(held: 2, grpo: 3\)"),
        ("[search]", "[seeds_of]\nhold = [0]\n[search]", "'seeds_of.hold': did you mean 'seeds_of.held'"),
        ("[search]", "[seeds_of]\nheld = 1\n[search]", "'seeds_of.held' is 1; expected different whole numbers"),
        ("[search]", "[seeds_of]\nheld = [1, 3]\n[search]", r"'seeds_of.held' has seeds \[3\], which are not in seeds"),
        ("[search]", '[notes]\nhold = "x"\n[search]', "'notes.hold': did you mean 'notes.held'"),
        ("[search]", "[notes]\nheld = 1\n[search]", "'notes.held' is 1; expected a text"),
        ("[100, 101]", "[2, 101]", r"seeds \[2\] are in both"),
        ("seed=1000", "seed=0", "both have evaluation.seed=0"),
        ("recipe = ", "recipe = =", "is not valid TOML"),
    ],
)
def test_a_slip_in_a_plan_is_named(tmp_path, old, new, told):
    assert old in PLAN
    (tmp_path / "plan.toml").write_text(PLAN.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ValueError, match=told):
        load_plan(str(tmp_path / "plan.toml"))


def test_flags_that_make_no_plan_are_named(tmp_path):
    with pytest.raises(ValueError, match="nothing to compare: give --methods"):
        load_plan("countdown")
    with pytest.raises(ValueError, match=r"two methods are called 'papo'.*other=papo:level=0.3"):
        load_plan("countdown", ["papo:level=0.4", "papo:level=0.3"])
    (tmp_path / "plan.toml").write_text(PLAN, encoding="utf-8")
    with pytest.raises(ValueError, match="--methods cannot be given with a plan"):
        load_plan(str(tmp_path / "plan.toml"), ["grpo"])


@pytest.mark.parametrize(
    ("methods", "override", "told"),
    [
        (("papo:gian=2",), "trainer.beta=0.0", r"\[methods.papo\] .*did you mean 'gain'"),
        (("grpo", "pappo"), "trainer.beta=0.0", r"\[methods.pappo\] unknown method 'pappo': did you mean 'papo'"),
        (("grpo",), "trainer.lerning_rate=1", "did you mean 'trainer.learning_rate'"),
        (("grpo",), "task.numbers=[9]", "countdown: numbers"),
        (("grpo",), "evaluation.problems=5000", "different test problems"),
        (("grpo",), "policy.model=./nowhere", "no model at ./nowhere"),
    ],
)
def test_what_a_run_would_refuse_is_refused_before_anything_is_made(tmp_path, methods, override, told, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        compare(plan_of(*methods, overrides=[*TINY, override]), Path("here"))
    assert not list(tmp_path.iterdir())


# The runs


def test_finished_runs_are_kept_and_new_ones_added(scripted, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    document = compare(plan_of(), tmp_path / "c", at_once=2)
    assert [(run["seed"], run["label"]) for run in document["runs"]] == [
        (0, "grpo"), (0, "papo"), (1, "grpo"), (1, "papo"),
    ]  # fmt: skip
    assert document["failed"] == {}
    more = compare(plan_of(seeds=(0, 1, 2)), tmp_path / "c", at_once=2)
    assert more["runs"][:4] == document["runs"]
    assert more["summary"]["against"]["grpo"]["papo"]["seeds"] == [0, 1, 2]
    assert set(starts(tmp_path / "c").values()) == {1}
    assert "started 1\n" in (tmp_path / "c/logs/grpo-0.log").read_text(encoding="utf-8")  # one thread
    assert json.loads((tmp_path / "c/comparison.json").read_text(encoding="utf-8")) == more
    assert "command" not in more["environment"]
    assert str(tmp_path) not in json.dumps(more)


def test_a_failed_run_stops_no_other_and_is_tried_again(scripted, tmp_path):
    scripted(**{"papo-0": "fail"})
    document = compare(plan_of(), tmp_path / "c", at_once=1)
    assert document["failed"] == {"papo-0": "the disk is on fire"}
    assert len(document["runs"]) == 3
    assert document["summary"]["methods"]["grpo"]["seeds"] == [0, 1]
    assert document["summary"]["against"]["grpo"]["papo"]["seeds"] == [1]  # complete pairs only
    assert "the disk is on fire" in (tmp_path / "c/comparison.html").read_text(encoding="utf-8")
    scripted()
    assert compare(plan_of(), tmp_path / "c", at_once=1)["failed"] == {}
    assert starts(tmp_path / "c") == {"grpo-0": 1, "papo-0": 2, "grpo-1": 1, "papo-1": 1}


def test_nothing_finished_is_one_line(scripted, tmp_path):
    scripted(**{"grpo-0": "fail", "papo-0": "fail"})
    with pytest.raises(ValueError, match="no run finished; grpo-0: the disk is on fire; papo-0: the disk"):
        compare(plan_of(seeds=[0]), tmp_path / "c")


def test_the_command_says_what_failed_and_prints_a_result_file_again(scripted, tmp_path, monkeypatch, capfd):
    def papo(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["papo", "compare", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capfd.readouterr()

    scripted(**{"papo-1": "fail"})
    flags = ["--methods", "grpo", "papo:controller=trend", "--seeds", "0", "1", *(f"--set={o}" for o in TINY)]
    code, out, _ = papo(*flags, "--output", str(tmp_path / "c"))
    assert code == 1
    assert "papo, seed 1: failed: the disk is on fire" in out
    tables = out[out.index("Methods") : out.index("failed: papo-1: the disk is on fire")]
    code, again, _ = papo("--from", str(tmp_path / "c/comparison.json"), "--output", str(tmp_path / "page"))
    assert code == 0
    assert again.startswith(tables)
    assert (tmp_path / "page/comparison.html").read_text(encoding="utf-8") == (
        tmp_path / "c/comparison.html"
    ).read_text(encoding="utf-8")
    code, out, err = papo("--methods", "grpo", "pappo", "--output", str(tmp_path / "other"))
    assert (code, out) == (2, "")
    assert err.startswith("papo: [methods.pappo] unknown method 'pappo': did you mean 'papo'?")
    assert not (tmp_path / "other").exists()


def test_a_run_killed_while_it_was_made_is_made_again(scripted, tmp_path):
    unborn = tmp_path / "c/runs/grpo-0"
    (unborn / "checkpoints").mkdir(parents=True)
    (tmp_path / "c/lock").touch()
    (unborn / "environment.json").write_text("{}", encoding="utf-8")
    (unborn / "summary.json.0123456789abcdef.part").write_text('{"stat', encoding="utf-8")
    compare(plan_of("grpo", seeds=[0]), tmp_path / "c")
    (unborn / "config.toml").unlink()
    (unborn / "thesis.txt").write_text("all of it", encoding="utf-8")
    with pytest.raises(ValueError, match=r"grpo-0 is no run, but holds (thesis.txt|metrics.jsonl)"):
        compare(plan_of("grpo", seeds=[0]), tmp_path / "c")
    assert (unborn / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("methods", "overrides", "told"),
    [
        (("grpo",), (*TINY, "trainer.max_steps=3"), r"made with trainer.max_steps=2, the plan says 3"),
        (("grpo=papo:controller=trend",), TINY, r"method.controller=None, the plan says 'trend'"),
        (("grpo",), (*TINY, "evaluation.seed=5"), r"evaluation.seed=0, the plan says 5"),
    ],
)
def test_runs_of_another_plan_are_refused(scripted, tmp_path, methods, overrides, told):
    for job in jobs_of(plan_of("grpo", seeds=[0]), tmp_path):
        subprocess.run([*job.prepare()], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        refuse_others([job])
    with pytest.raises(ValueError, match=told):
        refuse_others(jobs_of(plan_of(*methods, seeds=[0], overrides=overrides), tmp_path))


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it", encoding="utf-8")
    with pytest.raises(FileExistsError, match="neither an empty folder nor a comparison"), locked(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


DRIVER = """
import sys
from pathlib import Path
from entropy_polarity.experiments.compare import runs
from entropy_polarity.experiments.compare.plan import load_plan
script, output, methods, overrides = sys.argv[1], Path(sys.argv[2]), sys.argv[3].split(), sys.argv[4].split()
runs.TRAIN = [sys.executable, script]
plan = load_plan("countdown", methods, [0, 1], overrides=overrides)
with runs.locked(output) as lock:
    for folder in ("recipes", "runs", "logs"):
        (output / folder).mkdir(exist_ok=True)
    jobs = [runs.Job(label, seed, plan.recipe_of(label, seed), output) for seed in plan.seeds for label in plan.methods]
    runs.Queue(jobs, 2, lock, lambda states: None).run()
"""


def start_driver(root: Path, **acts: str) -> subprocess.Popen:
    """A comparing process of its own, once its first two runs write metrics."""
    command = [scripted_train.__file__, str(root), "grpo papo:controller=trend", " ".join(TINY)]
    environment = os.environ | {"SCRIPT": json.dumps(acts)}
    process = subprocess.Popen([sys.executable, "-c", DRIVER, *command], env=environment, stderr=subprocess.PIPE)
    for name in ("grpo-0", "papo-0"):
        until = time.monotonic() + 60
        while not (root / "runs" / name / "metrics.jsonl").exists():
            assert process.poll() is None, process.stderr and process.stderr.read().decode()
            assert time.monotonic() < until
            time.sleep(0.05)
    return process


def test_two_comparisons_cannot_work_in_one_place_and_a_killed_one_takes_its_runs_along(
    scripted, tmp_path, monkeypatch
):
    """SIGKILL of the comparing process: its runs die with it, the lock is free, and the same plan goes on."""
    process = start_driver(tmp_path / "c", **{"grpo-0": "stall", "papo-0": "stall"})
    monkeypatch.setattr(runs_module, "_LET_GO", 0.0)
    with pytest.raises(BlockingIOError, match="another comparison is at work"), locked(tmp_path / "c"):
        pass
    process.kill()
    process.wait()
    monkeypatch.setattr(runs_module, "_LET_GO", 5.0)  # the runs hold the lock too: it is free when they are gone
    document = compare(plan_of(), tmp_path / "c", at_once=2)
    whole = compare(plan_of(), tmp_path / "whole", at_once=2)
    assert document["summary"] == whole["summary"]
    assert [undated(run) for run in document["runs"]] == [undated(run) for run in whole["runs"]]
    assert starts(tmp_path / "c") == {"grpo-0": 2, "papo-0": 2, "grpo-1": 1, "papo-1": 1}


def test_ctrl_c_stops_the_runs_once_and_starts_no_other(scripted, tmp_path):
    process = start_driver(tmp_path / "c", **{"grpo-0": "slow", "papo-0": "stall"})
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert errors.decode().rstrip().endswith("KeyboardInterrupt")
    assert set(starts(tmp_path / "c")) == {"grpo-0", "papo-0"}
    assert not any(job.finished for job in jobs_of(plan_of(), tmp_path / "c"))


def test_what_is_finished_is_summarised_after_a_stop_and_while_others_run(scripted, tmp_path, monkeypatch):
    work = Queue.run

    def stopped(self):
        self.jobs = self.jobs[:1]
        self.states = {job.name: self.states[job.name] for job in self.jobs}
        work(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(Queue, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare(plan_of(), tmp_path / "c", at_once=1)
    written = json.loads((tmp_path / "c/comparison.json").read_text(encoding="utf-8"))
    assert [run["label"] for run in written["runs"]] == ["grpo"]
    with locked(tmp_path / "c"):  # as another process would
        looked = compare(plan_of(), tmp_path / "c", at_once=0)
    assert looked["runs"] == written["runs"]
    assert starts(tmp_path / "c") == {"grpo-0": 1}
    with pytest.raises(ValueError, match=r"jobs is 0, and .*new is not there: nothing to summarise"):
        compare(plan_of(), tmp_path / "new", at_once=0)
    compare(plan_of(), tmp_path / "c", at_once=0)  # a look leaves the folder as one that can be worked in


def test_a_method_can_have_fewer_seeds(scripted, tmp_path):
    (tmp_path / "plan.toml").write_text(
        PLAN.replace("[search]", "[seeds_of]\nheld = [1, 2]\n[search]", 1), encoding="utf-8"
    )
    plan = load_plan(str(tmp_path / "plan.toml"), overrides=[o for o in TINY if not o.startswith("task")])
    document = compare(plan, tmp_path / "out", at_once=2)
    assert [(run["label"], run["seed"]) for run in document["runs"]] == plan.pairs()
    assert plan.pairs() == [("grpo", 0), ("grpo", 1), ("held", 1), ("grpo", 2), ("held", 2)]
    assert document["summary"]["against"]["grpo"]["held"]["seeds"] == [1, 2]
    assert load_plan(str(tmp_path / "plan.toml"), seeds=[0]).pairs() == [("grpo", 0), ("held", 0)]  # as the flag says


def test_runs_of_another_machine_count_as_finished(scripted, tmp_path):
    first = compare(plan_of(seeds=(0,)), tmp_path / "a", at_once=2)
    whole = compare(plan_of(seeds=(0, 1)), tmp_path / "b", at_once=2, known=[tmp_path / "a/comparison.json"])
    assert whole["runs"][:2] == first["runs"]
    assert set(starts(tmp_path / "b")) == {"grpo-1", "papo-1"}
    other = plan_of("grpo", "papo:controller=balance", seeds=(0,))
    compare(other, tmp_path / "c", known=[tmp_path / "b/comparison.json"])
    assert set(starts(tmp_path / "c")) == {"papo-0"}  # the same label with other settings is another run
    renamed = plan_of("papo", "plain=grpo", seeds=(0,))
    taken = compare(renamed, tmp_path / "e", known=[tmp_path / "b/comparison.json"])
    assert set(starts(tmp_path / "e")) == {"papo-0"}  # and the same settings under another label are the same run
    assert [run["label"] for run in taken["runs"]] == ["papo", "plain"]
    with pytest.raises(ValueError, match=r"comparison.json is of another recipe than the plan"):
        compare(
            plan_of(overrides=["trainer.learning_rate=1e-3"]), tmp_path / "d", known=[tmp_path / "a/comparison.json"]
        )


def test_runs_of_a_rule_that_was_renamed_are_not_those_of_the_rule_that_has_its_name_now(scripted, tmp_path):
    compare(plan_of("grpo", "opefo", seeds=(0,)), tmp_path / "a", at_once=2)
    file = tmp_path / "a/comparison.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    for run in document["runs"]:
        run["date"] = "2026-11-23T20:19:45+00:00"
    file.write_text(json.dumps(document), encoding="utf-8")
    taken = compare(plan_of("grpo", "opefo", "opefo_polarity", seeds=(0,)), tmp_path / "b", at_once=2, known=[file])
    assert set(starts(tmp_path / "b")) == {"opefo-0"}
    assert [run["label"] for run in taken["runs"]] == ["grpo", "opefo", "opefo_polarity"]


def test_a_run_that_was_killed_says_by_what(scripted, tmp_path):
    scripted(**{"grpo-0": "kill"})
    assert compare(plan_of(seeds=[0]), tmp_path / "c")["failed"] == {"grpo-0": "killed by SIGKILL"}


def test_progress_is_a_line_for_each_change_where_there_is_no_terminal(capsys):
    with ComparisonView("here") as view:
        for kind, step, note in (("waiting", 0, ""), ("running", 1, ""), ("running", 2, ""), ("failed", 2, "[b]why")):
            view.watch([RunState("grpo", 0, kind, step, 4, note), RunState("papo", 0, "waiting", 0, 4)])
    assert capsys.readouterr().out.splitlines() == ["[0/2] grpo, seed 0: running", "[1/2] grpo, seed 0: failed: [b]why"]


# The summary


def results_of(
    label: str, seed: int, successes: list[int], reward: list[float], greedy: list[int], seconds=1.0
) -> RunResults:
    steps = list(range(1, 2 * len(reward), 2))  # two updates a rollout
    start = {"successes": [0] * len(successes), "greedy": [0] * len(greedy)}
    curve = {"steps": steps, "values": reward}
    after = {"successes": successes, "greedy": greedy}
    return RunResults(
        label, seed, {"name": "papo"}, "today", None, 8, start, after, curve, curve, [seconds] * 2 * len(reward)
    )


def test_a_summary_pairs_seeds_and_problems():
    rising = [0.1 * i for i in range(20)]
    runs = [
        results_of("grpo", 0, [2, 4] * 5, rising, [0, 1] * 5),
        results_of("grpo", 1, [2, 4] * 5, rising, [0, 1] * 5),
        results_of("papo", 0, [4, 6] * 5, [r + 0.5 for r in rising], [1, 1] * 5, seconds=2.0),
        results_of("papo", 1, [3, 5] * 5, [r - 0.5 for r in rising], [0, 1] * 5, seconds=2.0),
        results_of("papo", 7, [8, 8] * 5, rising, [1, 1] * 5),  # grpo has no seed 7
    ]
    found = summarise(runs, ["grpo", "absent"])
    assert found["methods"]["grpo"]["after"]["pass@1"] == {"mean": 3 / 8, "sd": 0.0}
    assert found["methods"]["papo"]["seeds"] == [0, 1, 7]
    assert found["methods"]["papo"]["pass_at"]["before"] == {"1": 0.0, "2": 0.0, "4": 0.0, "8": 0.0}
    assert found["methods"]["grpo"]["reward_area"]["mean"] == pytest.approx(0.95)
    assert found["methods"]["grpo"]["entropy_end"]["mean"] == pytest.approx(1.45)  # of the last ten
    assert list(found["against"]) == ["grpo"]
    (papo,) = found["against"]["grpo"].values()
    assert papo["seeds"] == [0, 1]
    # By seed 2/8 and 1/8: mean 3/16, sd √2/16, half of the t interval 12.706 · √2/16 / √2 = 0.7941
    assert papo["pass@1"]["difference"] == 3 / 16
    assert papo["pass@1"]["t"] == pytest.approx([3 / 16 - 0.79413, 3 / 16 + 0.79413], abs=1e-4)
    assert papo["pass@1"]["bootstrap"] == [1 / 8, 2 / 8]  # all problems alike: the spread is that of the seeds
    assert papo["greedy"]["difference"] == 0.25
    # grpo's best average is 1.45, of rollouts 11-20 (step 39); papo is there 5 rollouts sooner (step 29). With seed 1
    # papo's best is 0.95 (step 39), where grpo was at step 29. A step of papo takes two seconds.
    assert papo["reach"] == {
        "pairs": 2, "reached": 1, "steps": 34.0, "seconds": 68.0, "steps_ratio": 1.0, "seconds_ratio": 2.0,
    }  # fmt: skip


def test_a_single_pair_has_no_t_interval_and_no_pair_no_numbers():
    runs = [results_of("grpo", 0, [2, 4], [0.1], [0, 1]), results_of("papo", 0, [4, 6], [0.3], [1, 1])]
    found = summarise([*runs, results_of("late", 1, [1, 1], [0.1], [0, 0])], ["grpo"])
    assert found["against"]["grpo"]["papo"]["pass@1"]["t"] is None
    assert found["methods"]["grpo"]["reward_area"] == {"mean": 0.1, "sd": None}
    assert found["against"]["grpo"]["late"] == {"seeds": []}
    rows = {row[0]: row for row in comparison_tables(found)[1].rows}
    assert rows["papo"][2] == "+0.250\n[-]\nt [-]"
    # Of problems enough, all of one difference: q = 1 - 0.025^(1/10) = 0.3085 of them could lie anywhere in [-1, 1].
    alike = [results_of("grpo", 0, [2] * 10, [0.1], [0] * 10), results_of("papo", 0, [4] * 10, [0.3], [0] * 10)]
    assert comparison_tables(summarise(alike, ["grpo"]))[1].rows[0][2] == "+0.250\n[-0.136, +0.481]\nt [-]"
    assert rows["late"][1:3] == ["0", ""]
    json.dumps(found, allow_nan=False)


def test_what_environments_count_is_compared_too():
    def counting(label, seed, turns):
        counted = {"before": {"turns": 6.0}, "after": {"turns": turns}}
        return replace(results_of(label, seed, [2, 4], [0.1], [0, 1]), counted=counted)

    runs = [counting("grpo", 0, 4.0), counting("grpo", 1, 5.0), counting("papo", 0, 3.0), counting("papo", 1, 3.0)]
    found = summarise(runs, ["grpo"])
    assert found["methods"]["grpo"]["counted"]["after"]["turns"]["mean"] == 4.5
    # Differences -1 and -2: mean -1.5, half of the t interval 12.706 · √0.5 / √2 = 6.353
    difference = found["against"]["grpo"]["papo"]["counted"]["turns"]
    assert difference["difference"] == -1.5
    assert difference["t"] == pytest.approx([-7.853, 4.853], abs=1e-3)
    alone, against = comparison_tables(found)
    place = [column.name for column in alone.columns].index("turns")
    assert [row[place] for row in alone.rows] == ["6.000", "4.500 ± 0.707", "3.000 ± 0.000"]
    place = [column.name for column in against.columns].index("Δ turns")
    assert against.rows[0][place] == "-1.500\nt [-7.853, +4.853]"
    assert all(len(row) == len(table.columns) for table in (alone, against) for row in table.rows)
    mixed = summarise([*runs, results_of("old", 0, [2, 4], [0.1], [0, 1])], ["grpo"])
    assert mixed["against"]["grpo"]["old"]["counted"] == {}


def test_runs_that_were_evaluated_otherwise_cannot_be_paired():
    with pytest.raises(ValueError, match="evaluated on other numbers of problems"):
        summarise([results_of("a", 0, [1], [0.1], [0]), results_of("b", 0, [1, 2], [0.1], [0, 1])], ["a"])


def synthetic_document(labels: list[str], seeds=3, problems=100, rollouts=75) -> dict:
    rng = np.random.default_rng(0)
    hardness, runs = rng.beta(0.5, 1.2, problems), []
    for number, label in enumerate(labels):
        for seed in range(seeds):
            curve = 0.2 + 0.2 * (1 - np.exp(-np.arange(rollouts) / 20)) + rng.normal(0, 0.02, rollouts)
            right = rng.binomial(8, np.clip(hardness * (1 + 0.03 * number), 0, 1)).tolist()
            runs.append(results_of(label, seed, right, curve.round(4).tolist(), rng.integers(0, 2, problems).tolist()))
    plan = {
        "recipe": "countdown", "seeds": [*range(seeds)], "baselines": labels[:1],
        "methods": {label: {"name": "papo"} for label in labels},
        "resolved": {"trainer": {"max_steps": 2 * rollouts}, "evaluation": {"problems": problems, "samples": 8}},
    }  # fmt: skip
    machine = {"processor": "a processor", "cores": 2, "system": "Linux"}
    return {
        "comparison": 1, "plan": plan, "failed": {}, "summary": summarise(runs, labels[:1]),
        "environment": {"date": "today", "commit": None, "packages": {"torch": "2"}, "machine": machine},
        "runs": [asdict(run) for run in runs],
    }  # fmt: skip


def test_a_result_file_is_summarised_again_and_for_other_baselines(tmp_path):
    document = synthetic_document(["grpo", "papo"])
    (tmp_path / "c.json").write_text(json.dumps(document), encoding="utf-8")
    assert read_comparison(tmp_path / "c.json") == document
    other = read_comparison(tmp_path / "c.json", ["papo"])["summary"]["against"]
    difference = document["summary"]["against"]["grpo"]["papo"]["pass@1"]["difference"]
    assert other["papo"]["grpo"]["pass@1"]["difference"] == -difference
    with pytest.raises(ValueError, match="unknown baseline 'gpro': did you mean 'grpo'"):
        read_comparison(tmp_path / "c.json", ["gpro"])
    for text, what in (("{}", "is no comparison of this version"), ("[1", "is not JSON")):
        (tmp_path / "c.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=f"{what}: expected a file comparison.json that papo wrote"):
            read_comparison(tmp_path / "c.json")
    with pytest.raises(FileNotFoundError, match=r"cannot read .*none.json \(No such file or directory\): expected a"):
        read_comparison(tmp_path / "none.json")


# The search


def test_the_best_value_is_chosen_by_pass_at_1_then_by_pass_at_many():
    def row(label, value, one, many):
        return {"label": label, "value": value} | ({} if one is None else {"pass@1": one, "pass@many": many})

    rows = [
        row("a", 1, 0.2, 0.9), row("a", 2, 0.3, 0.5), row("a", 3, 0.3, 0.6), row("a", 4, 0.3, 0.6),
        row("b", 1, 0.9, 0.9), row("b", 2, None, None),
    ]  # fmt: skip
    assert choose(rows) == {"a": rows[2], "b": None}


def test_a_search_is_judged_on_problems_that_the_comparison_does_not_have(tmp_path):
    (tmp_path / "plan.toml").write_text(PLAN, encoding="utf-8")
    plan = load_plan(str(tmp_path / "plan.toml"), overrides=["evaluation.problems=300"])
    trial = search_plan(plan)
    assert (trial.seeds, trial.recipe_of("held@1", 100).evaluation.seed) == ([100, 101], 1000)
    assert [c.run_label for c in candidates_of(plan)] == ["held@1", "held@2", "grpo@1"]
    assert [trial.methods[f"held@{i}"]["level"] for i in (1, 2)] == [0.3, 0.4]
    assert trial.methods["grpo@1"] == plan.methods["grpo"]
    kept = unseen_problems(plan, trial)
    assert 150 < len(kept) < 300  # two streams of a small task share some
    runs = [results_of("held@1", seed, [8, 0, 4], [0.1], [1, 0, 0]) for seed in (100, 101)]
    rows = judge(
        candidates_of(plan), [*runs, results_of("held@2", 100, [8, 0, 4], [0.1], [1, 0, 0])], [100, 101], [1, 2]
    )
    assert rows[0] == {
        "label": "held", "key": "level", "value": 0.3, "run_label": "held@1", "seeds": [100, 101],
        "samples": 8, "pass@1": 0.25, "pass@many": 0.5, "entropy_end": 0.1,
    }  # fmt: skip
    assert "pass@1" not in rows[1]  # a seed is missing


def test_a_search_prints_what_to_paste_into_the_plan(scripted, tmp_path, capsys):
    from entropy_polarity.report.terminal import print_search

    (tmp_path / "plan.toml").write_text(PLAN, encoding="utf-8")
    plan = load_plan(str(tmp_path / "plan.toml"), overrides=[o for o in TINY if not o.startswith("task")])
    document = search(plan, tmp_path / "c", at_once=2)
    assert set(starts(tmp_path / "c/search")) == {
        f"{c}-{s}" for c in ("held@1", "held@2", "grpo@1") for s in (100, 101)
    }
    best = max((row for row in document["rows"] if row["label"] == "held"), key=lambda row: row["pass@1"])
    assert document["chosen"]["held"] == plan.methods["held"] | {"level": best["value"]}
    assert json.loads((tmp_path / "c/search.json").read_text(encoding="utf-8")) == document
    print_search(document)
    printed = capsys.readouterr().out
    assert f'[methods.held]\nname = "papo"\ncontroller = "reference"\nlevel = {best["value"]}\n' in printed
    with pytest.raises(ValueError, match=r"needs \[search.values\]"):
        search(plan_of(), tmp_path / "other")


def test_an_ablation_takes_papo_from_the_recipe_and_its_parts_from_the_table(scripted, tmp_path, monkeypatch, capfd):
    plan = ablation_plan("countdown", [0, 1], ["method.level=0.3", "trainer.max_steps=4"])
    own = load_recipe("countdown", ["method.level=0.3"]).method
    assert plan.methods["papo"] == own
    assert plan.methods["papo_shuffled"] == own | {"sign_from": "shuffled"}
    assert plan.methods["grpo"] == {"name": "grpo"}
    assert plan.set == ["trainer.max_steps=4"]
    assert plan.notes.keys() == plan.methods.keys() == ARMS.keys()
    whole = ablation_plan("countdown", [0], ['method={name="papo", controller="balance"}'])
    assert whole.methods["papo"] == {"name": "papo", "controller": "balance"}
    assert whole.set == []
    with pytest.raises(ValueError, match=r"method\.name is 'grpo': papo ablate takes PAPO apart"):
        ablation_plan("countdown", [0], ["method.name=grpo"])
    for table in plan.methods.values():
        make_transform(table["name"], {key: value for key, value in table.items() if key != "name"})
    with pytest.raises(ValueError, match="did you mean 'level'"):
        compare(ablation_plan("countdown", [0], ["method.levl=0.3"]), tmp_path / "never")
    with pytest.raises(ValueError, match=r"jobs is 0, and .*never is not there: nothing to summarise"):
        compare(plan, tmp_path / "never", at_once=0)
    assert not (tmp_path / "never").exists()

    scripted()
    output = ["--output", str(tmp_path / "a"), *(f"--set={o}" for o in TINY)]
    monkeypatch.setattr(sys, "argv", ["papo", "ablate", "--seeds", "0", *output])
    cli.main()
    assert "papo_shuffled" in capfd.readouterr().out
    page = (tmp_path / "a/comparison.html").read_text(encoding="utf-8")
    for _, note in ARMS.values():
        assert note in page


# The page


HOSTILE = "<script>document.documentElement.dataset.owned = 1</script>"


def test_labels_are_shown_not_run_and_nothing_is_fetched(tmp_path):
    document = synthetic_document(["grpo", HOSTILE])
    document["plan"]["notes"] = {HOSTILE: HOSTILE}
    page = render_comparison(document)
    assert "<script>document" not in page
    assert "&lt;script&gt;document" in page
    outside_plotly = re.sub(r"<script>/\*.*?</script>", "", page, count=1, flags=re.DOTALL)
    assert len(outside_plotly) < len(page) / 4
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", outside_plotly)


@pytest.mark.browser
def test_a_browser_draws_the_charts_of_twelve_methods(tmp_path, chromium):
    document = synthetic_document(["grpo", HOSTILE, *(f"method-{i}" for i in range(10))])
    page = write_page(document, tmp_path)
    dom = subprocess.run(
        [*chromium, "--dump-dom", page.as_uri()], capture_output=True, encoding="utf-8", timeout=120
    ).stdout
    assert len(re.findall(r'id="chart-\d"[^>]*js-plotly-plot', dom)) == 4
    assert dom.count('class="legendtext"') >= 3 * 12
    assert "data-owned" not in dom.partition("<head")[0]


def test_every_column_has_a_sentence():
    for table in comparison_tables(synthetic_document(["grpo", "papo"])["summary"]):
        assert all(len(row) == len(table.columns) for row in table.rows)
        for column in table.columns:
            assert column.text.endswith(".")


def test_a_hundred_runs_are_less_than_a_megabyte():
    document = synthetic_document([f"m{i}" for i in range(10)], seeds=10, problems=300)
    assert len(json.dumps(document["runs"], separators=(",", ":"))) < 1_000_000


# Trained


def test_methods_are_compared_on_the_same_prompts_and_problems(tmp_path, monkeypatch, capfd):
    """Two methods, four updates each, trained by the command itself."""
    flags = ["--methods", "grpo", "papo:controller=trend", "--seeds", "3", "--jobs", "2", "--max-steps", "4"]
    output = ["--output", str(tmp_path / "c"), *(f"--set={o}" for o in TINY), "--json"]
    monkeypatch.setattr(sys, "argv", ["papo", "compare", *flags, *output])
    cli.main()
    out, err = capfd.readouterr()
    assert json.loads(out)["summary"]["against"]["grpo"]["papo"]["seeds"] == [3]
    assert "[2/2] " in err
    grpo, papo = (Run.read(tmp_path / "c/runs" / name) for name in ("grpo-3", "papo-3"))
    assert grpo.config["method"] == {"name": "grpo"}
    assert papo.config["method"] == {"name": "papo", "controller": "trend"}
    assert [row["prompt"] for row in grpo.rollouts] == [row["prompt"] for row in papo.rollouts]
    assert grpo.summary["before"] == papo.summary["before"]
    document = json.loads((tmp_path / "c/comparison.json").read_text(encoding="utf-8"))
    for kept, run in zip(document["runs"], (grpo, papo), strict=True):
        assert kept["after"] == {name: run.summary["after"][name] for name in ("successes", "greedy")}
        assert kept["reward"]["steps"] == kept["entropy"]["steps"] == [1, 3]
        assert len(kept["step_seconds"]) == 4


def test_a_setting_that_is_given_twice_is_refused():
    with pytest.raises(ValueError, match="method 'papo:gain=5,gain=6' gives 'gain' twice: leave one of them out"):
        methods_of(["grpo", "papo:gain=5,gain=6"])
    assert methods_of(["papo:gain=5,level=0.4"])["papo"] == {"name": "papo", "gain": 5, "level": 0.4}


def test_prompts_are_those_of_the_seed_whatever_the_method(tmp_path):
    plan, prompts = plan_of("grpo", "papo:controller=balance", "other=papo:conserve=true"), {}
    for job in jobs_of(plan, tmp_path):
        task, config = check_recipe(job.recipe, tmp_path)
        prompts[job.name] = prompts_of(task, None, config, job.seed)[0]["prompt"][:]
    assert prompts["grpo-0"] == prompts["papo-0"] == prompts["other-0"]
    assert prompts["grpo-1"] == prompts["papo-1"] == prompts["other-1"] != prompts["grpo-0"]


def test_as_many_runs_at_once_as_there_are_threads_for(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for threads, expected in (("1", 8), ("3", 2), ("16", 1), ("", 8)):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        assert default_jobs() == expected


@pytest.mark.slow
def test_a_killed_comparison_goes_on_to_the_same_numbers(tmp_path):
    """SIGKILL as the first run is made, and again in the middle of training: the numbers of one never killed."""

    def command(output: Path) -> list[str]:
        flags = ["--methods", "grpo", "papo:controller=trend", "--seeds", "0", "1", "--jobs", "2", "--max-steps", "20"]
        return [*PAPO, "compare", *flags, "--output", str(output), *(f"--set={o}" for o in TINY)]

    def numbers(output: Path) -> tuple[list[dict], dict]:
        document = json.loads((output / "comparison.json").read_text(encoding="utf-8"))
        return [undated(run, "step_seconds") for run in document["runs"]], document["failed"]

    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    killed = tmp_path / "killed"
    for found in ("runs/*/environment.json", "runs/*/checkpoints/checkpoint-4/polarity_state.json"):
        process = subprocess.Popen(command(killed), **quiet)
        while process.poll() is None and not list(killed.glob(found)):
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert not (killed / "comparison.json").exists()
    for output in (killed, tmp_path / "whole"):
        subprocess.run(command(output), check=True, **quiet)
    assert numbers(killed) == numbers(tmp_path / "whole")
    assert any(
        re.search("training from step [1-9]", log.read_text(encoding="utf-8")) for log in (killed / "logs").iterdir()
    )
