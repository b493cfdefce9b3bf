"""What is seen while something runs: lines where there is no terminal, one line in it, and warnings that matter."""

import io
import re
from functools import partial

import pytest
import torch
from rich.console import Console
from test_evaluation import Answering, solved

from entropy_polarity.evaluation import attempt, warn_after, warn_before
from entropy_polarity.experiments import evaluate as experiment
from entropy_polarity.experiments.evaluate import Settings, budget, evaluate_models
from entropy_polarity.generation import GREEDY, Sampling
from entropy_polarity.generation.sampling import TransformersGenerator
from entropy_polarity.policy.loading import load_policy
from entropy_polarity.report.lines import LiveOrLines, Part
from entropy_polarity.report.live import LiveView
from entropy_polarity.runs.recipe import fitting, load_recipe
from entropy_polarity.tasks import Problem, distinct_problems
from entropy_polarity.tasks.countdown import Countdown
from entropy_polarity.tasks.games import Guess
from entropy_polarity.tasks.prompts import why_unreadable


def told(seconds: list[tuple[float, float]]) -> list[float]:
    """When a line is due of a part of 100 that began at 0: (second, done) of each call."""
    part = Part("samples", 100, 0.0)
    return [now for now, done in seconds if part.due(done, now)]


def test_a_line_is_due_every_tenth_of_the_way_but_not_every_moment():
    assert told([(now, now / 10) for now in range(1, 10)]) == [], "what is short says nothing"
    assert told([(now, now) for now in range(1, 101)]) == [*range(10, 101, 10)]
    slow = [(now, now / 100) for now in range(1, 201)]  # two hundredths in as many seconds
    assert told(slow) == [10, 70, 130, 190], "after ten seconds, then once a minute"
    fast = [(now / 10, now / 3) for now in range(1, 301)]  # thirty seconds in all
    assert told(fast) == [10, 20, 30]


