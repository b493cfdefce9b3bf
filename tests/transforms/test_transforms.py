"""Transforms decide once per rollout batch: no split, padding or save changes what they decide."""

import json
import math
from dataclasses import fields, replace

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from entropy_polarity import controllers
from entropy_polarity.methods import make_transform
from entropy_polarity.methods.description import describe_methods
from entropy_polarity.tokens import Tokens, concatenate, masked_mean
from entropy_polarity.transforms import (
    Transform,
    chain,
    identity,
    monitored,
    observe,
    polarity_weights,
    token_polarity,
)
from entropy_polarity.transforms.weights import polarity_sign

nan, inf = math.nan, math.inf
CAUSAL_SETTINGS = {
    "trend": {"gain": 1.0},
    "reference": {"level": 0.4, "gain": 0.3},
    "constant": {"lambda_": 0.3},
}
METHOD_SETTINGS = [
    ("grpo", {}),
    *(("papo", {"controller": name, **settings}) for name, settings in CAUSAL_SETTINGS.items()),
    ("papo", {"controller": "constant", "lambda_": -0.5, "soft_sign": 0.02}),
    ("papo", {"controller": "constant", "lambda_": 0.5, "conserve": True}),
    ("papo", {"controller": "balance"}),
    ("papo", {"controller": "balance", "soft_sign": 0.02, "conserve": True}),
]


def rollout(seed: int, entropy: float = 1.0, rows: int = 8, width: int = 5) -> Tokens:
    """A random rollout batch whose model tokens have about that mean entropy; every row has one at least."""
    random = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=random)

    mask = uniform(rows, width) < 0.8
    mask[:, 0] = True
    return Tokens(
        mask=mask,
        advantages=(4 * uniform(rows, 1) - 2).repeat(1, width),
        entropy=2 * entropy * uniform(rows, width),
        sensitivity=0.4 * uniform(rows, width) - 0.2,
        importance=uniform(rows, width) + 0.5,
        sample_id=torch.arange(rows),
    )


def after_three_rollouts(transform: Transform) -> controllers.State:
    state = transform.init()
    for seed, entropy in enumerate((1.0, 0.8, 0.5)):
        _, state, _ = transform.update(rollout(seed, entropy), state)
    return state


def hand_made(advantages: list[float], sensitivity: list[float], entropy: float = 1.0) -> Tokens:
    """One row, all model tokens."""
    return Tokens(
        mask=torch.ones(1, len(advantages), dtype=torch.bool),
        advantages=torch.tensor([advantages]),
        entropy=torch.full((1, len(advantages)), entropy),
        sensitivity=torch.tensor([sensitivity]),
    )


