"""Evaluations whose every answer is known: counts, votes, seeds, comparisons, files and page."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from transformers import PretrainedConfig

from entropy_polarity.evaluation import Attempts, attempt, evaluate
from entropy_polarity.experiments import evaluate as experiment
from entropy_polarity.experiments import models as chosen
from entropy_polarity.experiments.evaluate import Settings, evaluate_models
from entropy_polarity.experiments.evaluation_summary import examples, summarise
from entropy_polarity.experiments.models import labelled, settle_task
from entropy_polarity.generation import GREEDY, Sampling
from entropy_polarity.generation.attempts import Attempt
from entropy_polarity.report.tables.evaluation import evaluation_tables
from entropy_polarity.statistics.intervals import Estimate
from entropy_polarity.tasks import Score, distinct_problems
from entropy_polarity.tasks.countdown import Countdown
from entropy_polarity.tasks.games import Guess

HOSTILE = '<script>alert("owned")</script><img src=x onerror=alert(1)>'


class Scripted:
    """Tokenizer and model in one: prompts are numbered, and the k-th sample of a prompt is `script[k]`.

    A completion that starts with "=" stands for a right answer. A prompt's id is its place among the prompts seen, a
    completion's id its number.
    """

    pad_token_id, eos_token_id = 0, None
    config = PretrainedConfig()
    device = torch.device("cpu")

    def __init__(self, task: Countdown, problems: int, script: list[str]) -> None:
        chosen = distinct_problems(task, 0, "test", problems)
        solutions = dict(self.solution(task, i) for i in range(2_000))
        self.answers = {p.prompt: solutions[p.prompt] for p in chosen}
        self.script, self.training = script, True
        self.prompts, self.asked, self.drawn, self.settings = [], [], [], []

    @staticmethod
    def solution(task: Countdown, index: int) -> tuple[str, str]:
        made, solution = task.solved_problem(0, index, "test")
        return made.prompt, solution

    def __call__(self, prompt):
        self.prompts.append(prompt)
        return {"input_ids": [len(self.prompts) - 1]}

    def generate(self, input_ids, max_new_tokens, do_sample, temperature=None, **_):
        assert not self.training
        self.settings.append((do_sample, temperature, max_new_tokens))
        self.drawn.append(torch.rand(1).item())
        numbers = torch.arange(len(self.asked), len(self.asked) + len(input_ids))[:, None]
        self.asked += [self.prompts[i] for i in input_ids.flatten().tolist()]
        return torch.cat([input_ids, numbers], dim=1)  # the prompt, and the number of the completion

    def batch_decode(self, completions, **_):
        assert all(len(completion) == 1 for completion in completions)  # the prompt was cut off
        return [self.text(number) for (number,) in completions]

    def text(self, number: int) -> str:
        said = self.script[number % len(self.script)]
        return self.answers[self.asked[number]] if said == "=" else said

    def eval(self):
        self.training = False

    def modules(self):
        return [self]


def test_an_evaluation_counts_each_verdict_and_estimates_pass_at_k():
    script = ["=", "1", "1+", "="]  # right, wrong numbers, not an expression, right
    scripted = Scripted(Countdown(), 6, script)
    result = evaluate(scripted, scripted, Countdown(), problems=6, samples=4, temperature=0.7)
    # c = 2 of n = 4 everywhere: pass@1 = 1/2, pass@2 = 1 - C(2,2)/C(4,2) = 5/6, pass@4 = 1
    assert {k: e.value for k, e in result.pass_at.items()} == pytest.approx({1: 0.5, 2: 5 / 6, 4: 1.0})
    assert result.verdicts == {
        "correct": 0.5,
        "wrong value": 0.0,
        "wrong numbers": 0.25,
        "not an expression": 0.25,
        "too long": 0.0,
    }
    assert result.successes == [2] * 6
    # After 24 samples the script begins again: one greedy answer for each of the six problems.
    assert result.greedy == [1, 0, 0, 1, 1, 0]
    assert str(result.greedy_pass) == str(Estimate.of(np.array([1.0, 0, 0, 1, 1, 0]))) == "0.500 [-]"
    assert scripted.settings == [(True, 0.7, 16), (False, None, 16)]
    found = result.to_json()["pass_at"]["4"]
    assert found["value"] == 1.0
    assert np.isnan([found["low"], found["high"]]).all()  # six problems are too few to say


def test_an_evaluation_leaves_the_mode_of_the_model_and_the_random_state_as_they_were():
    scripted = Scripted(Countdown(), 2, ["="])
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    for training in (True, False):
        scripted.training = training
        evaluate(scripted, scripted, Countdown(), problems=2, samples=1, seed=0)
        assert scripted.training is training
    assert torch.rand(3).equal(expected)
    assert scripted.drawn[:2] == scripted.drawn[2:]  # and samples from its own seed


def test_an_evaluation_of_nothing_is_refused():
    with pytest.raises(ValueError, match="problems=0 and samples=4"):
        evaluate(None, None, Countdown(), problems=0, samples=4)


class Answering:
    """A generator without a model: the k-th sample of a problem is what `says(problem number, k, seed)` says.

    It is its own tokenizer, whose ids are the letters' code points.
    """

    def __init__(self, says):
        self.says, self.tokenizer, self.batch_sizes, self.context, self.asked = says, self, [7], None, []
        self.watch = None

    def __call__(self, text):
        return {"input_ids": list(map(ord, text))}

    def batch_decode(self, completions, **_):
        return ["".join(map(chr, ids)) for ids in completions]

    def complete(self, prompts, samples, max_new_tokens, sampling, seed):
        self.asked.append((samples, max_new_tokens, sampling, seed))
        return [[list(map(ord, self.says(i, k, seed))) for k in range(samples)] for i in range(len(prompts))]


@cache
def solved(count: int):
    """The first problems of the test split, and a solution of each."""
    solutions = dict(Scripted.solution(Countdown(), i) for i in range(2 * count))
    problems = distinct_problems(Countdown(), 0, "test", count)
    return problems, [solutions[p.prompt] for p in problems]


def test_attempts_count_votes_and_rewards():
    problems, solutions = solved(3)
    # Right twice and one wrong answer three times; right twice, each wrong one once; never right, nothing to vote for.
    says = [["1", "=", "1", "=", "1"], ["1", "=", "2", "=", "3"], ["x"] * 5]
    generator = Answering(lambda i, k, seed: solutions[i] if says[i][k] == "=" else says[i][k])
    made = attempt(generator, Countdown(), problems, 5, 3, Sampling(0.5, 0.9), final_answers=True)
    assert generator.asked == [(5, 16, Sampling(0.5, 0.9), 3), (1, 16, GREEDY, 3)]
    found = made.measures()
    assert list(found) == ["avg@5", "pass@1", "pass@2", "pass@4", "pass@5", "maj@4", "maj@5", "greedy", "reward"]
    assert found["avg@5"].tolist() == found["pass@1"].tolist() == found["reward"].tolist() == [0.4, 0.4, 0]
    assert found["maj@5"].tolist() == [0, 1, 0]
    # Four of the five: a right one is left out twice (3 to 1), a wrong one three times (2 to 2: a half).
    assert found["maj@4"] == pytest.approx([3 / 5 / 2, (3 + 2 * 0.25) / 5, 0])
    assert "maj@4" not in replace(made, voted=False).measures()
    again = attempt(generator, Countdown(), problems, 5, 4, Sampling(), greedy=made.greedy)
    assert len(generator.asked) == 3  # the greedy answer is of no seed
    assert again.sampled[0][0].answer is None  # nobody asked
    assert made.sampled[0][0].answer == "1"


def test_a_game_needs_a_model_to_play_it():
    with pytest.raises(TypeError, match="'guess' is a game"):
        attempt(Answering(None), Guess(), [Guess().problem(0, 0)], 1, 0, Sampling())


@pytest.fixture
def compared(monkeypatch, tmp_path):
    """Three models on four problems with two seeds: never right, right on even problems, and HOSTILE text."""
    _, solutions = solved(4)
    says = {
        "none": lambda i, k, seed: "1",
        "even": lambda i, k, seed: solutions[i] if i % 2 == 0 and (k > 0 or seed == 5) else "1",
        "hostile": lambda i, k, seed: HOSTILE,
    }
    for module in (experiment, chosen):
        monkeypatch.setattr(module, "resolve_model", str)
    monkeypatch.setattr(experiment, "_generator", lambda place, settings: Answering(says[place]))

    def run(**more):
        settings = Settings(problems=4, samples=4, seeds=(2, 5))
        models = ["none", "even", f"{HOSTILE[:8]}=hostile"]
        return evaluate_models(models, settings, output=tmp_path / "out", **more), tmp_path / "out"

    return run


def test_models_are_compared_on_the_same_problems_and_seeds(compared):
    document, _ = compared()
    assert document["baseline"] == "none"
    none, even, hostile = document["models"].values()
    # Even problems: 3 of 4 right with seed 2, 4 of 4 with seed 5.
    assert even["successes"] == [[3, 0, 3, 0], [4, 0, 4, 0]]
    assert even["scores"]["avg@4"]["value"] == pytest.approx((3 / 4 / 2 + 1 / 2) / 2)
    assert even["scores"]["maj@4"]["value"] == 0.5
    assert even["batch_sizes"] == [7]
    assert none["scores"]["pass@4"] == {"value": 0, "low": None, "high": None}  # four problems are too few to say
    assert hostile["verdicts"]["not an expression"] == 1
    a = np.array(even["successes"]) / 4
    assert document["against"]["even"]["avg@4"] == {"difference": pytest.approx(a.mean()), "bootstrap": None}
    assert set(document["against"]) == {"even", HOSTILE[:8]}


def test_another_baseline_turns_the_signs(compared):
    document, _ = compared(baseline="even")
    assert document["against"]["none"]["pass@1"]["difference"] < 0
    assert "even" not in document["against"]


def test_every_attempt_has_its_line_and_the_document_is_written(compared):
    document, folder = compared()
    assert sorted(p.name for p in folder.iterdir()) == ["evaluation.html", "evaluation.json", "lock", "problems.jsonl"]
    assert json.loads((folder / "evaluation.json").read_text(encoding="utf-8")) == json.loads(json.dumps(document))
    lines = [json.loads(line) for line in (folder / "problems.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["model"], line["seed"], line["problem"]) for line in lines] == [
        (label, seed, number) for label in document["models"] for seed in (2, 5) for number in range(4)
    ]
    (line,) = [line for line in lines if (line["model"], line["seed"], line["problem"]) == ("even", 2, 2)]
    problems, solutions = solved(4)
    assert line["prompt"] == problems[2].prompt
    assert line["facts"] == problems[2].metadata
    assert line["successes"] == 3
    right = {"completion": solutions[2], "verdict": "correct", "reward": 1.0}
    assert right.items() <= line["samples"][1].items()
    assert line["samples"][1]["answer"] is not None
    assert line["samples"][0] == {"completion": "1", "answer": "1", "verdict": "wrong numbers", "reward": 0.0}
    with pytest.raises(FileExistsError, match="not an empty folder"):
        compared()


def test_the_page_shows_model_text_and_does_not_run_it(compared):
    _, folder = compared()
    page = (folder / "evaluation.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert page.count("&lt;script&gt;alert") >= 4  # every problem shows its completions
    outside_plotly = re.sub(r"<script>/\*.*?</script>", "", page, count=1, flags=re.DOTALL)
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", outside_plotly)
    for text in ("Against none", "Difference to none", "pass@k", "maj@4", "3 of 4 right", "batches of 7"):
        assert text in page


def test_the_page_begins_with_what_the_models_differ_on(compared):
    """Of four problems "even" solves the first and the third, 3 of 4 samples each; nobody solves the others."""
    _, folder = compared()
    page = (folder / "evaluation.html").read_text(encoding="utf-8")
    assert "those first on which the numbers of right samples differ most" in page
    assert [int(number) for number in re.findall(r">problem (\d+)", page)] == [0, 2, 1, 3]


def test_of_all_problems_the_page_has_those_with_the_largest_difference():
    """Right samples by problem: 0 to 3 of one model against 3 of the other, so the last differ least."""
    wrong, right = Attempt("a", Score(0.0, "wrong")), Attempt("b", Score(1.0, "correct"))
    problems = distinct_problems(Countdown(), 0, "test", 16)
    counts = [3, 2, 1, 0] * 4
    mixed = Attempts(problems, [[right] * n + [wrong] * (3 - n) for n in counts], [wrong] * 16)
    always = Attempts(problems, [[right] * 3] * 16, [right] * 16)
    shown = [example["number"] for example in examples({"mixed": [mixed], "always": [always]})]
    assert shown == [3, 7, 11, 15, 2, 6, 10, 14, 1, 5, 9, 13]
    alone = [example["number"] for example in examples({"mixed": [mixed]})]
    assert alone == list(range(12)), "of one model, in the order of the problems"


@pytest.mark.parametrize(
    ("reward", "colour"),
    [(1.0, "right"), (2.0, "right"), (0.99, "partly"), (0.5, "partly"), (0.0, "wrong"), (-1, "wrong")],
)
def test_a_verdict_has_the_colour_of_its_reward(compared, monkeypatch, reward, colour):
    monkeypatch.setattr(Countdown, "scores", lambda self, answers: [Score(reward, "judged") for _ in answers])
    document, folder = compared()
    page = (folder / "evaluation.html").read_text(encoding="utf-8")
    assert set(re.findall(r'<span class="(\w+)">judged</span>', page)) == {colour}
    assert document["models"]["none"]["scores"]["pass@1"]["value"] == (colour == "right")


@pytest.mark.browser
def test_a_browser_draws_the_page(compared, chromium):
    _, folder = compared()
    page = (folder / "evaluation.html").as_uri()
    dom = subprocess.run([*chromium, "--dump-dom", page], capture_output=True, encoding="utf-8", timeout=120).stdout
    assert len(re.findall(r'id="chart-\d"[^>]*js-plotly-plot', dom)) == 2
    assert dom.count('class="problem"') == 4


def test_games_have_no_vote_and_their_own_counts(tmp_path):
    document = evaluate_models(["embedded"], Settings(problems=3, samples=2), task="guess", output=tmp_path / "out")
    (found,) = document["models"].values()
    assert list(found["scores"]) == ["avg@2", "pass@1", "pass@2", "greedy", "reward"]
    assert list(found["facts"]) == ["turns", "infeasible", "off_centre"]
    (scores,) = evaluation_tables(document)
    assert [column.name for column in scores.columns] == [
        "model", "success rate", "pass@2", "greedy", "return", "turns", "infeasible", "off_centre",
    ]  # fmt: skip
    line = json.loads((tmp_path / "out/problems.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert set(line["samples"][0]) == {"observation", "turns", "verdict", "reward", "facts"}
    assert line["samples"][0]["observation"] == "1-32:"


def test_what_an_environment_did_not_always_count_is_compared_where_it_did():
    def made(*counts):
        attempts = [[Attempt("", Score(0.0, "won"), said=[], counts=one)] for one in counts]
        return Attempts([Guess().problem(0, i) for i in range(len(counts))], attempts, [row[0] for row in attempts])

    nothing: dict[str, float] = {}
    attempts = {
        "a": [made({"keys": 1.0, "never both": 1.0}, {"keys": 3.0}, nothing)],
        "b": [made({"keys": 2.0}, nothing, {"keys": 9.0, "never both": 1.0})],
    }
    document = summarise(attempts, Guess(), "a")
    assert document["models"]["a"]["facts"]["keys"]["value"] == 2
    assert document["models"]["b"]["facts"]["keys"]["value"] == 5.5
    assert document["against"]["b"]["keys"]["difference"] == 1  # the first problem alone
    assert "never both" not in document["against"]["b"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"problems": 0}, "problems is 0; expected at least 1"),
        ({"samples": 0}, "samples is 0; expected at least 1"),
        ({"temperature": -1.0}, r"temperature is -1.0; expected a positive number"),
        ({"top_p": 0.0}, r"top_p is 0.0; expected a number above 0, at most 1"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"seeds": (1, 1)}, r"seeds are \[1, 1\]; expected different ones, none negative"),
        ({"seed": -1}, "seed is -1"),
        ({"backend": "vllm", "batch_size": 4}, "--batch-size cannot be given with --backend vllm"),
    ],
)
def test_settings_that_cannot_be_are_one_clear_line(given, told):
    with pytest.raises(ValueError, match=told):
        Settings(**given)


def test_models_have_labels_and_one_task(small_runs):
    run, other = (str(run.directory) for run in small_runs)
    assert labelled([run, f"b={other}", "Qwen/Qwen3-0.6B"]) == {
        "trend": run, "b": other, "Qwen3-0.6B": "Qwen/Qwen3-0.6B",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"two models are called 'm': give them labels, as in a=x/m b=y/m"):
        labelled(["x/m", "y/m"])
    checkpoint = f"{run}/checkpoints/checkpoint-2"
    task = {"name": "countdown", "numbers": [3]}
    assert settle_task({"a": run, "b": "embedded", "c": checkpoint}, None, ()) == task
    assert settle_task({"a": checkpoint}, "countdown", ["max_target=9"]) == task | {"max_target": 9}
    assert settle_task({"a": checkpoint}, None, ["task.max_target=9"]) == task | {"max_target": 9}, "as in a recipe"
    assert settle_task({"a": run}, "guess", ()) == {"name": "guess"}
    assert settle_task({"a": "embedded"}, None, ()) == {"name": "countdown"}


def test_models_of_different_tasks_need_a_word(small_runs, tmp_path):
    run = str(small_runs[0].directory)
    shutil.copytree(run, tmp_path / "other", ignore=shutil.ignore_patterns("checkpoints"))
    config = tmp_path / "other/config.toml"
    config.write_text(
        config.read_text(encoding="utf-8").replace("[task]\n", "[task]\nmax_target = 50\n"), encoding="utf-8"
    )
    with pytest.raises(ValueError, match=r"trained on different tasks .*: say --task"):
        settle_task({"a": run, "b": str(tmp_path / "other")}, None, ())