def test_a_line_says_how_much_is_left_at_the_pace_so_far():
    part = Part("samples", 4800, 0.0)
    assert part.line(1200, 60.0) == "samples: 1,200 of 4,800 (25%), about 3:00 left"
    assert part.line(0, 5.0) == "samples: 0 of 4,800 (0%)"
    assert part.line(4800, 245.0) == "samples: 4,800 of 4,800 (100%), took 4:05"


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when they are told to."""
    passed = [0.0]
    monkeypatch.setattr("entropy_polarity.report.lines.time.monotonic", lambda: passed[0])
    return passed


def test_without_a_terminal_an_evaluation_has_its_lines(clock):
    stream = io.StringIO()
    with LiveOrLines(stream) as view:
        for what in ("samples", "greedy answers"):
            for done in range(0, 101, 5):
                view.progress(what, done, 100)
                clock[0] += 4
    assert stream.getvalue().splitlines()[:2] == [
        "samples: 15 of 100 (15%), about 1:08 left",
        "samples: 30 of 100 (30%), about 0:56 left",
    ]
    assert sum(line.startswith("greedy answers: ") for line in stream.getvalue().splitlines()) >= 5
    assert "samples: 100 of 100 (100%), took 1:20" in stream.getvalue()


@pytest.mark.parametrize("kind", [LiveOrLines, partial(LiveView, "a run", 10)])
def test_a_terminal_shows_it_at_once(kind):
    view = kind(stream=io.StringIO())
    view.console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with view:
        view.progress("samples", 3, 100)
        shown = Console(file=io.StringIO(), width=100)
        shown.print(view.live.get_renderable())
        assert "samples: 3 of 100 (3%)" in shown.file.getvalue()


def rows_of_one_rollout():
    first = {"step": 1, "reward": 0.25, "polarity/entropy": 0.5, "entropy": 0.5, "grad_norm": 1.5}
    second = {"step": 2, "entropy": 0.48, "grad_norm": 1.25}
    return [first | {"update": 1, "updates": 2}, second | {"update": 2, "updates": 2}]


def test_two_updates_of_a_rollout_are_not_one_line():
    stream = io.StringIO()
    with LiveView("a run", 10, stream) as view:
        for row in rows_of_one_rollout():
            view.watch(row)
        view.watch({"step": 3, "reward": 0.5, "update": 1, "updates": 1})
    first, second, third = stream.getvalue().splitlines()
    assert first.startswith("step 1/10, update 1 of 2 on its rollout  reward 0.250  entropy 0.500")
    assert second.startswith("step 2/10, update 2 of 2 on its rollout  entropy 0.480  gradient norm 1.250  left ")
    assert "reward" not in second
    assert third.startswith("step 3/10  reward 0.500")


def test_the_panel_says_which_update_it_is():
    view = LiveView("a run", 10, io.StringIO())
    pictures = []
    for row in rows_of_one_rollout():
        view.watch(row)
        console = Console(file=io.StringIO(), width=110)
        console.print(view._panel())
        pictures.append(console.file.getvalue())
    for picture, update, norm in zip(pictures, (1, 2), ("1.500", "1.250"), strict=True):
        assert f"update {update} of 2 on its rollout" in picture
        assert re.search(rf"gradient norm +{norm}", picture)
        assert "0.250" in picture, "the reward of the rollout stays"


# ---- what an evaluation tells of itself ---------------------------------------------------------------------------


def test_progress_counts_every_completion_and_changes_no_draw(embedded):
    """Batches of 3 make 8 completions: shares of a batch add up, the end is the number of completions."""
    model, tokenizer = load_policy(embedded)
    problems = distinct_problems(Countdown(), 0, "test", 2)
    seen: list[tuple[str, float, int]] = []

    def made(**more):
        generator = TransformersGenerator(model, tokenizer, batch_size=3)
        return attempt(generator, Countdown(), problems, 4, 0, Sampling(), final_answers=True, **more)

    watched = made(progress=lambda *told: seen.append(told))
    assert watched.sampled == made().sampled
    parts = {what: [done for name, done, _ in seen if name == what] for what, _, _ in seen}
    assert list(parts) == ["samples", "votes", "verdicts", "greedy answers"]
    assert parts["samples"] == sorted(parts["samples"])
    assert {3, 6, 8} <= set(parts["samples"])
    assert any(done % 1 for done in parts["samples"]), "within a batch, too"
    assert [parts[what][-1] for what in parts] == [8, 2, 2, 2]  # of votes and verdicts the greedy ones come last
    assert {total for what, _, total in seen if what == "samples"} == {8}


def test_a_game_tells_of_its_turns():
    model, tokenizer = load_policy("embedded:guess")
    seen = []
    generator = TransformersGenerator(model, tokenizer)
    attempt(
        generator,
        Guess(),
        distinct_problems(Guess(), 0, "test", 2),
        2,
        0,
        Sampling(),
        progress=lambda *t: seen.append(t),
    )
    shares = [done for what, done, _ in seen if what == "samples"]
    assert shares == sorted(shares)
    assert shares[-1] == 4
    assert len(shares) > 3


def test_the_budget_follows_the_models(embedded, tmp_path):
    large = tmp_path / "large"
    large.mkdir()
    (large / "config.json").write_text("{}", encoding="utf-8")
    with (large / "model-00001-of-00001.safetensors").open("wb") as file:
        file.truncate(100_000_001)  # a hole in a file: no byte of it is written
    assert budget([embedded]) == (200, 16)
    assert budget([embedded, str(large)]) == (100, 4)
    assert budget(["someone/of-the-hub"]) == (100, 4)


def test_a_small_task_has_all_its_problems(monkeypatch):
    """With three numbers countdown has 193 held-out problems; who asks for 200 is told so."""
    monkeypatch.setattr(experiment, "_generator", lambda place, settings: Answering(lambda i, k, seed: "1"))
    small = {"task": "countdown", "task_settings": ["numbers=[3]"]}
    document = evaluate_models(["embedded"], Settings(samples=1), **small)
    assert document["settings"]["problems"] == 193
    with pytest.raises(ValueError, match="about 193 different test problems, 200 were asked for"):
        evaluate_models(["embedded"], Settings(problems=200, samples=1), **small)


def test_an_evaluation_made_to_measure_holds_for_its_own_task_and_model():
    written = load_recipe("countdown")
    assert (written.evaluation.problems, written.evaluation.samples) == (300, 16)
    for change in ("task={name='guess'}", "policy.model=elsewhere"):
        fitted = fitting(load_recipe("countdown", [change]), written).evaluation
        assert (fitted.problems, fitted.samples, fitted.seed) == (100, 4, 0)
        said = load_recipe("countdown", [change, "evaluation.problems=250"])
        assert fitting(said, written) is said
    harder = load_recipe("countdown", ["task.numbers=[4]"])
    assert fitting(harder, written) is harder


def test_what_a_policy_cannot_read_is_said(embedded):
    tokenizer = load_policy(embedded)[1]
    generator = TransformersGenerator(*load_policy(embedded))
    said: list[str] = []
    problems, _ = solved(4)
    warn_before(generator, Countdown(), problems, said.append)
    assert said == []
    foreign = [Problem("Natalia sold clips to 48 friends", {}, "1")] * 3
    warn_before(generator, Countdown(), foreign, said.append, "mine")
    # 25 letters of 32 characters
    assert said == ["warning: mine: 78% of the prompts' tokens are unknown to its tokenizer: it cannot read this task"]
    assert why_unreadable([[3] * 40, [3] * 10], tokenizer, 16, 64) is None
    long = why_unreadable([[3] * 50, [3] * 10], tokenizer, 16, 64)
    assert long == "1 of 2 prompts, with an answer of 16 tokens, are longer than the 64 tokens that it can read"
    assert why_unreadable([[3] * 50], tokenizer, 16, None) is None


def test_answers_that_nothing_can_judge_are_said():
    problems, solutions = solved(3)
    said: list[str] = []

    def made(says):
        return attempt(Answering(says), Countdown(), problems, 4, 0, GREEDY)

    warn_after(made(lambda i, k, seed: "?"), said.append)
    assert said == ["warning: the policy: all 12 attempts were judged 'not an expression': look at what it answers"]
    warn_after(made(lambda i, k, seed: "?" if k else "1"), said.append)
    warn_after(made(lambda i, k, seed: solutions[i]), said.append)
    assert len(said) == 1


def test_the_random_state_of_a_run_is_not_touched(embedded):
    model, tokenizer = load_policy(embedded)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    problems = distinct_problems(Countdown(), 0, "test", 2)
    attempt(
        TransformersGenerator(model, tokenizer), Countdown(), problems, 2, 0, Sampling(), progress=lambda *told: None
    )
    assert torch.equal(torch.get_rng_state(), before)
