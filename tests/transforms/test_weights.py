"""PAPO, its ablations and OPEFO: what a weight is, by hand, and what no weight may do."""

import json
import math
from dataclasses import replace

import pytest
import torch
from batches import in_double, literal, run, sampled_batch, split
from cases import (
    CAUSAL_SETTINGS,
    advantages,
    after_three_rollouts,
    close,
    constant_papo,
    hand_made,
    history,
    method,
    rollout,
    without,
)
from hypothesis import given
from hypothesis import strategies as st

from entropy_polarity import controllers, token_stats
from entropy_polarity.maths import predicted_entropy_change
from entropy_polarity.methods import make_transform
from entropy_polarity.tokens import Tokens
from entropy_polarity.transforms import Monitor, chain, observe, polarity_weights, token_polarity
from entropy_polarity.transforms.weights import polarity_sign, shuffled_signs, token_flow

nan, inf = math.nan, math.inf


def test_every_causal_controller_is_tried_here():
    assert {name for name, build in controllers.CONTROLLERS.items() if build().causal} == CAUSAL_SETTINGS.keys()


@pytest.mark.parametrize("soft_sign", [0.0, 0.05])
@pytest.mark.parametrize("controller", CAUSAL_SETTINGS)
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_a_split_into_micro_batches_changes_no_bit(controller, soft_sign, parts):
    settings = {"controller": controller, "soft_sign": soft_sign, **CAUSAL_SETTINGS[controller]}
    transform, batch = make_transform("papo", settings), rollout(9)
    state = after_three_rollouts(transform)
    whole, _, metrics = transform.update(batch, state)
    assert metrics["polarity/lambda"] != 0
    assert len(split(batch, parts)) == parts
    found = torch.cat([transform.local(part, state).advantages for part in split(batch, parts)])
    assert found.equal(whole.advantages)
    assert not found.equal(batch.advantages)


def polarity_weight(batch, lam, soft_sign=0.0):
    """What A = 1 would become with the signs of this batch."""
    return 1 + lam * polarity_sign(batch, soft_sign)


def test_weights_by_hand():
    # P = A T = 0.1, -0.2, -0.1, 0.2: tokens that expand get 1 + λ, tokens that contract 1 - λ.
    batch = hand_made([1.0, 2.0, -1.0, -2.0], [0.1, -0.1, 0.1, -0.1])
    torch.testing.assert_close(polarity_weight(batch, 0.5), torch.tensor([1.5, 0.5, 0.5, 1.5]))
    # s = P / (|P| + 0.1) = 1/2, -2/3, -1/2, 2/3
    soft = torch.tensor([1.25, 2 / 3, 0.75, 4 / 3])
    torch.testing.assert_close(polarity_weight(batch, 0.5, soft_sign=0.1), soft)
    rewritten = constant_papo(0.5).update(batch, constant_papo(0.5).init())[0]
    torch.testing.assert_close(rewritten.advantages, torch.tensor([1.5, 1.0, -0.5, -3.0]))


def test_tokens_without_a_polarity_keep_their_advantage():
    batch = hand_made([1.0, 1.0, 0.0], [0.0, nan, 0.1])
    assert polarity_weight(batch, 0.9).tolist() == [1, 1, 1]
    assert polarity_weight(batch, 0.9, soft_sign=0.1).tolist() == [1, 1, 1]


def test_a_clipped_token_has_no_polarity():
    batch = replace(hand_made([1.0, 1.0], [0.1, 0.1]), importance=torch.tensor([0.0, 1.0]))
    assert polarity_weight(batch, 0.5).tolist() == [1, 1.5]


@given(st.integers(0, 10**6), st.floats(-0.99, 0.99), st.sampled_from([0.0, 1e-3, 0.1]), st.booleans())
def test_no_advantage_changes_its_sign_and_every_weight_is_positive(seed, lam, soft_sign, conserve):
    batch, transform = rollout(seed), constant_papo(lam, soft_sign=soft_sign, conserve=conserve)
    assert (polarity_weight(batch, lam, soft_sign) > 0).all()
    rewritten = transform.update(batch, transform.init())[0]
    assert rewritten.advantages.sign().equal(batch.advantages.sign())


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.05]))
def test_lambda_zero_is_the_identity_bit_for_bit(seed, soft_sign):
    batch = rollout(seed)
    for name, settings in [("grpo", {}), ("papo", {"controller": "constant", "soft_sign": soft_sign})]:
        transform = make_transform(name, settings)
        state = transform.init()
        assert transform.update(batch, state)[0].advantages.equal(batch.advantages)
        assert transform.local(batch, state).advantages.equal(batch.advantages)