def constant_papo(lam: float, **settings) -> Transform:
    return polarity_weights(controllers.constant(lam), **settings)


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
    micro_batches = [batch.rows(slice(i, i + 8 // parts)) for i in range(0, 8, 8 // parts)]
    split = torch.cat([transform.local(part, state).advantages for part in micro_batches])
    assert split.equal(whole.advantages)
    assert not split.equal(batch.advantages)


def polarity_weight(batch, lam, soft_sign=0.0):
    """What A = 1 would become with the signs of this batch."""
    return 1 + lam * polarity_sign(batch, soft_sign)


def test_weights_by_hand():
    # P = A T = 0.1, -0.2, -0.1, 0.2: tokens that expand get 1 + λ, tokens that contract 1 - λ.
    batch = hand_made([1.0, 2.0, -1.0, -2.0], [0.1, -0.1, 0.1, -0.1])
    torch.testing.assert_close(polarity_weight(batch, 0.5), torch.tensor([[1.5, 0.5, 0.5, 1.5]]))
    # s = P / (|P| + 0.1) = 1/2, -2/3, -1/2, 2/3
    soft = torch.tensor([[1.25, 2 / 3, 0.75, 4 / 3]])
    torch.testing.assert_close(polarity_weight(batch, 0.5, soft_sign=0.1), soft)
    rewritten = constant_papo(0.5).update(batch, constant_papo(0.5).init())[0]
    torch.testing.assert_close(rewritten.advantages, torch.tensor([[1.5, 1.0, -0.5, -3.0]]))


def test_tokens_without_a_polarity_keep_their_advantage():
    batch = hand_made([1.0, 1.0, 0.0], [0.0, nan, 0.1])
    assert polarity_weight(batch, 0.9).tolist() == [[1, 1, 1]]
    assert polarity_weight(batch, 0.9, soft_sign=0.1).tolist() == [[1, 1, 1]]


def test_a_clipped_token_has_no_polarity():
    batch = replace(hand_made([1.0, 1.0], [0.1, 0.1]), importance=torch.tensor([[0.0, 1.0]]))
    assert polarity_weight(batch, 0.5).tolist() == [[1, 1.5]]


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


@given(st.integers(0, 10**6), st.floats(-0.9, 0.9), st.sampled_from([0.0, 0.05]))
def test_conserve_moves_pressure_and_adds_none(seed, lam, soft_sign):
    batch, transform = rollout(seed), constant_papo(lam, soft_sign=soft_sign, conserve=True)
    assert transform.local is None  # the sum is over the whole batch
    rewritten = transform.update(batch, transform.init())[0]
    before, after = batch.advantages[batch.mask].abs().sum(), rewritten.advantages[batch.mask].abs().sum()
    torch.testing.assert_close(after, before, rtol=1e-5, atol=0)


def test_conserve_of_a_batch_without_pressure_is_zero_not_nan():
    batch = hand_made([0.0, 0.0], [0.1, -0.1])
    rewritten = constant_papo(0.5, conserve=True).update(batch, constant_papo(0.5).init())[0]
    assert rewritten.advantages.tolist() == [[0, 0]]


def test_a_causal_lambda_is_used_on_the_next_rollout_and_a_batch_lambda_on_this_one():
    batch = hand_made([1.0, 1.0], [0.3, -0.1], entropy=0.5)
    causal = polarity_weights(controllers.reference(gain=1.0, level=1.0, path="constant"))
    first, state, metrics = causal.update(batch, causal.init())
    assert metrics["polarity/lambda"] == 0
    assert first.advantages.equal(batch.advantages)
    second, _, metrics = causal.update(batch, state)
    assert metrics["polarity/lambda"] == 0.5  # (1 - 0.5) / 1, asked for by the first rollout
    assert second.advantages.tolist() == [[1.5, 0.5]]
    now = polarity_weights(controllers.balance())
    third, _, metrics = now.update(batch, now.init())
    assert now.local is None
    assert metrics["polarity/lambda"] == pytest.approx(-0.5)  # (0.1 - 0.3) / 0.4
    torch.testing.assert_close(third.advantages, torch.tensor([[0.5, 1.5]]))


@given(st.integers(0, 10**6))
def test_balance_makes_the_predicted_entropy_change_zero(seed):
    transform, batch = make_transform("papo", {"controller": "balance", "lambda_max": 0.999}), rollout(seed)
    _, _, metrics = transform.update(batch, transform.init())
    assert min(metrics["polarity/positive_flow"], metrics["polarity/negative_flow"]) > 0
    assert abs(metrics["polarity/lambda"]) < 0.999
    total = metrics["polarity/positive_flow"] + metrics["polarity/negative_flow"]
    assert abs(metrics["polarity/predicted_entropy_change"]) <= 1e-6 * total


def test_chain_applies_in_order_and_keeps_every_state():
    def counting(change) -> Transform:
        def update(tokens, state):
            return change(tokens), {"calls": state["calls"] + 1}, {f"after {change.__name__}": float(state["calls"])}

        return Transform(lambda: {"calls": 0}, update, local=lambda tokens, state: change(tokens))

    def double(tokens):
        return replace(tokens, advantages=tokens.advantages * 2)

    def add_one(tokens):
        return replace(tokens, advantages=tokens.advantages + 1)

    batch = hand_made([3.0], [0.1])
    both = chain(counting(double), counting(add_one))
    state = both.init()
    for calls in range(2):
        rewritten, state, metrics = both.update(batch, state)
        assert rewritten.advantages.item() == 7  # not 8
        assert metrics == {"after double": calls, "after add_one": calls}
    assert list(state.values()) == [{"calls": 2}, {"calls": 2}]
    assert both.local(batch, state).advantages.item() == 7
    assert chain(counting(add_one), counting(double)).local(batch, state).advantages.item() == 8


def test_chain_is_local_if_all_its_parts_are():
    local, batch = constant_papo(0.5), polarity_weights(controllers.balance())
    assert chain(local, identity()).local
    assert chain(local, batch).local is None
    assert chain(batch, identity()).local is None
    assert monitored(chain(local, batch)).local is None


def test_an_empty_chain_is_the_identity():
    batch, nothing = rollout(0), chain()
    assert nothing.update(batch, nothing.init()) == (batch, {}, {})
    assert nothing.local(batch, {}) is batch


def test_metrics_of_two_rollouts_by_hand():
    # P = A T = 0.2, -0.1, 0 (T = NaN counts, flows nowhere), and a masked token that does not count: N = 3.
    batch = Tokens(
        mask=torch.tensor([[True, True], [True, False]]),
        advantages=torch.tensor([[1.0, 1.0], [-1.0, -1.0]]),
        entropy=torch.tensor([[0.6, 0.9], [0.3, 50.0]]),
        sensitivity=torch.tensor([[0.2, -0.1], [nan, nan]]),
    )
    plain, reweighted = make_transform("grpo"), monitored(constant_papo(-0.5))
    _, state, metrics = plain.update(batch, plain.init())
    expected = {
        "polarity/lambda": 0,
        "polarity/entropy": 0.6,
        "polarity/positive_flow": 0.2 / 3,
        "polarity/negative_flow": 0.1 / 3,
        "polarity/positive_fraction": 1 / 3,
        "polarity/changed_fraction": 0,
        "polarity/predicted_entropy_change": 0.1 / 3,
        "polarity/nonfinite_tokens": 1,
    }
    assert metrics == pytest.approx(expected)
    later = replace(batch, entropy=batch.entropy / 2)
    _, _, metrics = plain.update(later, state)
    changed = {"polarity/entropy": 0.3, "polarity/realised_entropy_change": -0.3}
    assert metrics == pytest.approx(expected | changed)
    # λ = -0.5: expansion is halved and contraction 1.5-fold, the flows are those before: 0.1 - 0.15.
    _, _, metrics = reweighted.update(batch, reweighted.init())
    changed = {
        "polarity/lambda": -0.5,
        "polarity/changed_fraction": 2 / 3,
        "polarity/predicted_entropy_change": -0.05 / 3,
    }
    assert metrics == pytest.approx(expected | changed)


def with_garbage(batch: Tokens, columns: int, rows: int, garbage: float) -> Tokens:
    """The same batch among masked columns and rows of garbage; garbage also in the tokens masked already."""

    def padded(value: torch.Tensor) -> torch.Tensor:
        dirty = torch.where(batch.mask, value, garbage)
        return torch.nn.functional.pad(dirty, (0, columns, 0, rows), value=garbage)

    columns_of = {f.name: getattr(batch, f.name) for f in fields(batch)}
    dirty = {name: padded(x) for name, x in columns_of.items() if x is not None and x.is_floating_point()}
    mask = torch.nn.functional.pad(batch.mask, (0, columns, 0, rows))
    return Tokens(mask=mask, sample_id=torch.arange(len(mask)), **dirty)


@pytest.mark.parametrize(("name", "settings"), METHOD_SETTINGS)
@hypothesis.settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(0, 4), st.integers(0, 3), st.sampled_from([nan, inf, -inf, 1e30, -3.0]))
def test_padding_and_environment_tokens_change_nothing(name, settings, seed, columns, rows, garbage):
    transform, batch = make_transform(name, settings), rollout(seed)
    dirty, state = with_garbage(batch, columns, rows, garbage), after_three_rollouts(transform)
    clean_result, clean_state, clean_metrics = transform.update(batch, state)
    dirty_result, dirty_state, dirty_metrics = transform.update(dirty, state)
    # The order of a sum over more columns may differ in its last bits.
    assert dirty_metrics == pytest.approx(clean_metrics, rel=1e-5, abs=1e-7)
    assert json.loads(json.dumps(dirty_state, allow_nan=False)).keys() == clean_state.keys()
    inside = dirty_result.advantages[: len(batch.mask), : batch.mask.shape[1]]
    expected = clean_result.advantages[batch.mask]
    torch.testing.assert_close(inside[batch.mask], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("name", "settings"), METHOD_SETTINGS)
def test_a_state_saved_as_json_continues_the_same_training(name, settings):
    transform = make_transform(name, settings)
    state = after_three_rollouts(transform)
    saved = json.loads(json.dumps(state, allow_nan=False))
    for seed in (10, 11):
        expected, state, expected_metrics = transform.update(rollout(seed, 0.7), state)
        resumed, saved, metrics = transform.update(rollout(seed, 0.7), saved)
        assert resumed.advantages.equal(expected.advantages)
        assert metrics == expected_metrics


@pytest.mark.parametrize(("name", "settings"), METHOD_SETTINGS)
def test_an_update_leaves_the_batch_it_was_given_alone(name, settings):
    transform, batch = make_transform(name, settings), rollout(4)
    before = batch.advantages.clone()
    transform.update(batch, after_three_rollouts(transform))
    assert batch.advantages.equal(before)


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("pappo", {}, "unknown method 'pappo': did you mean 'papo'[?] Known: adaptive_coefficient, clip_b"),
        ("grpo", {"gain": 1}, "unknown setting of method 'grpo' 'gain'"),
        ("papo", {"controller": "trand"}, "unknown controller 'trand': did you mean 'trend'"),
        ("papo", {"gian": 1}, "unknown setting .*'reference' 'gian': did you mean 'gain'"),
        (
            "papo",
            {"controller": "balance", "gain": 1},
            "'gain' is no setting of papo's controller 'balance' .lambda_max., but of controller trend",
        ),
        ("papo", {"controller": "constant", "lambda": 0.1}, "did you mean 'lambda_'"),
        ("papo", {"soft_sing": 0.1}, "did you mean 'soft_sign'"),
        ("papo", {"controler": "trend"}, "did you mean 'controller'"),
        ("papo", {"soft_sign": -0.1}, "soft_sign is -0.1; expected a width >= 0"),
        ("papo", {"sign_from": "exakt"}, "is 'exakt'; expected Literal"),
        ("papo", {"sign_from": "exact", "every": 0}, "every is 0"),
        ("papo", {"every": 2}, "every is 2, sign_from 'local'; expected"),
        ("papo_random_half", {"size_of": "positve"}, "is 'positve'; expected Literal"),
        ("papo", {"soft_sign": nan}, "'soft_sign' of method 'papo' is nan"),
        ("papo", {"gain": -2}, "gain is -2"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_make_transform_names_what_was_meant(name, settings, told):
    with pytest.raises(ValueError, match=told):
        make_transform(name, settings)


def test_a_method_lists_its_settings_with_their_defaults():
    rows = {row["name"]: row for row in describe_methods()}
    assert rows["papo"]["settings"] == {
        "controller": "reference",
        "soft_sign": 0.0,
        "conserve": False,
        "sign_from": "local",
        "every": 1,
    }
    assert rows["papo"]["controllers"]["balance"] == {
        "default": False,
        "decides": "whole batch",
        "settings": {"lambda_max": 0.8},
    }
    assert [name for name, row in rows["papo"]["controllers"].items() if row["default"]] == ["reference"]
    assert rows["grpo"]["settings"] == rows["grpo"]["controllers"] == {}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"controller": 5}, "setting 'controller' of method 'papo' is 5; expected str"),
        ({"gain": "high"}, "setting 'gain' of papo's controller 'reference' is 'high'; expected float"),
        ({"conserve": "no"}, "setting 'conserve' of method 'papo' is 'no'; expected bool"),
        ({"soft_sign": "x"}, "setting 'soft_sign' of method 'papo' is 'x'; expected float"),
        ({"controller": "reference", "path": "linear", "horizon": "x"}, "setting 'horizon' .* expected int"),
        ({"controller": "reference", "path": "lnear"}, "setting 'path' .* is 'lnear'; expected .*'cosine'"),
    ],
)
def test_settings_of_the_wrong_type_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        make_transform("papo", settings)


