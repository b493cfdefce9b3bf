"""What a transform is, and chains of transforms."""

from dataclasses import replace

import pytest
import torch
from batches import by_row, literal, run
from cases import build, close, constant_papo, hand_made, method, rollout

from entropy_polarity import controllers
from entropy_polarity.tokens import Tokens
from entropy_polarity.transforms import LossOverrides, Monitor, Transform, chain, identity, polarity_weights
from entropy_polarity.transforms.core import reweighted, rewriting, token_by_token

nan, inf = float("nan"), float("inf")


def test_chain_applies_in_order_and_keeps_every_state():
    def counting(change) -> Transform:
        def advance(tokens, state):
            return {"calls": state["calls"] + 1}, {f"after {change.__name__}": float(state["calls"])}

        return token_by_token(lambda tokens, state: change(tokens), init=lambda: {"calls": 0}, advance=advance)

    def double(tokens):
        return replace(tokens, advantages=tokens.advantages * 2)

    def add_one(tokens):
        return replace(tokens, advantages=tokens.advantages + 1)

    batch = hand_made([3.0], [0.1])
    both = chain(counting(double), counting(add_one))
    state = both.init()
    for calls in range(2):
        assert both.advance(batch, state) == both.update(batch, state)[1:]
        rewritten, state, metrics = both.update(batch, state)
        assert rewritten.advantages.item() == 7  # not 8
        assert metrics == {"after double": calls, "after add_one": calls}
    assert list(state.values()) == [{"calls": 2}, {"calls": 2}]
    assert both.local(batch, state).advantages.item() == 7
    assert chain(counting(add_one), counting(double)).local(batch, state).advantages.item() == 8


def test_chain_is_local_if_all_its_parts_are():
    local, batch = constant_papo(0.5), polarity_weights(controllers.balance())
    assert chain(local, identity()).local
    for mixed in (chain(local, batch), chain(batch, identity()), chain(identity(), chain(local, batch))):
        assert mixed.local is mixed.advance is None


def test_an_empty_chain_is_the_identity():
    batch, nothing = rollout(0), chain()
    assert nothing.update(batch, nothing.init()) == (batch, {}, {})
    assert nothing.local(batch, {}) is batch
    assert nothing.decides_from == "each token"
    assert nothing.exact_every == 0


# Groups 7 and 3, of which 3 has equal rewards and is dropped. P = A T of the others is 0.2, -0.2, -0.1, 0.3.
DROPPED = {
    "mask": [[1, 1], [1, 1], [1, 0], [0, 1]],
    "advantages": [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [-1.0, -1.0]],
    "sensitivity": [[0.5, 0.5], [0.2, -0.2], [0.5, 0.5], [nan, -0.3]],
    "entropy": [[9.0, 9.0], [1.0, 2.0], [9.0, 9.0], [nan, 3.0]],
    "reward": [1.0, 1.0, 1.0, 0.0],
    "group": [3, 7, 3, 7],
    "sample_id": [0, 1, 2, 3],
}


def test_a_method_in_a_chain_sees_only_what_the_one_before_kept():
    seen = []

    def look(tokens: Tokens) -> Tokens:
        seen.append(tokens)
        return replace(tokens, advantages=tokens.advantages * 2)

    both = chain(method("dapo"), rewriting(look))
    result, _, _ = run(both, literal(**DROPPED))
    (second,) = seen
    assert second.response.tolist() == [1, 1, 3]
    assert second.entropy.tolist() == [1, 2, 3]
    assert second.responses == 4
    assert result.index.tolist() == [2, 3, 5]
    assert by_row(result, result.advantages) == [[], [2, 2], [], [-2]]


def test_a_chain_of_dapo_and_papo_by_hand():
    batch = literal(**DROPPED)
    both = chain(method("dapo"), method("papo", controller="balance"))
    monitor = Monitor()
    result, state, metrics = run(both, batch, monitor=monitor)
    # Of what is left P = 0.2, -0.2, 0.3: D+ = 0.5, D- = 0.2 (thirds of them), λ = (0.2 - 0.5) / 0.7 = -3/7.
    assert metrics["polarity/lambda"] == pytest.approx(-3 / 7)
    assert result.index.tolist() == [2, 3, 5]
    assert by_row(result, result.advantages) == [[], close([4 / 7, 10 / 7]), [], close([-4 / 7])]
    assert list(state) == ["0", "1"]
    assert state["1"]["lambda"] == metrics["polarity/lambda"]
    # The monitor's entropy and flows are of all six tokens; what the method left has no net flow; all six were changed.
    assert metrics["polarity/entropy"] == pytest.approx((9 + 9 + 1 + 2 + 9 + 3) / 6)
    assert metrics["polarity/positive_flow"] == pytest.approx(0.5 / 6)
    assert metrics["polarity/predicted_entropy_change"] == pytest.approx(0, abs=1e-7)
    assert metrics["polarity/changed_fraction"] == 1
    # The other way around λ is that of all tokens, whose advantages of 0 have no polarity: the same here.
    turned, _, _ = run(chain(method("papo", controller="balance"), method("dapo")), batch)
    assert turned.index.tolist() == [2, 3, 5]
    assert turned.advantages.tolist() == close(result.advantages.tolist())


