"""Agreement and its intervals: known values, coverage, and what is refused."""

import numpy as np
import pytest

from entropy_polarity.statistics.agreement import agreement_of, block_bootstrap, detrended, pearson, ranks, spearman


def test_correlations_of_known_cases():
    x, y = np.array([1.0, 2, 3, 4, 5]), np.array([2.0, 1, 4, 3, 5])
    assert pearson(x, y) == pytest.approx(0.8)
    assert spearman(x, np.exp(y)) == pytest.approx(0.8)
    assert spearman(np.array([1.0, 2, 2, 3]), np.array([1.0, 3, 2, 4])) == pytest.approx(0.9486832980505138)
    assert ranks(np.array([2.0, 2, 1])).tolist() == [1.5, 1.5, 0]
    assert np.isnan(pearson(x, np.ones(5)))


def test_intervals_cover_and_blocks_widen_them_where_updates_hang_together():
    draw = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        x = draw.normal(size=60)
        y = 2 * x + draw.normal(size=60)
        found = agreement_of([(x[:30], y[:30]), (x[30:], y[30:])], draws=200).slope
        hits += found.low <= 2 <= found.high
    assert hits >= 85
    common = np.repeat(draw.normal(size=(2, 12)), 5, axis=1)  # every value five times in a row
    single, blocks = (agreement_of([(common[0], common[1])], block=block, draws=500).pearson for block in (1, 5))
    assert blocks.high - blocks.low > 1.5 * (single.high - single.low)


def test_intervals_hold_what_the_docstring_says_where_updates_hang_together():
    draw, hits = np.random.default_rng(0), {0.0: 0, 0.8: 0}
    for _ in range(100):
        for lag in hits:
            noise = draw.normal(size=(2, 3, 90))
            noise[1] = 0.3 * noise[0] + np.sqrt(1 - 0.3**2) * noise[1]
            for k in range(1, 90):
                noise[..., k] += lag * noise[..., k - 1]
            found = block_bootstrap([*zip(*noise[..., 50:], strict=True)], pearson, draws=200)
            hits[lag] += found.low <= 0.3 <= found.high
    assert hits[0.0] >= 87
    assert 70 <= hits[0.8] < hits[0.0]


def test_signs_that_all_agree_are_bounded():
    x = np.arange(1.0, 21.0)
    for y, low, high in ((x, 0.025 ** (1 / 60), 1.0), (-x, 0.0, 1 - 0.025 ** (1 / 60))):
        found = agreement_of([(x, y)] * 3).sign_agreement
        assert (found.low, found.high) == pytest.approx((low, high))


@pytest.mark.parametrize("lengths", [(4,), (19,), (5, 5, 5, 5, 5), (40, 19)])
def test_too_few_updates_in_a_run_have_no_interval(lengths):
    """Blocks as long as the sample only turn it round: every draw would say the same."""
    draw = np.random.default_rng(0)
    found = agreement_of([tuple(draw.normal(size=(2, length))) for length in lengths])
    for figure in ("pearson", "spearman", "sign_agreement", "slope", "offset"):
        estimate = getattr(found, figure)
        assert np.isfinite(estimate.value)
        assert np.isnan([estimate.low, estimate.high]).all()
    all_agree = agreement_of([(np.arange(1.0, length + 1),) * 2 for length in lengths]).sign_agreement
    assert (all_agree.value, str(all_agree)) == (1.0, "1.000 [-]")
    enough = agreement_of([tuple(draw.normal(size=(2, 20)))])
    assert enough.pearson.low < enough.pearson.value < enough.pearson.high


def test_two_curves_that_only_fall_together_agree_by_their_trend():
    step, draw = np.arange(40.0), np.random.default_rng(0)
    x, y = (np.exp(-step / 10) + 0.02 * draw.normal(size=40) for _ in range(2))
    assert spearman(x, y) > 0.8
    assert abs(spearman(detrended(x), detrended(y))) < 0.35


def test_what_cannot_be_compared_is_refused():
    for x, y in (([1.0, 2.0], [1.0, 2.0]), ([1.0, 2.0, 3.0], [1.0, 2.0]), ([1.0, 2.0, np.nan], [1.0, 2.0, 3.0])):
        with pytest.raises(ValueError, match="expected as many of each"):
            agreement_of([(np.array(x), np.array(y))])
