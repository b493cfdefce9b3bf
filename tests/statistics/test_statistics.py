"""Estimates by enumeration, intervals by simulation, curves by hand."""

from collections import Counter
from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entropy_polarity.statistics.curves import area_under_curve, moving_average, steps_to_reach
from entropy_polarity.statistics.intervals import (
    DIFFERENCE,
    LEAST,
    RATE,
    Estimate,
    bootstrap_interval,
    is_constant,
    paired_bootstrap,
    t_interval,
    t_quantile,
)
from entropy_polarity.statistics.success import maj_at_k, pass_at_k


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


def brute_force(answers, right, k):
    """maj@k as its definition says it: over all subsets, ties split."""
    share = {a: np.mean([r for b, r in zip(answers, right, strict=True) if b == a]) for a in set(answers)}
    values = []
    for subset in combinations(range(len(answers)), k):
        votes = Counter(answers[i] for i in subset if answers[i] is not None)
        winners = [a for a in votes if votes[a] == max(votes.values())]
        values.append(np.mean([share[a] for a in winners]) if winners else 0.0)
    return np.mean(values)


def test_maj_at_k_by_hand():
    answers, right = ["7", "7", "9", None], [True, True, False, False]
    assert maj_at_k(answers, right, 1) == 0.5  # the share of right samples
    # Pairs: 77 right; 79, 79 ties, a half each; 7-, 7- right, for None has no vote; 9- wrong.
    assert maj_at_k(answers, right, 2) == pytest.approx((1 + 0.5 + 0.5 + 1 + 1 + 0) / 6)
    # Threes: 779 right, 77- right, 79- and 79- ties.
    assert maj_at_k(answers, right, 3) == pytest.approx((1 + 1 + 0.5 + 0.5) / 4)
    assert maj_at_k(answers, right, 4) == 1
    assert maj_at_k([None, None], [False, False], 2) == 0
    assert maj_at_k(["a", "b", "c", "d"], [True, False, False, True], 4) == 0.5  # all tie, two are right
    # More wrong answers of one kind than right ones of another: a majority is wrong where pass@k is certain.
    assert maj_at_k(["1", "1", "1", "2", "2"], [False] * 3 + [True] * 2, 5) == 0
    # Equal answers with different verdicts, as a scorer that is not a function of the answer gives: r_a = 1/2.
    assert maj_at_k(["a", "a"], [True, False], 2) == 0.5


@given(st.lists(st.tuples(st.sampled_from([None, *"abcd"]), st.booleans()), min_size=1, max_size=8), st.integers(1, 8))
def test_maj_at_k_is_the_mean_over_all_subsets(samples, k):
    answers, right = zip(*samples, strict=True)
    k = min(k, len(answers))
    assert maj_at_k(answers, right, k) == pytest.approx(brute_force(answers, right, k), abs=1e-12)


def test_maj_at_k_of_many_samples_is_exact_too():
    # Two answers, 60 % and 40 %: k = 3 of n = 1000 as the hypergeometric distribution has it.
    answers = ["a"] * 600 + ["b"] * 400
    exact = (comb(600, 3) + comb(600, 2) * 400) / comb(1000, 3)
    assert maj_at_k(answers, [a == "a" for a in answers], 3) == pytest.approx(exact, rel=1e-12)
    # All different: everything ties, whatever k.
    answers = [str(i) for i in range(64)]
    assert maj_at_k(answers, [i < 16 for i in range(64)], 32) == pytest.approx(0.25, rel=1e-12)


@pytest.mark.parametrize(("right", "k"), [([True, False], 0), ([True, False], 3), ([True], 1)])
def test_maj_at_k_refuses_what_cannot_be(right, k):
    with pytest.raises(ValueError, match=f"k is {k}, with 2 answers and {len(right)} verdicts"):
        maj_at_k(["a", "b"], right, k)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_interval_covers_the_truth_as_often_as_it_says(level):
    # 400 data sets of 100 Bernoulli(0.3) values: the coverage has a standard error of 2 % (level 0.8), 1.1 % (0.95).
    data = (np.random.default_rng(1).random((400, 100)) < 0.3).astype(float)
    intervals = [bootstrap_interval(values, level, draws=400, seed=i) for i, values in enumerate(data)]
    coverage = np.mean([low <= 0.3 <= high for low, high in intervals])
    assert level - 0.05 < coverage < level + 0.04


