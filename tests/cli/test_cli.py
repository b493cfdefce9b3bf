"""The commands, as a user meets them: results, JSON that is nothing but JSON, and one line for every mistake."""

import json
import sys

import pytest
from small import SMALL

from entropy_polarity import cli
from entropy_polarity.controllers import CONTROLLERS


def papo(monkeypatch, capfd, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["papo", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capfd.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def run_papo(monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: papo(monkeypatch, capfd, *arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train", "countdwn"), "did you mean 'countdown'"),
        (("train", "recipes/none.toml"), "no recipe at recipes/none.toml"),
        (("train", "--set", "trainer.lerning_rate=1"), "did you mean 'trainer.learning_rate'"),
        (("train", "--set", "trainer.output_dir=x"), "'trainer.output_dir' is set by the run itself"),
        (("train", "--set", "evalution.problems=1"), "did you mean 'evaluation'"),
        (("train", "--set", "task.nmbers=[3]"), "did you mean 'numbers'"),
        (("train", "--set", "trainer.learning_rate"), "has no '='"),
        (("train", "--set", "method.gian=2"), "did you mean 'gain'"),
        (
            ("train", "--set", "trainer.importance_sampling_level=sequence"),
            "method 'papo' looks at single tokens, whose weights that cancels",
        ),
        (("train", "--set", "trainer.num_generations=7"), "7"),
        (("train", "--set", "method.gain=high"), "expected float"),
        (("train", "--set", "method.name=5"), "unknown method 5"),
        (("train", "--set", "task.name=5"), "unknown task 5"),
        (("train", "--set", "task.numbers=4"), "expected tuple[int, ...]"),
        (("train", "--set", "trainer.max_steps=many"), "'max_steps' of recipe table [trainer] is 'many'; expected int"),
        (("train", "--set", "trainer.learning_rate=quick"), "is 'quick'; expected float"),
        (
            ("train", "--set", "trainer.gradient_accumulation_steps=4", "--set", "trainer.steps_per_generation=1"),
            "several",
        ),
        (("train", "--set", "evaluation.problems=0"), "'evaluation.problems' is 0; expected at least 1"),
        (("train", "--set", "evaluation.problems=5000"), "different test problems"),
        (("train", "--set", "record.completions=-1"), "expected at least 0"),
        (("train", "--seed", "-1"), "'seed' is -1; expected at least 0"),
        (("train", "--method", "pappo"), "did you mean 'papo'"),
        (("train", "--max-steps", "0"), "max_steps"),
        (("train", "--model", "./nowhere"), "no model at ./nowhere"),
        (("train", "--model", "someone/some-model"), "HF_HUB_OFFLINE is set, so that the hub is not asked"),
        (("train", "--resume", "nowhere"), "nowhere holds no run"),
        (("train", "--resume", "nowhere", "--seed", "1"), "--seed cannot be given with --resume"),
        (("eval", "--model", "./nowhere"), "no model at ./nowhere"),
        (("eval", "--task", "countdwn"), "did you mean 'countdown'"),
        (("eval", "--problems", "0"), "problems is 0; expected at least 1"),
        (("eval", "--temperature", "0"), "temperature is 0.0"),
        (("eval", "--top-p", "1.5"), "top_p is 1.5"),
        (("eval", "--batch-size", "0"), "batch_size is 0"),
        (("eval", "--seeds", "1", "1"), "seeds are [1, 1]; expected different ones"),
        (("eval", "--model", "a/m", "b/m"), "two models are called 'm'"),
        (("eval", "--model", "a=embedded", "b=embedded", "--baseline", "c"), "unknown baseline 'c'"),
        (("eval", "--baseline", "embedded"), "needs several models"),
        (("eval", "--task", "guess", "--backend", "vllm"), "only --backend transformers can play"),
        (("eval", "--problems", "1000", "--set", "numbers=[2]"), "different test problems"),
        (("report", "nowhere"), "nowhere holds no run"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run_papo, tmp_path, arguments, said):
    code, out, err = run_papo(*arguments)
    assert code == 2
    assert out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("papo: ")
    assert said in lines[0]
    assert not list(tmp_path.iterdir()), "a mistake leaves nothing behind"


def test_a_mistyped_flag_is_exit_code_2(run_papo):
    code, _, err = run_papo("train", "--max-step", "3")
    assert code == 2
    assert "--max-steps" in err


def test_an_output_that_holds_something_is_left_alone(run_papo, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.txt").write_text("all of it", encoding="utf-8")
    code, _, err = run_papo("train", "--output", "precious")
    assert code == 2
    assert "not an empty folder" in err
    assert [p.name for p in (tmp_path / "precious").iterdir()] == ["thesis.txt"]


def test_train_prints_one_json_document_and_refuses_the_same_place_twice(run_papo, tmp_path):
    arguments = ["train", "--output", "run", "--max-steps", "2", "--seed", "3", *(f"--set={o}" for o in SMALL)]
    code, out, err = run_papo(*arguments, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["status"] == "finished"
    assert set(document["after"]["pass_at"]) == {"1", "2"}
    assert "step 2/2" in err  # progress goes to standard error
    before = (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8")
    code, _, err = run_papo(*arguments)
    assert code == 2
    assert "already holds a run" in err
    assert (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8") == before
    code, out, _ = run_papo("eval", "--model", "run", "--problems", "3", "--samples", "2", "--json")
    assert code == 0
    evaluation = json.loads(out)
    assert evaluation["models"]["run"]["model"].endswith("checkpoint-2")
    assert evaluation["task"]["numbers"] == [3]
    (tmp_path / "run/report.html").unlink()
    code, out, _ = run_papo("report", "run", "--json")
    assert code == 0
    assert json.loads(out) == {"report": "run/report.html"}
    assert (tmp_path / "run/report.html").exists()


def test_eval_prints_a_table(run_papo):
    code, out, _ = run_papo("eval", "--problems", "3", "--samples", "2")
    assert code == 0
    assert "pass@1" in out
    assert "pass@2" in out
    assert "3 problems x 2 samples" in out


def test_eval_puts_models_side_by_side(run_papo, tmp_path):
    arguments = ["eval", "--model", "base=embedded", "other=embedded", "--problems", "2", "--samples", "3"]
    code, out, err = run_papo(*arguments, "--seeds", "1", "2", "--top-p", "0.9", "--output", "out")
    assert code == 0, err
    assert "Against base" in out
    assert "maj@3" in out
    assert "sampling seeds 1, 2, temperature 1, top-p 0.9" in out
    assert out.splitlines()[-1] == "out/evaluation.html"
    assert err.splitlines() == [f"{m}, seed {s}: 2 problems x 3 samples" for m in ("base", "other") for s in (1, 2)]
    code, out, err = run_papo(*arguments, "--baseline", "other", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["baseline"] == "other"
    assert document["against"]["base"]["pass@1"] == {"difference": 0.0, "bootstrap": None}  # two problems
    code, out, err = run_papo(*arguments, "--output", "out")
    assert code == 2
    assert "out is not an empty folder" in err


def test_methods_lists_every_method_and_controller(run_papo):
    code, out, _ = run_papo("methods", "--json")
    assert code == 0
    rows = {row["name"]: row for row in json.loads(out)}
    assert {"grpo", "papo"} <= set(rows)
    assert set(rows["papo"]["controllers"]) == set(CONTROLLERS)
    assert rows["kl_cov"]["decides"] == "whole batch"
    assert rows["entropy_advantage"]["settings"]["kappa"] == "required"
    code, out, _ = run_papo("methods")
    assert code == 0
    assert "reconstruction" in out
    assert "kappa=?" in out


def test_pretrain_makes_a_policy_that_loads_and_says_how_good_it_is(run_papo, tmp_path):
    code, out, err = run_papo("pretrain", "--output", "policy", "--steps", "2", "--json")
    assert code == 0, err
    quality = json.loads(out)
    assert set(quality["evaluation"]) == {"countdown, 3 numbers", "countdown, 4 numbers"}
    assert (tmp_path / "policy/model.safetensors").stat().st_size < 2_000_000
    code, _, err = run_papo("pretrain", "--output", "other", "--width", "100")
    assert code == 2
    assert err == "papo: width is 100; expected a multiple of 32\n"
    code, _, err = run_papo("pretrain", "--output", "other", "--steps", "0")
    assert code == 2
    assert err == "papo: steps is 0; expected 1 or more\n"
    code, _, err = run_papo("pretrain", "--output", "policy", "--steps", "2")
    assert code == 2
    assert "already exists" in err


def test_a_full_disk_is_named_even_inside_other_errors():
    inner = OSError(28, "No space left on device")
    outer = RuntimeError("PytorchStreamWriter failed writing file")
    outer.__cause__ = inner
    assert "no space left" in (cli._one_line(outer) or "")
    assert cli._one_line(RuntimeError("a bug")) is None


def test_help_needs_no_torch():
    """`papo --help` is instant: nothing heavy is imported for it."""
    import subprocess

    program = "import sys, entropy_polarity.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
