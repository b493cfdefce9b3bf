"""Statistics over a rollout batch, and draws that no split or order changes."""

import math
from dataclasses import replace

import pytest
import torch
from batches import literal, rows, run
from cases import assert_same, method

from entropy_polarity.tokens import Tokens
from entropy_polarity.transforms import batch
from entropy_polarity.transforms.batch import (
    entropy_sums,
    group_index,
    largest,
    mean_and_deviation,
    mean_entropy,
    quantile,
    segment_sums,
    token_keys,
)

nan, inf = math.nan, math.inf


@pytest.mark.parametrize("part", [1, 2, 5, 99])
def test_segment_sums_by_hand_in_parts_of_any_size(part, monkeypatch):
    monkeypatch.setattr(batch, "PART", part)
    values, segment = torch.tensor([1.0, 2.0, 1e-8, 3.0, 1.0]), torch.tensor([2, 0, 2, 0, 3])
    assert segment_sums(values, segment, 5).tolist() == pytest.approx([5, 0, 1 + 1e-8, 1, 0], rel=1e-12)
    assert segment_sums(values > 1, segment, 5).tolist() == [2, 0, 0, 0, 0]
    assert segment_sums(values[:0], segment[:0], 2).tolist() == [0, 0]


def keys_of(samples: list[int] | range, width: int, seed: int = 0, rollout: int = 0) -> torch.Tensor:
    """The keys of that many tokens of each sample, a row per sample."""
    tokens = literal(advantages=[[0.0] * width] * len(samples), sample_id=list(samples))
    return token_keys(tokens, seed, rollout).view(len(samples), width)


def test_token_keys_do_not_collide_and_look_like_coin_flips():
    def share_of_ones(keys: torch.Tensor) -> torch.Tensor:
        return torch.stack([((keys >> bit) & 1).double().mean() for bit in range(64)])

    keys = keys_of(range(1000), 1000)
    assert len(keys.unique()) == 10**6
    assert abs(share_of_ones(keys) - 0.5).max() < 5 * 0.5 / 1000
    some, tolerance = keys[:200], 5 * 0.5 / math.sqrt(200_000)
    # From one position, sample, rollout or seed to the next every bit flips half of the time.
    for other in (
        keys[:200].roll(1, 1),
        keys[1:201],
        *(keys_of(range(200), 1000, *x) for x in ((0, 1), (1, 0))),
    ):
        assert abs(share_of_ones(some ^ other) - 0.5).max() < tolerance
    assert keys_of([700, 3], 10).equal(keys[[700, 3], :10])
    for seed, rollout in ((-1, 0), (2**63 - 1, 10**9)):
        assert len(keys_of(range(10), 10, seed, rollout).unique()) == 100
    # It is the position that counts, not how many tokens stand before it.
    gap = literal(mask=[[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 1]], advantages=[[0.0] * 4] * 3, sample_id=[700, 5, 3])
    assert token_keys(gap, 0, 0).equal(keys[[700, 700, 3, 3], [1, 3, 0, 3]])


def test_equal_scores_do_not_make_a_choice_depend_on_the_order():
    """Completions of one prompt that begin alike have one log-prob there, and one advantage if they are both right."""
    batch = literal(
        advantages=[[1.0], [1.0], [1.0], [-1.0]],
        logp=[[-2.0], [-2.0], [-2.0], [-1.0]],
        entropy=[[0.1]] * 4,
        sample_id=[0, 1, 2, 3],
    )
    order = torch.tensor([2, 3, 0, 1])
    for transform in (method("stare"), method("kl_cov")):
        assert_same(run(transform, batch.of_responses(order))[0], run(transform, batch)[0].of_responses(order))


def test_the_mean_entropy_of_ragged_groups_by_hand():
    # Groups {1, 3} and {5}: sums 4 and 5, counts 2 and 1, H = 3; σ² = 2 ((4 - 6)² + (5 - 3)²) / 9 = 16 / 9
    batch = literal(
        mask=[[1, 0], [1, 0], [1, 1], [0, 0]],
        advantages=[[0.0, 0.0]] * 4,
        entropy=[[1.0, 9.0], [3.0, 9.0], [5.0, nan], [9.0, 9.0]],
        group=[0, 0, 1, 2],
    )
    assert mean_entropy(batch) == pytest.approx((3, 4 / 3))
    # Each response by itself: 3 (4 + 0 + 4) / 2 / 9 = 4 / 3
    assert mean_entropy(replace(batch, group=None)) == pytest.approx((3, math.sqrt(4 / 3)))
    assert mean_entropy(rows(batch, 0, 1)) == (2, 0)
    assert mean_entropy(rows(batch, 3))[1] == 0