def test_the_interval_of_few_values_is_not_known_and_that_of_ten_holds_the_mean():
    for few in (np.array([0.5]), np.array([0.0, 1.0]), np.arange(LEAST - 1.0)):
        assert np.isnan(bootstrap_interval(few, within=(0.0, 10.0))).all()
        assert np.isnan([Estimate.of(few).low, paired_bootstrap(few[None], 0 * few[None]).high]).all()
    low, high = bootstrap_interval(np.array([0.0, 1.0] * 5))
    assert 0 < low < 0.5 < high < 1
    several = paired_bootstrap(np.arange(9.0)[None].repeat(3, 0), np.zeros((3, 9)))
    assert (several.value, str(several)) == (4.0, "4.000 [-]")


def test_the_interval_of_equal_values_is_what_they_rule_out():
    # Of 200 problems none is solved: (1 - q)^200 = 0.025 at q = 0.018275, Clopper and Pearson's upper bound.
    assert bootstrap_interval(np.zeros(200), within=RATE) == pytest.approx((0.0, 0.0182751), abs=1e-6)
    assert bootstrap_interval(np.ones(200), within=RATE) == pytest.approx((1 - 0.0182751, 1.0), abs=1e-6)
    # Each solved in 4 of 16 samples: a share q of others could be 0 or 1. q = 1 - 0.025^(1/10) = 0.308497
    assert bootstrap_interval(np.full(10, 0.25), within=RATE) == pytest.approx((0.75 * 0 + 0.25 * 0.691503, 0.481373))
    assert np.isnan(bootstrap_interval(np.full(10, 6.0))).all()  # turns of an episode have no bounds that are known
    same = paired_bootstrap(np.zeros((2, 10)), np.zeros((2, 10)), within=DIFFERENCE)
    assert (same.value, same.low, same.high) == pytest.approx((0.0, -0.308497, 0.308497), abs=1e-6)
    assert is_constant(np.array([0.1 + 0.2, 0.3]))


@pytest.mark.parametrize("rate", [0.005, 0.02])
def test_the_interval_of_equal_values_holds_a_rare_success(rate):
    rng = np.random.default_rng(4)
    held = [low <= rate <= high for low, high in (
        bootstrap_interval((rng.random(100) < rate).astype(float), draws=200, within=RATE) for _ in range(300)
    )]  # fmt: skip
    # Without it every draw that sees no success, 61 or 13 of 100, would miss.
    assert np.mean(held) > 0.85


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
    assert str(Estimate.of(np.array([1.0, 0.0]))) == "0.500 [-]"


def test_an_estimate_of_several_seeds_is_wider_where_they_differ():
    rng = np.random.default_rng(0)
    one = (rng.random(50) < 0.4).astype(float)
    assert Estimate.of(one[None]) == Estimate.of(one)  # one seed is no spread
    same, apart = Estimate.of(np.stack([one, one])), Estimate.of(np.stack([one, one * 0]))
    assert same.value == one.mean()
    assert same.high - same.low == pytest.approx(Estimate.of(one).high - Estimate.of(one).low, abs=0.03)
    assert apart.low == 0  # as if the seed with nothing had been drawn twice
    assert apart.high > one.mean()


@pytest.mark.parametrize(
    ("freedom", "table"),  # two-sided 90 %, 95 %, 99 %, as in every table of Student's t
    [
        (1, (6.314, 12.706, 63.657)),
        (2, (2.920, 4.303, 9.925)),
        (3, (2.353, 3.182, 5.841)),
        (4, (2.132, 2.776, 4.604)),
        (5, (2.015, 2.571, 4.032)),
        (9, (1.833, 2.262, 3.250)),
        (30, (1.697, 2.042, 2.750)),
        (120, (1.658, 1.980, 2.617)),
    ],
)
def test_quantiles_of_students_t_are_those_of_the_tables(freedom, table):
    assert [round(t_quantile(level, freedom), 3) for level in (0.90, 0.95, 0.99)] == list(table)


def test_quantiles_of_students_t_to_many_digits():
    # ν = 1: tan(π · level / 2). ν = 2: P = t / √(2 + t²), hence t = P √(2 / (1 - P²)).
    assert t_quantile(0.95, 1) == pytest.approx(np.tan(np.pi * 0.95 / 2), rel=1e-12)
    assert t_quantile(0.95, 2) == pytest.approx(0.95 * np.sqrt(2 / (1 - 0.95**2)), rel=1e-12)
    assert t_quantile(0.95, 1_000_000) == pytest.approx(1.959964, abs=1e-5)  # the normal distribution's