@pytest.mark.parametrize("controller", controllers.CONTROLLERS)
@pytest.mark.parametrize("soft_sign", [0.0, 0.05])
def test_without_room_for_lambda_papo_changes_no_bit(controller, soft_sign):
    bound = {"lambda_": 0.0} if controller == "constant" else {"lambda_max": 0.0}
    transform = make_transform("papo", {"controller": controller, "soft_sign": soft_sign, **bound})
    for seed in range(3):
        batch = sampled_batch(seed, scale=1.0 + seed)
        assert run(transform, *history(5, 6), batch)[0].advantages.equal(batch.advantages)


@given(st.integers(0, 10**6), st.floats(-0.9, 0.9), st.sampled_from([0.0, 0.05]))
def test_conserve_moves_pressure_and_adds_none(seed, lam, soft_sign):
    batch, transform = rollout(seed), constant_papo(lam, soft_sign=soft_sign, conserve=True)
    assert transform.local is None  # the sum is over the whole batch
    rewritten = transform.update(batch, transform.init())[0]
    before, after = batch.advantages.abs().sum(), rewritten.advantages.abs().sum()
    torch.testing.assert_close(after, before, rtol=1e-5, atol=0)


def test_conserve_of_a_batch_without_pressure_is_zero_not_nan():
    batch = hand_made([0.0, 0.0], [0.1, -0.1])
    rewritten = constant_papo(0.5, conserve=True).update(batch, constant_papo(0.5).init())[0]
    assert rewritten.advantages.tolist() == [0, 0]


def test_a_causal_lambda_is_used_on_the_next_rollout_and_a_batch_lambda_on_this_one():
    batch = hand_made([1.0, 1.0], [0.3, -0.1], entropy=0.5)
    causal = polarity_weights(controllers.reference(gain=1.0, level=1.0, path="constant"))
    first, state, metrics = causal.update(batch, causal.init())
    assert metrics["polarity/lambda"] == 0
    assert first.advantages.equal(batch.advantages)
    second, _, metrics = causal.update(batch, state)
    assert metrics["polarity/lambda"] == 0.5  # (1 - 0.5) / 1, asked for by the first rollout
    assert second.advantages.tolist() == [1.5, 0.5]
    now = polarity_weights(controllers.balance())
    third, _, metrics = now.update(batch, now.init())
    assert now.local is None
    assert metrics["polarity/lambda"] == pytest.approx(-0.5)  # (0.1 - 0.3) / 0.4
    torch.testing.assert_close(third.advantages, torch.tensor([0.5, 1.5]))


@given(st.integers(0, 10**6))
def test_balance_makes_the_predicted_entropy_change_zero(seed):
    transform, batch = make_transform("papo", {"controller": "balance", "lambda_max": 0.999}), rollout(seed)
    _, _, metrics = run(transform, batch, monitor=Monitor())
    assert min(metrics["polarity/positive_flow"], metrics["polarity/negative_flow"]) > 0
    assert abs(metrics["polarity/lambda"]) < 0.999
    total = metrics["polarity/positive_flow"] + metrics["polarity/negative_flow"]
    assert abs(metrics["polarity/predicted_entropy_change"]) <= 1e-6 * total


@pytest.mark.parametrize("conserve", [False, True])
def test_balance_leaves_no_net_flow_with_a_soft_sign_either(conserve):
    batch = in_double(sampled_batch(1))
    transform = method("papo", controller="balance", soft_sign=0.05, conserve=conserve)
    result, _, metrics = run(transform, batch)
    before, after = (predicted_entropy_change(token_polarity(tokens)).item() for tokens in (batch, result))
    assert abs(metrics["polarity/lambda"]) < 0.8
    assert abs(after) < 1e-9 * abs(before)


@pytest.mark.parametrize("broken", ["no model tokens", "every entropy NaN"])
@pytest.mark.parametrize("controller", [{"controller": "trend"}, {"controller": "reference", "fraction": 1.0}])
def test_a_batch_without_a_usable_token_leaves_the_controller_as_it_was(controller, broken):
    """λ = 0 after it, and the batches before and after give what they give without it."""
    numbers = {"entropy": [[0.6] * 3] * 2, "sensitivity": [[0.1] * 3] * 2}
    good = literal(advantages=[[1.0] * 3, [-1.0] * 3], **numbers)
    bad = without(good, good.response >= 0)
    assert len(bad.advantages) == 0
    if broken == "every entropy NaN":
        bad = replace(good, entropy=torch.full((6,), math.nan))
    transform, monitor = make_transform("papo", controller), Monitor()
    _, state, metrics = run(transform, bad, monitor=monitor)
    assert math.isnan(metrics["polarity/entropy"])
    assert json.loads(json.dumps(state, allow_nan=False)) == state
    _, state, metrics = run(transform, good, state=state, monitor=monitor)
    assert metrics["polarity/lambda"] == 0
    assert "polarity/realised_entropy_change" not in metrics  # there was no entropy before to compare with
    after = run(transform, good, state=state, monitor=monitor)[2]
    assert after["polarity/lambda"] == 0  # the entropy has not moved
    assert after["polarity/realised_entropy_change"] == 0


