"""A run from a recipe: what it leaves behind, and that stopping it anywhere loses nothing but the tail."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small import SMALL
from transformers import AutoModelForCausalLM, AutoTokenizer

from entropy_polarity.experiments.training import train
from entropy_polarity.runs.checkpoints import last_checkpoint
from entropy_polarity.runs.recipe import load_recipe, with_flags
from entropy_polarity.runs.record import Run

PAPO = [sys.executable, "-m", "entropy_polarity.cli"]


def small_recipe(*overrides: str):
    return load_recipe("countdown", [*SMALL, *overrides])


def trajectory(run: Run, *without: str) -> list[dict]:
    """The metrics without what depends on the clock."""
    return [{k: v for k, v in row.items() if k not in ("step_time", *without)} for row in run.metrics]


def test_a_run_leaves_everything_behind(small_runs):
    for run in small_runs:
        assert [row["step"] for row in run.metrics] == list(range(1, 7))
        assert run.summary["status"] == "finished"
        assert run.summary["before"]["problems"] == run.summary["after"]["problems"] == 4
        assert run.config["trainer"]["max_steps"] == 6
        assert run.environment["packages"]["trl"].startswith("1.16")
        assert (run.directory / "report.html").stat().st_size > 1_000_000  # Plotly is inside
        assert {row["step"] for row in run.rollouts} == {1, 3, 5}  # two updates a rollout
        AutoModelForCausalLM.from_pretrained(last_checkpoint(run.directory))
        AutoTokenizer.from_pretrained(last_checkpoint(run.directory))


def test_the_token_columns_are_those_of_the_rollouts(small_runs):
    """The tokens spell the completion, P has the sign of A T, and the weight is 1 ± the λ of that step."""
    for run in small_runs:
        lambdas = dict(zip(*run.series("polarity/lambda"), strict=True))
        for row in run.rollouts:
            tokens = [t for t in run.tokens(row["step"]) if t["rollout"] == row["rollout"]]
            text = "".join(t["token"] for t in tokens)
            assert text.removesuffix("<eos>") == row["completion"]
            for t in tokens:
                assert t["logp"] <= 0 <= t["entropy"]
                product = row["advantage"] * t["sensitivity"]
                assert (t["polarity"] > 0) == (product > 0)
                sign = (t["polarity"] > 0) - (t["polarity"] < 0)
                assert t["weight"] == pytest.approx(1 + lambdas[row["step"]] * sign, abs=1e-5)


def test_a_stopped_run_resumes_on_the_same_path(small_runs, tmp_path):
    """Stopped after step 5, resumed from the checkpoint of step 4: the same metrics, no line twice."""
    whole = next(run for run in small_runs if run.config["method"]["controller"] == "trend")
    recipe = small_recipe('method={name="papo", controller="trend"}')

    def stop(row):
        if row["step"] == 5:
            raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError, match="plug"):
        train(recipe, tmp_path / "run", watch=stop)
    stopped = Run.read(tmp_path / "run")
    assert stopped.summary["status"] == "stopped: RuntimeError"
    assert stopped.metrics[-1]["step"] == 5
    train(recipe, tmp_path / "run", resume=True)
    resumed = Run.read(tmp_path / "run")
    assert trajectory(resumed) == trajectory(whole)
    assert resumed.rollouts == whole.rollouts
    assert resumed.summary == whole.summary
    assert [resumed.tokens(s) for s in (1, 3, 5)] == [whole.tokens(s) for s in (1, 3, 5)]


def test_a_finished_run_can_be_lengthened(tmp_path):
    """Six steps and then two more are eight steps at once."""
    recipe = small_recipe('method={name="grpo"}')
    train(recipe, tmp_path / "run")
    longer = with_flags(recipe, max_steps=8)
    train(longer, tmp_path / "run", resume=True)
    train(longer, tmp_path / "straight")
    lengthened, straight = Run.read(tmp_path / "run"), Run.read(tmp_path / "straight")
    assert trajectory(lengthened, "epoch") == trajectory(straight, "epoch")  # its epochs were longer
    assert lengthened.summary == straight.summary
    assert lengthened.config == straight.config
    with pytest.raises(ValueError, match="is finished"):
        train(longer, tmp_path / "run", resume=True)


def test_ctrl_c_ends_with_a_checkpoint_a_summary_and_a_report(tmp_path):
    run = tmp_path / "run"
    overrides = [f"--set={o}" for o in (*SMALL, "trainer.max_steps=500", "trainer.save_steps=400")]
    process = subprocess.Popen(
        [*PAPO, "train", "--output", str(run), *overrides],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGINT)
            break
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert "interrupted" in output
    stopped = Run.read(run)
    checkpoint = last_checkpoint(run)
    assert checkpoint is not None
    assert checkpoint.name == f"checkpoint-{stopped.summary['steps']}"
    assert stopped.summary["status"] == "interrupted"
    assert (run / "report.html").exists()


def test_a_run_stopped_while_it_was_evaluated_is_only_evaluated(small_runs, tmp_path, monkeypatch):
    """All steps are made and saved, the last evaluation is cut off: resuming gives what a whole run gives."""
    from entropy_polarity.experiments import training as module

    whole = next(run for run in small_runs if run.config["method"]["controller"] == "trend")
    recipe = small_recipe('method={name="papo", controller="trend"}')
    evaluate, calls = module.evaluate, []

    def cut_off(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(module, "evaluate", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run")
    train(recipe, tmp_path / "run", resume=True)
    assert Run.read(tmp_path / "run").summary == whole.summary
    assert len(calls) == 3


def test_a_run_that_ends_inside_a_rollout_can_go_on(tmp_path):
    """Five steps with two a rollout: the policy of step 5 is kept, and eight steps later all is as at once."""
    recipe = small_recipe('method={name="papo", controller="trend"}')
    train(with_flags(recipe, max_steps=5), tmp_path / "run")
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-5"
    train(with_flags(recipe, max_steps=8), tmp_path / "run", resume=True)
    train(with_flags(recipe, max_steps=8), tmp_path / "straight")
    lengthened, straight = Run.read(tmp_path / "run"), Run.read(tmp_path / "straight")
    assert trajectory(lengthened, "epoch") == trajectory(straight, "epoch")


def test_a_mistake_found_late_leaves_the_place_free(tmp_path):
    """What only TRL can refuse is refused before there is a run, and the corrected command works in the same place."""
    with pytest.raises(ImportError, match="vLLM"):
        train(small_recipe("trainer.use_vllm=true"), tmp_path / "run")
    train(small_recipe("trainer.max_steps=2"), tmp_path / "run")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("temperature=0", "trainer.temperature is 0.*expected a number above 0"),
        ("top_p=2.0", "trainer.top_p is 2.0; expected a number above 0, at most 1"),
        ("top_k=-3", "trainer.top_k is -3; expected a whole number from 0 up"),
        ("min_p=7.0", "trainer.min_p is 7.0; expected a number from 0 to 1"),
        ("repetition_penalty=0.0", "trainer.repetition_penalty is 0.0; expected a number above 0"),
        ("learning_rate=-1e-4", "trainer.learning_rate is -0.0001; expected a number from 0 up"),
        ("per_device_train_batch_size=0", "trainer.per_device_train_batch_size is 0; expected at least 1"),
        ("max_completion_length=0", "trainer.max_completion_length is 0; expected at least 1"),
    ],
)
def test_a_value_that_no_rollout_can_take_is_refused_before_there_is_a_run(tmp_path, override, said):
    with pytest.raises(ValueError, match=said):
        train(small_recipe(f"trainer.{override}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_checkpoint_that_a_run_goes_on_from_is_summed_once(tmp_path, monkeypatch):
    """The run and then the trainer check it; between the two nothing changes."""
    from entropy_polarity.runs import checkpoints as module

    train(small_recipe("trainer.max_steps=2"), tmp_path / "run")
    summed, sum_of = [], module._sum
    monkeypatch.setattr(module, "_sum", lambda file: summed.append(file) or sum_of(file))
    train(small_recipe("trainer.max_steps=4"), tmp_path / "run", resume=True)
    of_the_first = [file.name for file in summed if file.parent.name == "checkpoint-2"]
    assert len(of_the_first) == len(set(of_the_first)) > 5


def test_one_checkpoint_is_kept_whole_when_only_one_is_kept(tmp_path, monkeypatch):
    """save_total_limit=1: the old checkpoint goes only after the new one has its last file."""
    from entropy_polarity.trainers.trl import checkpoints as module

    seen = []
    rotate = module.rotate
    monkeypatch.setattr(module, "rotate", lambda *a: seen.append(last_checkpoint(tmp_path / "run")) or rotate(*a))
    train(small_recipe("trainer.save_total_limit=1"), tmp_path / "run")
    assert [checkpoint.name for checkpoint in seen] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert [p.name for p in (tmp_path / "run/checkpoints").glob("checkpoint-*")] == ["checkpoint-6"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_kill_at_a_random_moment_loses_only_the_tail(tmp_path, seed):
    """SIGKILL somewhere in the run, again and again; resumed to the end it is the run that was never killed."""
    steps = 30
    overrides = [f"--set={o}" for o in (*SMALL, f"trainer.max_steps={steps}", "trainer.save_steps=4")]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    subprocess.run([*PAPO, "train", "--output", str(tmp_path / "whole"), *overrides], check=True, **quiet)
    run, rng = tmp_path / "run", random.Random(seed)
    command = [*PAPO, "train", "--output", str(run), *overrides]
    for _ in range(3):
        process = subprocess.Popen(command, **quiet)
        while process.poll() is None and not list((run / "checkpoints").glob("*")):
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 3))
        process.kill()
        process.wait()
        if (Run.read(run).summary or {}).get("status") == "finished":  # it was faster
            break
        command = [*PAPO, "train", "--resume", str(run)]
    else:
        subprocess.run(command, check=True, **quiet)
    assert trajectory(Run.read(run)) == trajectory(Run.read(tmp_path / "whole"))
    assert Run.read(run).rollouts == Run.read(tmp_path / "whole").rollouts


@pytest.mark.slow
def test_a_full_disk_is_one_line(tmp_path):
    """On a file system of 12 MB the run ends with exit code 2 and one line, and what was written stays readable."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        overrides = [f"--set={o}" for o in (*SMALL, "trainer.save_total_limit=9")]
        command = [*PAPO, "train", "--output", str(small / "run"), *overrides]
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
        assert done.returncode == 2
        assert done.stderr.strip().splitlines()[-1].startswith("papo: no space left")
        assert "Traceback" not in done.stderr
        assert Run.read(small / "run").metrics
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.slow
def test_a_wheel_in_an_empty_environment_trains_in_an_empty_directory(tmp_path):
    """Build the wheel, install it beside nothing of ours, and run two steps far from the source tree."""
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)], cwd=root, check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    environment, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    pip = [
        str(environment / "bin/python"),
        "-m",
        "pip",
        "install",
        "-q",
        "-c",
        str(root / "constraints.txt"),
        f"{wheel}[trl]",
    ]
    subprocess.run(pip, check=True)
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    train_command = [str(environment / "bin/papo"), "train", "--max-steps", "2", "--set", "evaluation.problems=4"]
    subprocess.run(train_command, cwd=empty, check=True, env=clean)
    (run,) = (empty / "runs").iterdir()
    assert Run.read(run).summary["status"] == "finished"


@pytest.mark.slow
def test_a_recipe_trains_in_two_processes_and_goes_on(tmp_path):
    script = Path(__file__).parents[2] / "examples/distributed.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--master-port=29579", "--nproc-per-node=2"]
    small = [f for o in (*SMALL, "trainer.use_cpu=true", "trainer.ddp_backend=gloo") for f in ("--set", o)]
    for steps in ("2", "4"):
        more = [*small, "--set", f"trainer.max_steps={steps}"]
        done = subprocess.run(
            [*launch, str(script), "countdown", "--output", str(tmp_path / "run"), *more],
            capture_output=True,
            encoding="utf-8",
        )
        assert done.returncode == 0, done.stderr[-3000:]
    checkpoint = last_checkpoint(tmp_path / "run")
    assert checkpoint.name == "checkpoint-4"
    history = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert [row["step"] for row in history if "loss" in row] == [1, 2, 3, 4], "the second start went on"
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run/policy").state_dict()
    kept = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    assert all((final[name] == weight).all() for name, weight in kept.items())
