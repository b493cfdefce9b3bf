"""The facts of the theory (design, section 2), in float64, on the fast path that training uses."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from entropy_polarity.kernels import token_stats
from entropy_polarity.maths import branch_flows, polarity, predicted_entropy_change, surviving_ratio
from entropy_polarity.tokens import TokenStats

nan, inf = math.nan, math.inf
LOGITS = st.lists(st.floats(-6, 6), min_size=2, max_size=12).map(lambda z: torch.tensor(z, dtype=torch.float64))
FLOWS = st.lists(st.floats(-5, 5), min_size=1, max_size=20)
ADVANTAGE = st.floats(-3, 3).filter(lambda a: abs(a) > 1e-2)


def every_token(logits: torch.Tensor, temperature: float = 1.0) -> TokenStats:
    """The statistics of one state for each of its tokens as the sampled one."""
    return token_stats(logits.expand(len(logits), -1), torch.arange(len(logits)), temperature=temperature)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Categorical(logits=logits).entropy()


def flat(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_statistics_of_a_distribution_worked_out_by_hand():
    # p = (1/2, 1/4, 1/4), in units of ln 2: log p = (-1, -2, -2), H = 3/2, log p + H = (1/2, -1/2, -1/2).
    # S = p (log p + H) = (1/4, -1/8, -1/8);  C = Σ p S = 1/8 - 1/32 - 1/32 = 1/16
    # T = C - S = (-3/16, 3/16, 3/16)
    # Σp² = 3/8;  Σp² log p = -1/4 - 2/16 - 2/16 = -1/2
    stats = every_token(flat(0.5, 0.25, 0.25).log())
    ln2 = math.log(2)
    expected = {
        "logp": flat(-1, -2, -2) * ln2,
        "entropy": flat(1.5, 1.5, 1.5) * ln2,
        "sum_p2": flat(0.375, 0.375, 0.375),
        "sum_p2_logp": flat(-0.5, -0.5, -0.5) * ln2,
        "sensitivity": flat(-3, 3, 3) / 16 * ln2,
        "sampled": flat(2, -1, -1) / 8 * ln2,
        "correction": flat(1, 1, 1) / 16 * ln2,
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(stats, name), value, rtol=0, atol=1e-15, msg=name)


@given(LOGITS, ADVANTAGE)
def test_polarity_is_the_derivative_of_entropy_along_the_policy_gradient_step(z, advantage):
    T = every_token(z).sensitivity
    P = polarity(torch.full_like(T, advantage), T)
    step, h = advantage * (torch.eye(len(z), dtype=z.dtype) - z.softmax(-1)), 1e-5
    slope = (entropy(z + h * step) - entropy(z - h * step)) / (2 * h)
    # Central difference: truncation h²/6 |H'''| about 1e-8, rounding 1e-16 / h = 1e-11.
    torch.testing.assert_close(P, slope, rtol=0, atol=1e-7)


@given(LOGITS)
def test_sensitivity_has_mean_zero_under_the_policy(z):
    stats = every_token(z)
    assert abs((stats.logp.exp() * stats.sensitivity).sum()) < 1e-14


@given(LOGITS)
def test_correction_is_the_mean_contribution_and_never_negative(z):
    stats = every_token(z)
    p = z.softmax(-1)
    mean_contribution = (p * stats.sampled).sum()
    covariance = (p * p * (p.log() - (p * p.log()).sum())).sum()  # Cov_p(p, log p), as E[p (log p - E log p)]
    torch.testing.assert_close(stats.correction, mean_contribution.expand(len(z)), rtol=0, atol=1e-14)
    torch.testing.assert_close(stats.correction, covariance.expand(len(z)), rtol=0, atol=1e-14)
    assert (stats.correction > -1e-15).all()


@given(LOGITS)
def test_one_threshold_above_exp_minus_entropy_parts_expanding_from_contracting_tokens(z):
    assume(z.max() - z.min() > 1e-3)
    stats = every_token(z)
    p, T = stats.logp.exp(), stats.sensitivity
    clear = T.abs() > 1e-13  # rounding may put a token that lies on the threshold on either side
    signs = T[p.argsort()][clear[p.argsort()]].sign()
    assert signs[0] == 1
    assert signs[-1] == -1
    assert (signs.diff() != 0).sum() == 1
    # S_a < 0 <= C where p_a < e^{-H}: so T > 0 there, and the threshold lies above.
    assert (T[p < (-stats.entropy).exp()] > -1e-15).all()


def test_both_branches_stay_on_their_side_of_the_threshold_for_a_hand_made_state():
    # H(0.9, 0.1) = 0.325 and e^{-H} = 0.72: only the mode lies above, it contracts; the other expands.
    assert every_token(flat(0.9, 0.1).log()).sensitivity.sign().tolist() == [-1, 1]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_a_uniform_distribution_has_no_polarity(size):
    assert (every_token(torch.full((size,), 1.7, dtype=torch.float64)).sensitivity == 0).all()


def test_a_one_hot_distribution_has_no_polarity():
    stats = every_token(flat(-inf, 2.0, -inf))
    assert stats.sensitivity.tolist() == [0, 0, 0]
    assert stats.entropy.tolist() == [0, 0, 0]
    assert stats.logp.tolist() == [-inf, 0, -inf]


@given(LOGITS, st.floats(-50, 50))
def test_a_constant_added_to_the_logits_changes_nothing(z, constant):
    for moved, original in zip(every_token(z + constant), every_token(z), strict=True):
        torch.testing.assert_close(moved, original, rtol=1e-11, atol=1e-12)


@given(LOGITS, st.randoms(use_true_random=False))
def test_a_permuted_vocabulary_permutes_the_statistics(z, random):
    order = list(range(len(z)))
    random.shuffle(order)
    for permuted, original in zip(every_token(z[order]), every_token(z), strict=True):
        torch.testing.assert_close(permuted, original[order], rtol=1e-12, atol=1e-14)


@given(LOGITS, st.lists(st.integers(0, 12), min_size=1, max_size=5), st.sampled_from([0.5, 1.0, 3.0]))
def test_minus_infinity_is_the_distribution_on_the_remaining_vocabulary(z, places, temperature):
    masked = z.tolist()
    for place in places:
        masked.insert(min(place, len(masked)), -inf)
    masked = torch.tensor(masked, dtype=z.dtype)
    kept = masked > -inf
    whole, rest = every_token(masked, temperature), every_token(z, temperature)
    for name in TokenStats._fields:
        full, remaining = getattr(whole, name), getattr(rest, name)
        assert not full.isnan().any(), name
        torch.testing.assert_close(full[kept], remaining, rtol=1e-12, atol=1e-14, msg=name)
    assert (whole.logp[~kept] == -inf).all()
    torch.testing.assert_close(whole.sensitivity[~kept], whole.correction[~kept], rtol=0, atol=1e-15)


@given(LOGITS, st.floats(0.2, 5))
def test_temperature_is_a_scaling_of_the_logits_beforehand(z, temperature):
    for tempered, scaled in zip(every_token(z, temperature=temperature), every_token(z / temperature), strict=True):
        torch.testing.assert_close(tempered, scaled, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight"),
    [
        (1.0, 1.0, 1.0),
        (1.25, 1.0, 1.25),  # inside 1 + high = 1.3
        (1.35, 1.0, 0.0),  # clipped: the gain was taken already
        (0.5, 1.0, 0.5),  # a positive advantage is never clipped from below
        (0.85, -1.0, 0.85),  # inside 1 - low = 0.8
        (0.75, -1.0, 0.0),
        (3.0, -1.0, 3.0),  # nor a negative one from above
        (3.0, 0.0, 3.0),
        (0.1, 0.0, 0.1),
    ],
)
def test_the_ratio_survives_where_the_clip_leaves_the_gradient_alive(ratio, advantage, weight):
    assert surviving_ratio(flat(ratio), flat(advantage), (0.2, 0.3)).item() == weight


@given(st.floats(0.05, 4), ADVANTAGE, st.floats(0.05, 0.9), st.floats(0.05, 0.9))
def test_the_surviving_ratio_is_what_the_ppo_objective_leaves_of_the_gradient(ratio, advantage, low, high):
    assume(abs(ratio - (1 - low)) > 1e-9)
    assume(abs(ratio - (1 + high)) > 1e-9)
    log_ratio = flat(math.log(ratio)).requires_grad_()
    r = log_ratio.exp()
    torch.minimum(r * advantage, r.clamp(1 - low, 1 + high) * advantage).sum().backward()
    weight = surviving_ratio(r.detach(), flat(advantage), (low, high))
    torch.testing.assert_close(log_ratio.grad, weight * advantage, rtol=1e-14, atol=0)


def test_polarity_multiplies_weight_advantage_and_sensitivity():
    A, T, r = flat(2, -2, 2, -2), flat(0.5, 0.5, -0.25, -0.25), flat(1.5, 1.5, 1.5, 0.5)
    assert polarity(A, T).tolist() == [1, -1, -0.5, 0.5]
    assert polarity(A, T, r).tolist() == [1.5, -1.5, -0.75, 0.25]
    assert polarity(A, T, r, (0.2, 0.2)).tolist() == [
        0,
        -1.5,
        0,
        0,
    ]  # r = 1.5 kills A > 0, r = 0.5 kills A < 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((flat(1), flat(1, 2)), r"\(1,\), \(2,\)"),
        ((flat(1, 2), flat(1, 2), flat(1)), r"\(2,\), \(2,\), \(1,\)"),
        ((flat(1), flat(1), None, (0.2, 0.2)), "without the ratio"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_polarity_refuses_arguments_that_do_not_fit(arguments, told):
    with pytest.raises(ValueError, match=told):
        polarity(*arguments)


def test_flows_are_sums_of_each_branch_per_model_token():
    P = torch.tensor([[0.3, -0.1, 9.0], [nan, 0.5, nan]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    # Four model tokens, one of them NaN, which counts and flows nowhere: D+ = 0.8 / 4, D- = 0.1 / 4.
    positive, negative = branch_flows(P, mask)
    assert positive.item() == pytest.approx(0.2)
    assert negative.item() == pytest.approx(0.025)
    assert predicted_entropy_change(P, mask).item() == pytest.approx(0.175)


def test_without_a_mask_every_token_counts():
    assert predicted_entropy_change(torch.tensor([[0.5, -0.25], [0.0, 0.0]])).item() == 0.0625


def test_no_model_token_is_no_flow():
    P = torch.tensor([[nan, 1.0, -inf]])
    mask = torch.zeros_like(P, dtype=torch.bool)
    assert [x.item() for x in branch_flows(P, mask)] == [0, 0]
    assert predicted_entropy_change(P, mask).item() == 0


@given(
    st.lists(st.floats(-5, 5), min_size=1, max_size=20),
    st.integers(1, 9),
    st.sampled_from([nan, inf, -inf, 7.0]),
)
def test_padding_changes_no_flow(values, columns, garbage):
    P = torch.tensor([values], dtype=torch.float64)
    padded = torch.nn.functional.pad(P, (0, columns), value=garbage)
    mask = torch.arange(padded.shape[1])[None] < len(values)
    for flow, alone in zip(branch_flows(padded, mask), branch_flows(P), strict=True):
        torch.testing.assert_close(flow, alone, rtol=1e-13, atol=1e-15)


@pytest.mark.usefixtures("untyped")
def test_branch_flows_want_one_mask_value_a_token():
    with pytest.raises(ValueError, match=r"polarity has shape \(4,\) and the mask \(4, 1\)"):
        branch_flows(torch.ones(4), torch.ones(4, 1, dtype=torch.bool))