@pytest.mark.parametrize("broken", ["no model tokens", "every entropy NaN"])
@pytest.mark.parametrize("controller", [{"controller": "trend"}, {"controller": "reference", "fraction": 1.0}])
def test_a_batch_without_a_usable_token_leaves_the_controller_as_it_was(controller, broken):
    """λ = 0 after it, and the batches before and after give what they give without it."""
    good = Tokens(
        mask=torch.ones(2, 3, dtype=torch.bool), advantages=torch.tensor([[1.0] * 3, [-1.0] * 3]),
        entropy=torch.full((2, 3), 0.6), sensitivity=torch.full((2, 3), 0.1),
    )  # fmt: skip
    bad = replace(good, mask=torch.zeros_like(good.mask))
    if broken == "every entropy NaN":
        bad = replace(good, entropy=torch.full((2, 3), math.nan))
    transform = make_transform("papo", controller)
    _, state, metrics = transform.update(bad, transform.init())
    assert math.isnan(metrics["polarity/entropy"])
    assert json.loads(json.dumps(state, allow_nan=False)) == state
    _, state, metrics = transform.update(good, state)
    assert metrics["polarity/lambda"] == 0
    assert "polarity/realised_entropy_change" not in metrics  # there was no entropy before to compare with
    after = transform.update(good, state)[2]
    assert after["polarity/lambda"] == 0  # the entropy has not moved
    assert after["polarity/realised_entropy_change"] == 0