def test_the_standard_error_of_the_mean_entropy_is_that_of_clustered_data():
    """Prompts differ in entropy and in the length of their completions, and the two go together."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    means, errors, naive = [], [], []
    for _ in range(400):
        difficulty = normal(16, 1, 1)
        length = (8 + 3 * difficulty + normal(16, 4, 1)).clamp(1, 16)
        entropy = (1 + 0.3 * difficulty + 0.1 * normal(16, 4, 1) + 0.2 * normal(16, 4, 16)).flatten(0, 1)
        mask = (torch.arange(16) < length).flatten(0, 1)
        batch = Tokens.pack(mask, torch.zeros(64), entropy=entropy, group=torch.arange(64) // 4)
        mean, error = mean_entropy(batch)
        means.append(mean)
        errors.append(error)
        naive.append(entropy[mask].std().item() / math.sqrt(mask.sum()))
    spread = torch.tensor(means).std().item()  # known to 1 / √800 = 3.5 %
    assert torch.tensor(errors).square().mean().sqrt().item() == pytest.approx(spread, rel=0.12)
    assert sum(naive) / len(naive) < 0.4 * spread


def test_the_largest_by_hand():
    scores = torch.tensor([3.0, nan, 1.0, inf, 2.0, 9.0])
    eligible = torch.tensor([True, True, True, True, True, False])
    tokens = literal(advantages=[[0.0] * 3] * 2)
    for count, expected in ((0, []), (1, [3]), (2, [0, 3]), (3, [0, 3, 4]), (9, [0, 2, 3, 4])):
        assert largest(scores, eligible, count, tokens).nonzero().flatten().tolist() == expected


def test_of_equal_scores_the_smaller_sample_comes_first():
    tokens = literal(mask=[[1, 1], [0, 1], [1, 1]], advantages=[[0.0] * 2] * 3, sample_id=[9, 4, 5])
    eligible = torch.tensor([True, True, True, True, False])
    for count, expected in ((1, [2]), (2, [2, 3]), (3, [0, 2, 3]), (4, [0, 1, 2, 3])):
        assert largest(torch.ones(5), eligible, count, tokens).nonzero().flatten().tolist() == expected
        in_order = replace(tokens, sample_id=None)
        assert largest(torch.ones(5), eligible, count, in_order).nonzero().flatten().tolist() == list(range(count))
    one_better = torch.tensor([1.0, 2.0, 1.0, 1.0, 9.0])
    assert largest(one_better, eligible, 2, tokens).nonzero().flatten().tolist() == [1, 2]


def test_sums_of_segments_and_groups_by_hand():
    assert segment_sums(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2, 0, 2]), 4).tolist() == [2, 0, 5, 0]
    assert segment_sums(torch.tensor([True, True]), torch.tensor([1, 1]), 2).tolist() == [0, 2]
    assert segment_sums(torch.tensor([1e8, 1.0, -1e8]), torch.zeros(3, dtype=torch.long), 1).tolist() == [1]
    batch = literal(
        mask=[[1, 1], [0, 1], [0, 0], [1, 1]],
        advantages=[[0.0, 0.0]] * 4,
        entropy=[[1.0, 2.0], [9.0, 4.0], [9.0, 9.0], [nan, 0.5]],
        group=[30, 7, 7, 11],
    )
    index, groups = group_index(batch)
    assert (index.tolist(), groups) == ([2, 0, 0, 1], 3)
    sums, counts = entropy_sums(batch, index, groups)
    assert sums.tolist() == [4, 0.5, 3]
    assert counts.tolist() == [1, 1, 2]


def test_mean_and_deviation_are_of_the_finite_values():
    mean, deviation = mean_and_deviation(torch.tensor([1.0, nan, 3.0, inf, 5.0, -inf]))
    assert mean == 3
    assert deviation.item() == pytest.approx(math.sqrt(8 / 3))
    assert [x.item() for x in mean_and_deviation(torch.tensor([nan]))] == [0, 0]
    assert [x.item() for x in mean_and_deviation(torch.tensor([]))] == [0, 0]


@pytest.mark.parametrize(("q", "expected"), [(0.0, 1), (0.25, 2), (0.4, 2.6), (0.5, 3), (0.7, 3.8), (1.0, 5)])
def test_the_quantile_by_hand(q, expected):
    values = torch.tensor([4.0, nan, 1.0, 5.0, inf, 3.0, 2.0])
    assert quantile(values, q).item() == pytest.approx(expected)
    assert quantile(torch.arange(11.0), 0.7).item() == 7  # exactly, although 0.7 * 10 is a little more
    assert quantile(torch.tensor([nan]), q).isnan()
    assert quantile(torch.tensor([2.0]), q) == 2