def test_single_branches_by_hand():
    # P = 0.1, -0.2, -0.1, 0, NaN and one that the clip has killed
    batch = literal(
        advantages=[[1.0, 2.0, -1.0, 1.0, 1.0, 1.0]],
        sensitivity=[[0.1, -0.1, 0.1, 0.0, nan, 0.1]],
        importance=[[1.0, 1.0, 1.0, 1.0, 1.0, 0.0]],
    )
    assert advantages(method("papo_positive_only"), batch) == [[1, 0, 0, 0, 0, 0]]
    assert advantages(method("papo_negative_only"), batch) == [[0, 2, -1, 0, 0, 0]]


def test_a_random_half_has_the_size_of_a_branch_and_tokens_of_both():
    batch = sampled_batch(3, scale=20.0)
    sizes = {}
    for branch in ("positive", "negative"):
        kept = run(method(f"papo_{branch}_only"), batch)[0].advantages != 0
        transform = method("papo_random_half", size_of=branch)
        random, later = (run(transform, *rollouts)[0].advantages != 0 for rollouts in ([batch], [batch, batch]))
        sizes[branch] = int(kept.sum())
        assert random.sum() == later.sum() == sizes[branch]
        assert not random.equal(kept)
        assert not random.equal(later)
        other = polarity_sign(batch) == (-1 if branch == "positive" else 1)
        assert (random & other).any()
    assert sizes["positive"] != sizes["negative"]


def test_shuffled_signs_are_the_same_signs_on_other_tokens():
    batch = sampled_batch(3)
    shuffled = [replace(batch, sensitivity=shuffled_signs(batch, rollout)) for rollout in (0, 0, 1)]
    signs = [polarity_sign(tokens) for tokens in (batch, *shuffled)]
    assert signs[1].equal(signs[2])
    assert not signs[1].equal(signs[3])
    assert not signs[0].equal(signs[1])
    for sign in signs[1:]:
        assert sign.sort().values.equal(signs[0].sort().values)
    moved = signs[0] != 0
    assert 0.3 < (signs[0] == signs[1])[moved].float().mean() < 0.7  # chance
    assert token_polarity(shuffled[0]).abs().equal(token_polarity(batch).abs())


def test_shuffled_papo_weighs_by_the_shuffled_signs_and_hands_the_sensitivity_back():
    batch = sampled_batch(3)
    settings = {"controller": "constant", "lambda_": 0.5}
    found = run(method("papo", sign_from="shuffled", **settings), batch)[0]
    seen = replace(batch, sensitivity=shuffled_signs(batch, 0))
    assert found.advantages.equal(run(method("papo", **settings), seen)[0].advantages)
    assert found.sensitivity is batch.sensitivity


def test_exact_signs_are_used_where_they_are_known():
    # T says expand, T* says contract, and on the next rollout there is no T*
    local = literal(advantages=[[1.0, -1.0]], sensitivity=[[0.1, 0.1]], entropy=[[1.0, 1.0]])
    exact = replace(local, exact_sensitivity=torch.tensor([-0.3, 0.2]))
    settings = {"controller": "constant", "lambda_": 0.5}
    transform = method("papo", sign_from="exact", every=2, **settings)
    assert transform.exact_every == make_transform("papo", {"sign_from": "exact", "every": 2}).exact_every == 2
    assert advantages(transform, exact) == [[0.5, -0.5]]
    assert advantages(transform, local) == [[1.5, -0.5]]
    assert run(transform, exact)[0].sensitivity is exact.sensitivity
    assert method("papo").exact_every == 0
    twice = chain(transform, method("papo", sign_from="exact", every=3), method("grpo"))
    assert twice.exact_every == 1  # every second and every third rollout


