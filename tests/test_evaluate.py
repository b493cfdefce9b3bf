"""Estimates by enumeration, intervals by simulation, and an evaluation whose every answer is known."""

from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from entropy_polarity.evaluate import Estimate, bootstrap_interval, evaluate, pass_at_k
from entropy_polarity.tasks import distinct_problems
from entropy_polarity.tasks.countdown import Countdown


@pytest.mark.parametrize("samples", range(1, 7))
def test_pass_at_k_is_the_share_of_k_subsets_that_hold_a_success(samples):
    for k in range(1, samples + 1):
        # The first c of the samples are right: a k-subset passes if its smallest index is below c.
        subsets = list(combinations(range(samples), k))
        shares = [sum(s[0] < c for s in subsets) / len(subsets) for c in range(samples + 1)]
        np.testing.assert_allclose(pass_at_k(np.arange(samples + 1), samples, k), shares, atol=1e-15)


def test_pass_at_k_of_many_samples_neither_overflows_nor_rounds_away():
    # pass@1 = c / n; pass@n = 1 as soon as one is right; 1 - C(9999, 2) / C(10000, 2) = 2 / 10000
    assert pass_at_k(np.array([3]), 10_000, 1) == pytest.approx(3e-4)
    assert pass_at_k(np.array([0, 1]), 10_000, 10_000).tolist() == [0, 1]
    assert pass_at_k(np.array([1]), 10_000, 2) == pytest.approx(2e-4, rel=1e-10)


def test_pass_at_k_is_unbiased():
    # With success probability 0.3, the chance that one of 4 is right is 1 - 0.7^4 = 0.7599.
    successes = np.random.default_rng(0).binomial(16, 0.3, size=20_000)
    # The standard error of the mean is below 0.3 / sqrt(20000) = 0.002.
    assert pass_at_k(successes, 16, 4).mean() == pytest.approx(1 - 0.7**4, abs=0.008)


@pytest.mark.parametrize(
    ("successes", "samples", "k", "told"),
    [
        ([1], 4, 0, "k is 0; expected a number from 1 to the 4 samples"),
        ([1], 4, 5, "k is 5"),
        ([5, 0], 4, 2, r"successes must lie in \[0, 4\], got 0..5"),
        ([-1, 2], 4, 2, r"got -1..2"),
    ],
)
def test_pass_at_k_refuses_what_cannot_be(successes, samples, k, told):
    with pytest.raises(ValueError, match=told):
        pass_at_k(np.array(successes), samples, k)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_interval_covers_the_truth_as_often_as_it_says(level):
    # 400 data sets of 100 Bernoulli(0.3) values: the coverage has a standard error of 2 % (level 0.8), 1.1 % (0.95).
    data = (np.random.default_rng(1).random((400, 100)) < 0.3).astype(float)
    intervals = [bootstrap_interval(values, level, draws=400, seed=i) for i, values in enumerate(data)]
    coverage = np.mean([low <= 0.3 <= high for low, high in intervals])
    assert level - 0.05 < coverage < level + 0.04


def test_the_interval_of_equal_values_is_the_value_and_of_different_ones_holds_the_mean():
    assert bootstrap_interval(np.full(10, 0.25)) == (0.25, 0.25)
    low, high = bootstrap_interval(np.array([0.0, 0.0, 1.0, 1.0]))
    assert 0 <= low < 0.5 < high <= 1


def test_intervals_are_repeatable_and_leave_the_global_random_state_alone():
    values = np.random.default_rng(0).random(50)
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    assert (np.random.get_state()[1] == before).all()


def test_no_values_have_no_interval():
    with pytest.raises(ValueError, match="no values"):
        bootstrap_interval(np.array([]))


def test_an_estimate_prints_its_interval():
    assert str(Estimate(0.5, 0.41, 0.59)) == "0.500 [0.410, 0.590]"
    assert Estimate.of(np.array([1.0, 1.0])) == Estimate(1.0, 1.0, 1.0)


class Scripted:
    """Tokenizer and model in one: prompts are numbered, and the k-th sample of a prompt is `script[k]`.

    A completion that starts with "=" stands for a right answer. Ids are indices into the texts seen.
    """

    pad_token_id = 0
    device = torch.device("cpu")

    def __init__(self, task: Countdown, problems: int, script: list[str]) -> None:
        chosen = distinct_problems(task, 0, "test", problems)
        solutions = dict(self.solution(task, i) for i in range(2_000))
        self.answers = {p.prompt: solutions[p.prompt] for p in chosen}
        self.script, self.training, self.asked, self.drawn = script, True, [], []

    @staticmethod
    def solution(task: Countdown, index: int) -> tuple[str, str]:
        made, solution = task.solved_problem(0, index, "test")
        return made.prompt, solution

    def __call__(self, prompts, **_):
        start = len(self.asked)
        self.asked += prompts
        ids = torch.arange(start, len(self.asked))[:, None]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def generate(self, input_ids, temperature, max_new_tokens, **_):
        assert not self.training
        self.settings = SimpleNamespace(temperature=temperature, max_new_tokens=max_new_tokens)
        self.drawn.append(torch.rand(1).item())
        return input_ids.repeat(1, 2)  # the prompt, and its number as the completion

    def batch_decode(self, completions, **_):
        assert completions.shape[1] == 1  # the prompt was cut off
        return [self.text(i) for i in completions.flatten().tolist()]

    def text(self, number: int) -> str:
        said = self.script[number % len(self.script)]
        return self.answers[self.asked[number]] if said == "=" else said

    def eval(self):
        self.training = False

    def train(self, mode):
        self.training = mode


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
    assert scripted.settings == SimpleNamespace(temperature=0.7, max_new_tokens=16)
    assert result.to_json()["pass_at"]["4"] == {"value": 1.0, "low": 1.0, "high": 1.0}


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
    assert scripted.drawn[0] == scripted.drawn[1]  # and samples from its own seed


def test_an_evaluation_of_nothing_is_refused():
    with pytest.raises(ValueError, match="problems=0 and samples=4"):
        evaluate(None, None, Countdown(), problems=0, samples=4)