def test_index_is_that_of_the_batch_after_two_methods_that_drop():
    batch = literal(**DROPPED)
    both = chain(method("psr"), method("dapo"))
    result, _, _ = run(both, batch)
    assert result.index.tolist() == [2, 3]
    assert batch.advantages[result.index].equal(result.advantages)
    assert run(chain(method("nsr"), method("dapo")), batch)[0].index.tolist() == [5]


def test_a_chain_takes_the_needs_and_the_loss_of_all():
    both = chain(method("dapo"), method("entropy_bonus", coefficient=0.1), method("papo"))
    assert both.needs == {"reward", "group", "entropy", "sensitivity"}
    assert both.loss == LossOverrides(0.2, 0.28, "token")
    assert both.entropy_gradient
    assert not both.several_updates
    assert both.decides_from == "whole batch"
    assert chain(method("psr"), method("kl_cov")).several_updates
    assert not chain(method("psr"), method("kl_cov")).entropy_gradient
    assert chain(method("psr"), method("dapo")).decides_from == "rewards"
    assert chain(method("entropy_bonus", coefficient=0.1), method("papo")).decides_from == "each token"


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        (LossOverrides(clip_low=0.2), LossOverrides(clip_low=0.3), "clip_low to 0.2, another to 0.3"),
        (LossOverrides(clip_high=inf), LossOverrides(clip_high=0.28), "clip_high to inf, another to 0.28"),
        (LossOverrides(clip_low=0.0), LossOverrides(clip_low=0.3), "clip_low to 0.0, another to 0.3"),
    ],
)
def test_two_methods_cannot_set_one_thing_of_the_loss_to_two_values(one, other, told):
    with pytest.raises(ValueError, match=f"^one sets {told}"):
        one.merge(other)
    with pytest.raises(ValueError, match=f"one sets {told}"):
        chain(rewriting(lambda tokens: tokens, loss=one), identity(), rewriting(lambda tokens: tokens, loss=other))


def test_settings_of_the_loss_that_agree_are_merged():
    both = LossOverrides(clip_low=0.2).merge(LossOverrides(clip_low=0.2, clip_high=0.3))
    assert both == LossOverrides(clip_low=0.2, clip_high=0.3)
    assert both.merge(LossOverrides()) == LossOverrides().merge(both) == both
    with pytest.raises(ValueError, match=r"clip_high to 0\.28, another to 1\.0"):
        chain(method("dapo"), method("clip_cov", clip=1.0)._replace(loss=LossOverrides(0.2, 1.0)))


@pytest.mark.parametrize(
    ("every", "often"), [((2, 3), 1), ((2, 4), 2), ((4, 6, 0), 2), ((0, 3), 3), ((5,), 5), ((0, 0), 0)]
)
def test_a_chain_has_the_exact_sensitivity_as_often_as_each_method_reads_it(every, often):
    parts = [identity()._replace(exact_every=n) for n in every]
    assert chain(*parts).exact_every == often
    for rollout_number in range(24):
        reads = any(n and rollout_number % n == 0 for n in every)
        assert not reads or rollout_number % often == 0


def test_a_weight_that_is_no_number_leaves_its_token_as_it_is():
    batch = hand_made([1.0, -2.0, 3.0, 4.0], [0.0] * 4)
    weighed = reweighted(batch, torch.tensor([nan, inf, -inf, 0.5]))
    assert weighed.advantages.tolist() == [1, -2, 3, 2]


@pytest.mark.parametrize(
    ("case", "decides_from"),
    [("papo", "each token"), ("dapo", "rewards"), ("papo balance", "whole batch"), ("steer", "whole batch")],
)
def test_what_a_transform_decides_from(case, decides_from):
    assert build(case).decides_from == decides_from
    assert Transform(dict, build(case).update, needs=frozenset({"reward", "sample_id"})).decides_from == "rewards"