def test_facts_that_were_not_computed_are_named():
    batch = hand_made([1.0], [0.1])
    with pytest.raises(ValueError, match="facts 'sensitivity' are needed but were not computed"):
        token_polarity(replace(batch, sensitivity=None))
    with pytest.raises(ValueError, match="facts 'entropy' are needed but were not computed"):
        observe(replace(batch, entropy=None))
    assert batch.require("entropy") is batch.entropy


def test_detached_tokens_are_the_same_facts_without_gradient():
    batch = hand_made([1.0], [0.1])
    live = replace(batch, logp=torch.tensor([[-0.5]], requires_grad=True) * 2)
    assert live.detach().logp.equal(live.logp)
    assert live.logp.requires_grad
    assert not live.detach().logp.requires_grad
    assert live.detach().reward is None


@pytest.mark.parametrize(
    ("column", "told"),
    [
        ({"reward": torch.zeros(3)}, r"reward has shape \(3,\), the mask has \(2, 4\); expected \(2,\)"),
        ({"entropy": torch.zeros(1, 4)}, r"entropy has shape \(1, 4\), .* expected \(2, 4\)"),
        ({"entropy": torch.zeros(2, 3)}, "entropy"),
        (
            {"advantages": torch.zeros(2, 1)},
            "advantages",
        ),  # it would broadcast: one value a token is expected
    ],
)
@pytest.mark.usefixtures("untyped")
def test_tokens_of_different_responses_are_refused(column, told):
    columns = {"mask": torch.ones(2, 4, dtype=torch.bool), "advantages": torch.zeros(2, 4)}
    with pytest.raises(ValueError, match=told):
        Tokens(**columns | column)