def test_opefos_estimate_meets_the_textbooks_check_and_the_polarity_the_exact_value():
    """p = (0.8, 0.2), A = (0.2, -0.8), expectations over p, with H = 0.500402 and log p_v + H = (0.277259, -1.109035).

    d = -A (1 - p)² (log p + H) = (-0.2 · 0.04 · 0.277259, 0.8 · 0.64 · -1.109035) = (-0.002218, -0.567826), and
    0.8 · -0.002218 + 0.2 · -0.567826 = -0.115340. The exact first order is E[A T] = -E[A S], as E[A] = 0:
    S = p (log p + H) = (0.221807, -0.221807), and -(0.8 · 0.2 + 0.2 · 0.8) · 0.221807 = -0.070978.
    """
    p, A = torch.tensor([0.8, 0.2]).double(), torch.tensor([0.2, -0.8]).double()
    stats = token_stats(p.log().expand(2, 2), torch.tensor([0, 1]))
    place = torch.arange(2)
    batch = Tokens(place, 0 * place, A, logp=p.log(), entropy=stats.entropy, sensitivity=stats.sensitivity)
    assert (p * token_flow(batch)).sum().item() == pytest.approx(-0.115340, abs=5e-7)
    assert (p * token_polarity(batch)).sum().item() == pytest.approx(-0.070978, abs=5e-7)


def test_opefo_by_hand():
    # Of H = log 2: p = 1/4 and A = 1: d = -9/16 (log 1/4 + log 2) = 9/16 log 2; p = 1/2: 0; p = 3/4 and A = 3:
    # d = -3/16 log 3/2. Then 1 + λ = 2 D- / (D+ + D-), 1 - λ = 2 D+ / (D+ + D-), and the third keeps its advantage.
    half, up, down = math.log(2), 9 / 16 * math.log(2), 3 / 16 * math.log(1.5)
    batch = literal(
        advantages=[[1.0, 3.0, 1.0]], logp=[[math.log(1 / 4), math.log(3 / 4), math.log(1 / 2)]], entropy=[[half] * 3]
    )
    weights = [2 * down / (up + down), 3 * 2 * up / (up + down), 1.0]
    assert advantages(method("opefo"), batch) == close([weights])
    one_sided = literal(advantages=[[1.0, -1.0]], logp=[[math.log(1 / 4), math.log(3 / 4)]], entropy=[[half] * 2])
    assert advantages(method("opefo"), one_sided) == [[1, -1]]


def test_opefo_with_the_polarity_by_hand():
    # P = 0.3, -0.1: λ = (0.1 - 0.3) / 0.4 = -1/2, and 0.3 · 1/2 = 0.1 · 3/2.
    batch = literal(advantages=[[1.0, 2.0, 1.0]], sensitivity=[[0.3, -0.05, 0.0]])
    assert advantages(method("opefo_polarity"), batch) == close([[0.5, 3.0, 1.0]])
    one_sided = literal(advantages=[[1.0, -1.0]], sensitivity=[[0.3, -0.1]])
    assert advantages(method("opefo_polarity"), one_sided) == [[1, -1]]


@pytest.mark.parametrize(("name", "flow"), [("opefo", token_flow), ("opefo_polarity", token_polarity)])
@pytest.mark.parametrize("seed", range(5))
def test_opefo_leaves_no_net_flow(seed, name, flow):
    batch = in_double(sampled_batch(seed))
    assert (batch.importance == 0).any()
    result, _, _ = run(method(name), batch)
    before, after = (predicted_entropy_change(flow(tokens)).item() for tokens in (batch, result))
    assert abs(before) > 1e-3
    assert abs(after) < 1e-15


def test_what_a_controller_sees_by_hand():
    # P = 0.1, -0.2, -0.1, 0.2; |A| = 1, 2, 1, 2: the tilt is (1 - 2 - 1 + 2) / 6 = 0, with |A| = 4 at the last 2 / 8.
    batch = hand_made([1.0, 2.0, -1.0, -2.0], [0.1, -0.1, 0.1, -0.1], entropy=0.5)
    seen = observe(batch, conserve=True)
    assert (seen.entropy, seen.positive_flow, seen.negative_flow) == pytest.approx((0.5, 0.3 / 4, 0.3 / 4))
    assert (seen.signed_flow, seen.tilt) == pytest.approx((0.6 / 4, 0))
    steep = replace(batch, advantages=torch.tensor([1.0, 2.0, -1.0, -4.0]))
    assert observe(steep, conserve=True).tilt == pytest.approx(2 / 8)
    assert observe(steep).tilt == 0
    # s = P / (|P| + 0.1) = 1/2, -2/3, -1/2, 2/3: Σ P s = 0.05 + 0.4 / 3 + 0.05 + 0.4 / 3
    assert observe(batch, soft_sign=0.1).signed_flow == pytest.approx((0.1 + 0.8 / 3) / 4)