def test_a_t_interval_by_hand():
    # 1, 2, 3, 6: mean 3, sd √(14/3), half 3.18245 · √(14/3) / 2 = 3.43743
    interval = t_interval(np.array([1.0, 2.0, 3.0, 6.0]))
    assert (interval.value, interval.low, interval.high) == pytest.approx((3, 3 - 3.43743, 3 + 3.43743), abs=1e-5)
    for equal in (np.full(3, 0.5), np.zeros(2), np.array([0.1 + 0.2, 0.3])):
        assert np.isnan([t_interval(equal).low, t_interval(equal).high]).all()  # no spread to go by
    # Two seeds: half 12.7062 · √½ / √2
    assert t_interval(np.array([0.0, 1.0])).high == pytest.approx(0.5 + 12.7062 / 2, abs=1e-4)
    with pytest.raises(ValueError, match="1 differences; a spread over seeds needs at least two"):
        t_interval(np.array([0.5]))


def test_a_t_interval_of_three_seeds_covers_the_truth_as_often_as_it_says():
    # 2000 data sets: the coverage has a standard error of 0.5 %.
    data = np.random.default_rng(2).normal(1.0, 3.0, size=(2000, 3))
    covered = np.mean([(e := t_interval(row)).low <= 1.0 <= e.high for row in data])
    assert covered == pytest.approx(0.95, abs=0.015)


def test_a_paired_bootstrap_sees_only_the_difference():
    """What seeds and problems have in common cancels: of a constant difference nothing varies."""
    rng = np.random.default_rng(0)
    b = rng.normal(size=(4, 1)) + rng.normal(size=(1, 50))
    constant = paired_bootstrap(b + 0.25, b)
    assert (constant.value, str(constant)) == (pytest.approx(0.25), "0.250 [-]")
    a = b + rng.normal(0.1, 1.0, size=(4, 50))
    there, back = paired_bootstrap(a, b, seed=1), paired_bootstrap(b, a, seed=1)
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))
    assert paired_bootstrap(a, b, level=0.5).high < paired_bootstrap(a, b).high


def test_a_paired_bootstrap_by_enumeration():
    """Two seeds, problems alike, differences 0 and 1: the draws are 0, 1/2, 1/2, 1 with equal chance."""
    differences = np.array([[0.0], [1.0]]).repeat(LEAST, axis=1)
    interval = paired_bootstrap(differences, 0 * differences, level=0.4)
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.5, 0.5, 0.5))  # the middle half of them
    interval = paired_bootstrap(differences, 0 * differences, level=0.6)
    assert (interval.low, interval.high) == pytest.approx((0.0, 1.0))


@pytest.mark.parametrize(("seeds", "problems", "noise"), [(1.0, 1.0, 0.0), (0.3, 1.0, 1.0), (1.0, 0.0, 1.0)])
def test_a_paired_bootstrap_covers_the_truth_as_often_as_it_says(seeds, problems, noise):
    """Differences 0.5 + seed + problem + noise, for 20 seeds and 40 problems; where noise rules it may be wider."""
    rng, covered = np.random.default_rng(3), []
    for number in range(300):  # the coverage has a standard error of 1.3 %
        d = 0.5 + seeds * rng.normal(size=(20, 1)) + problems * rng.normal(size=(1, 40))
        d = d + noise * rng.normal(size=(20, 40))
        interval = paired_bootstrap(d, np.zeros_like(d), draws=500, seed=number)
        covered.append(interval.low <= 0.5 <= interval.high)
    assert 0.95 - 0.05 < np.mean(covered) <= 0.95 + 0.035


def test_a_paired_bootstrap_refuses_what_cannot_be_paired(untyped):
    for a, b in (((2, 3), (2, 4)), ((0, 3), (0, 3))):
        with pytest.raises(ValueError, match=r"expected one \(seeds, problems\) for both"):
            paired_bootstrap(np.zeros(a), np.zeros(b))


def test_the_area_is_the_mean_over_rollouts():
    assert area_under_curve(np.array([0.0, 0.5, 1.0, 1.0])) == 0.625


def test_a_moving_average_has_whole_windows_only():
    np.testing.assert_allclose(moving_average(np.array([0.0, 3.0, 6.0, 0.0]), 3), [3, 3])
    np.testing.assert_allclose(moving_average(np.array([1.0, 2.0]), 10), [1.5])


def test_a_level_is_reached_at_the_end_of_the_first_window_that_has_it():
    steps, values = [1, 3, 5, 7, 9], np.array([1.0, 0.0, 0.2, 0.4, 0.6])
    # Averages of two: 0.5 (step 3), 0.1, 0.3 (step 7), 0.5 (step 9)
    assert steps_to_reach(steps, values, 0.5, window=2) == 3
    assert steps_to_reach(steps, values, 0.51, window=2) is None
    assert steps_to_reach(steps[1:], values[1:], 0.3, window=2) == 7
    assert steps_to_reach(steps, values, 0.44, window=9) == 9  # as wide as there are values
    assert steps_to_reach(steps, values, float(moving_average(values, 3).max()), window=3) == 5  # its own best