def test_rows_are_the_same_facts_of_some_responses():
    batch = rollout(0)
    some = batch.rows(torch.tensor([5, 2]))
    assert some.sample_id.tolist() == [5, 2]
    assert some.entropy.equal(batch.entropy[[5, 2]])
    assert some.logp is None
    assert batch.rows(slice(2, 4)).mask.equal(batch.mask[2:4])


def test_concatenate_pads_with_masked_zeros_and_drops_what_one_part_lacks():
    long, short = rollout(0, rows=2, width=5), replace(rollout(1, rows=3, width=3), importance=None)
    joined = concatenate([short, long])
    assert joined.mask.shape == (5, 5)
    assert not joined.mask[:3, 3:].any()
    assert (joined.entropy[:3, 3:] == 0).all()
    assert joined.entropy[:3, :3].equal(short.entropy)
    assert joined.rows(slice(3, 5)).sensitivity.equal(long.sensitivity)
    assert joined.sample_id.tolist() == [0, 1, 2, 0, 1]
    assert joined.importance is None
    assert observe(joined).entropy == pytest.approx(
        torch.cat([short.entropy[short.mask], long.entropy[long.mask]]).mean().item()
    )


def test_masked_mean_ignores_what_is_masked_and_is_zero_for_nothing():
    values = torch.tensor([[1.0, nan], [4.0, inf]])
    assert masked_mean(values, torch.tensor([[True, False], [True, False]])).item() == 2.5
    assert masked_mean(values, torch.zeros(2, 2, dtype=torch.bool)).item() == 0
