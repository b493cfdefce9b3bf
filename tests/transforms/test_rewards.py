"""Methods that decide from rewards alone, by hand."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from batches import by_row, literal, rows, run, sampled_batch
from cases import advantages, close, method

from entropy_polarity.methods import METHODS
from entropy_polarity.transforms import LossOverrides

nan = math.nan


def test_dapo_drops_groups_with_equal_rewards():
    batch = literal(
        mask=[[1, 1], [1, 0], [1, 1], [1, 1]],
        advantages=[[0.7, 0.7], [-0.7, -0.7], [0.0, 0.0], [0.0, 0.0]],
        reward=[1.0, 0.0, 1.0, 1.0],
        group=[7, 7, 3, 3],
    )
    result, _, _ = run(method("dapo"), batch)
    assert by_row(result, result.advantages) == [close([0.7, 0.7]), close([-0.7]), [], []]
    assert by_row(result, result.position) == [[0, 1], [0], [], []]
    assert result.index.tolist() == [0, 1, 2]
    assert result.responses == 4
    assert run(method("dapo"), rows(batch, 0, 1))[0].index is None  # nothing was dropped
    assert method("dapo").loss == LossOverrides(0.2, 0.28, average="token")
    assert method("dapo", clip_low=0.1, clip_high=0.5).loss == LossOverrides(0.1, 0.5, average="token")


def test_dapo_punishes_length_before_the_advantages_are_made():
    # L = 4, c = 2: clip((2 - n) / 2, -1, 0) = 0, -1/2, -1, 0 for n = 2, 3, 5, 1, so R = 1, 1/2, -1, 0. Mean 1/8,
    # squared distances 49, 9, 81, 1 (in 64ths) sum to 140, sd √(140 / 64 / 3) = 0.853913.
    # The second group's rewards are equal before the penalty: dropped.
    mask = [[1] * n + [0] * (5 - n) for n in (2, 3, 5, 1, 2, 4, 4, 4)]
    columns = {
        "advantages": [[9.0] * 5] * 8,
        "reward": [1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0],
        "group": [0] * 4 + [1] * 4,
    }
    found = advantages(method("dapo", overlong_cache=2, max_length=4), literal(mask=mask, **columns))
    assert [row[0] for row in found[:4]] == close([x / (0.853913 + 1e-4) for x in (0.875, 0.375, -1.125, -0.125)])
    assert all(len(set(row)) == 1 for row in found[:4])
    assert [len(row) for row in found] == [2, 3, 5, 1, 0, 0, 0, 0]
    # A gap of the environment's tokens is no length.
    gap = literal(mask=[[row[0], 0, *row[2:]] for row in mask], **columns)
    found = [row[0] for row in advantages(method("dapo", overlong_cache=2, max_length=4), gap)[:4]]
    # n = 1, 2, 4, 1: R = 1, 1, -1, 0; mean 1/4, squares 9, 9, 25, 1 (in 16ths) sum to 44: sd √(44 / 16 / 3) = 0.957427
    assert found == close([x / (0.957427 + 1e-4) for x in (0.75, 0.75, -1.25, -0.25)])


@pytest.mark.parametrize("quantile", [0.2, 0.4, 0.9])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -7.3])
def test_equal_rewards_teach_nothing_in_a_group(quantile, reward):
    batch = replace(sampled_batch(0, groups=2, size=7), reward=torch.full((14,), reward))
    assert (run(METHODS["qae"].build(quantile), batch)[0].advantages == 0).all()
    for settings in ({}, {"overlong_cache": 3, "max_length": 6}):
        assert len(run(METHODS["dapo"].build(**settings), batch)[0].advantages) == 0


def test_right_and_wrong_answers():
    batch = literal(advantages=[[0.3, 0.3]] * 3, reward=[1.0, 0.0, -0.5], group=[0, 0, 0])
    assert advantages(method("w_reinforce"), batch) == [close([0.1, 0.1]), [-1, -1], [-1, -1]]
    assert advantages(method("w_reinforce", right=2.0, wrong=0.5), batch) == [[2, 2], [-0.5, -0.5], [-0.5, -0.5]]
    assert advantages(method("nsr"), batch) == [[], [-1, -1], [-1, -1]]
    assert advantages(method("psr"), batch) == [[1, 1], [], []]
    assert run(method("nsr"), batch)[0].index.tolist() == [2, 3, 4, 5]
    assert method("nsr").loss == method("psr").loss == LossOverrides(average="token")


@pytest.mark.parametrize("quantile", [0.1, 0.25, 0.4, 0.5, 0.7])
@pytest.mark.parametrize("size", [2, 5, 6, 10, 11, 16])
def test_qae_of_right_and_wrong(quantile, size):
    """With n0 wrong answers the quantile stands K (n - 1) steps into the sorted rewards: 0 up to n0 - 1, 1 from n0."""
    for wrong in range(1, size):
        reward = [1.0] * (size - wrong) + [0.0] * wrong
        batch = literal(advantages=[[5.0]] * size, reward=reward, group=[2] * size)
        place = Fraction(str(quantile)) * (size - 1)
        baseline = float(min(max(place - (wrong - 1), 0), 1))
        deviation = math.sqrt(wrong * (size - wrong) / size / (size - 1))
        expected = [(r - baseline) / (deviation + 1e-4) for r in reward]
        assert [row[0] for row in advantages(method("qae", quantile=quantile), batch)] == close(expected)
        rate = Fraction(size - wrong, size)
        if baseline == 0:  # only successes teach, where they are the rarer
            assert rate < 1 - Fraction(str(quantile)) + Fraction(1, size)
        if baseline == 1:
            assert rate > 1 - Fraction(str(quantile)) - Fraction(1, size)


def test_qae_judges_each_group_by_itself():
    # K = 1/2: medians 1 and 5; sd of 0, 1, 5 is √7, of 5, 5, 8 is √3.
    batch = literal(advantages=[[0.0]] * 6, reward=[0.0, 5.0, 1.0, 8.0, 5.0, 5.0], group=[1, 0, 1, 0, 1, 0])
    groups = {1: (1.0, math.sqrt(7)), 0: (5.0, math.sqrt(3))}
    expected = [
        [(r - groups[g][0]) / (groups[g][1] + 1e-4)]
        for r, g in zip(batch.reward.tolist(), batch.group.tolist(), strict=True)
    ]
    assert advantages(method("qae", quantile=0.5), batch) == close(expected)


def test_a_completion_that_nothing_could_judge_teaches_nothing():
    """Its reward is NaN: advantage 0, in no group statistic, and the others are as without it."""
    rewards, group = [1.0, 0.0, nan, 1.0, 1.0], [0, 0, 0, 1, 1]
    batch = literal(mask=[[1]] * 5, advantages=[[0.7], [-0.7], [0.0], [0.0], [0.0]], reward=rewards, group=group)
    others = [0, 1, 3, 4]
    for name in ("dapo", "qae", "w_reinforce", "nsr", "psr"):
        whole = advantages(method(name), batch)
        assert [whole[i] for i in others] == advantages(method(name), rows(batch, *others)), name
        assert whole[2] == ([] if name in ("nsr", "psr") else [0]), name


def test_a_response_without_tokens_counts_in_the_statistics_of_its_group():
    # Its reward was given: mean 1/2, sd √(1/3) of 1, 1, 0, 0, whose third has no token; n = 0 is no overlong answer.
    batch = literal(mask=[[1], [1], [0], [1]], advantages=[[9.0]] * 4, reward=[1.0, 1.0, 0.0, 0.0], group=[0] * 4)
    unit = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    found = advantages(method("dapo", overlong_cache=2, max_length=4), batch)
    assert found == [close([unit]), close([unit]), [], close([-unit])]


def test_qae_of_no_response_at_all():
    nothing = sampled_batch(0).of_responses(torch.tensor([], dtype=torch.long))
    assert run(method("qae"), nothing)[0].advantages.tolist() == []
