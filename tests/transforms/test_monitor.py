"""The metrics of a batch, by hand: beside a method that changes nothing, that weighs, that drops; turn by turn."""

import math
from dataclasses import replace

import pytest
import torch
from batches import literal, run
from cases import constant_papo, hand_made, method

from entropy_polarity.transforms import Monitor
from entropy_polarity.transforms.monitor import by_turn, turns_of

nan, inf = math.nan, math.inf


def test_metrics_of_two_rollouts_by_hand():
    # P = A T = 0.2, -0.1, 0 (T = NaN counts, flows nowhere), and a masked token that does not count: N = 3.
    batch = literal(
        mask=[[1, 1], [1, 0]],
        advantages=[[1.0, 1.0], [-1.0, -1.0]],
        entropy=[[0.6, 0.9], [0.3, 50.0]],
        sensitivity=[[0.2, -0.1], [nan, nan]],
    )
    monitor = Monitor()
    metrics = monitor.measure(batch, batch)
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
    assert monitor.entropy == pytest.approx(0.6)
    metrics = monitor.measure(later, later)
    assert monitor.entropy == metrics["polarity/entropy"]
    changed = {"polarity/entropy": 0.3, "polarity/realised_entropy_change": -0.3}
    assert metrics == pytest.approx(expected | changed)
    # λ = -0.5: expansion is halved and contraction 1.5-fold, the flows are those before: 0.1 - 0.15.
    _, _, metrics = run(constant_papo(-0.5), batch, monitor=Monitor())
    changed = {
        "polarity/lambda": -0.5,
        "polarity/changed_fraction": 2 / 3,
        "polarity/predicted_entropy_change": -0.05 / 3,
    }
    assert metrics == pytest.approx(expected | changed)


def test_a_monitor_goes_on_from_the_entropy_it_is_given():
    batch = hand_made([1.0], [0.1], entropy=0.5)
    assert Monitor(0.75).measure(batch, batch)["polarity/realised_entropy_change"] == -0.25
    assert "polarity/realised_entropy_change" not in Monitor().measure(batch, batch)


@pytest.mark.parametrize("broken", ["no tokens", "no entropy"])
def test_a_batch_without_an_entropy_is_not_compared_with(broken):
    good = hand_made([1.0, -1.0], [0.1, 0.1], entropy=0.5)
    bad = good.of_responses(torch.tensor([], dtype=torch.long))
    bad = bad if broken == "no tokens" else replace(good, entropy=torch.tensor([nan, nan]))
    monitor = Monitor()
    metrics = monitor.measure(bad, bad)
    assert math.isnan(metrics["polarity/entropy"])
    assert monitor.entropy is None
    monitor.measure(good, good)
    assert math.isnan(monitor.measure(bad, bad)["polarity/realised_entropy_change"])
    assert monitor.entropy == 0.5
    assert Monitor(0.25).measure(good, good)["polarity/realised_entropy_change"] == 0.25


def test_metrics_of_a_method_that_drops_tokens_are_of_all_of_them():
    # P = 0.1, -0.2, -0.1, 0.2. The first is dropped, the third gets a term in the loss, the others stay as they are.
    batch = hand_made([1.0, 2.0, -1.0, -2.0], [0.1, -0.1, 0.1, -0.1], entropy=0.5)
    after = batch.select(torch.tensor([False, True, True, True]))
    after = replace(after, ratio_penalty=torch.tensor([0.0, 0.3, 0.0]))
    metrics = Monitor().measure(batch, after)
    assert metrics["polarity/entropy"] == 0.5
    assert metrics["polarity/positive_flow"] == pytest.approx(0.3 / 4)
    assert metrics["polarity/negative_flow"] == pytest.approx(0.3 / 4)
    assert metrics["polarity/positive_fraction"] == 0.5
    assert metrics["polarity/changed_fraction"] == 0.5
    # -0.2 - 0.1 + 0.2, as the mean over the three that are left
    assert metrics["polarity/predicted_entropy_change"] == pytest.approx(-0.1 / 3)


def test_a_term_of_zero_changes_no_token():
    batch = hand_made([1.0, 1.0, 1.0, 1.0], [0.1] * 4)
    after = replace(batch, entropy_bonus=torch.tensor([0.0, 0.1, 0.0, -0.1]))
    assert Monitor().measure(batch, after)["polarity/changed_fraction"] == 0.5
    nothing = run(method("entropy_bonus", coefficient=0.0), batch, monitor=Monitor())[2]
    assert nothing["polarity/changed_fraction"] == 0


def test_the_methods_own_metrics_stand_over_those_of_the_monitor():
    batch = hand_made([1.0], [0.1])
    assert run(method("grpo"), batch, monitor=Monitor())[2]["polarity/lambda"] == 0
    assert run(constant_papo(0.5), batch, monitor=Monitor())[2]["polarity/lambda"] == 0.5


def test_tokens_that_are_no_number_are_counted():
    batch = hand_made([1.0, 1.0, 1.0, 1.0], [0.1, nan, inf, -inf])
    assert Monitor().measure(batch, batch)["polarity/nonfinite_tokens"] == 3


def test_a_gap_in_positions_starts_a_turn_and_so_does_the_next_response():
    mask = [[1, 1, 0, 1, 0, 0, 1], [0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0, 1]]
    tokens = literal(mask=mask, advantages=[[0.0] * 7] * 4)
    assert turns_of(tokens).tolist() == [0, 0, 1, 2, 0, 0, 0, 0, 1, 2, 3]
    # A response that ends at position 2 and one that begins at 3 are two; one that begins late is in its first turn.
    tokens = literal(mask=[[1, 1, 1, 0, 0], [0, 0, 0, 1, 1]], advantages=[[0.0] * 5] * 2)
    assert turns_of(tokens).tolist() == [0] * 5
    assert turns_of(tokens.of_responses(torch.tensor([1, 0, 1]))).tolist() == [0] * 7
    assert turns_of(tokens.of_responses(torch.tensor([], dtype=torch.long))).tolist() == []


def test_metrics_of_each_turn_by_hand():
    mask = [[1, 1, 0, 1, 0, 0], [1, 0, 0, 1, 1, 1], [1, 0, 0, 0, 0, 0]]
    numbers = torch.arange(18.0).reshape(3, 6).tolist()
    tokens = literal(
        mask=mask, advantages=[[1.0] * 6, [-1.0] * 6, [2.0] * 6], entropy=numbers, sensitivity=[[0.5] * 6] * 3
    )
    assert tokens.entropy.tolist() == [0, 1, 3, 6, 9, 10, 11, 12]
    # A is 1 and -1 there; the last token of the second response is dropped, and a dropped token presses nothing.
    after = replace(tokens, advantages=tokens.advantages * torch.tensor([1, 1, 1.5, 1, 0, 1, 1, 1]))
    after = after.select(tokens.entropy != 11)
    found = by_turn(tokens, after)
    assert found["polarity/entropy_turn_1"] == pytest.approx((0 + 1 + 6 + 12) / 4)
    assert found["polarity/entropy_turn_2"] == pytest.approx((3 + 9 + 10 + 11) / 4)
    assert found["polarity/positive_flow_turn_1"] == pytest.approx((0.5 + 0.5 + 1.0) / 4)
    assert found["polarity/negative_flow_turn_1"] == pytest.approx(0.5 / 4)
    assert found["polarity/positive_flow_turn_2"] == pytest.approx(0.5 / 4)
    assert found["polarity/negative_flow_turn_2"] == pytest.approx(1.5 / 4)
    assert found["polarity/pressure_turn_1"] == 1.0
    assert found["polarity/pressure_turn_2"] == pytest.approx((1.5 + 0 + 1) / 4)
    assert len(found) == 8
    assert found.items() <= Monitor().measure(tokens, after).items()
    single = tokens.of_responses(torch.tensor([2]))
    assert by_turn(single, single) == {}, "one turn is the whole"
    none = tokens.of_responses(torch.tensor([], dtype=torch.long))
    assert by_turn(none, none) == {}


def test_a_turn_without_advantages_has_pressure_one_and_one_without_entropy_none():
    tokens = literal(
        mask=[[1, 0, 1]], advantages=[[1.0, 0.0, 0.0]], entropy=[[0.5, nan, nan]], sensitivity=[[0.1, 0.1, nan]]
    )
    after = tokens.select(tokens.advantages == 0)
    found = by_turn(tokens, after)
    assert found["polarity/pressure_turn_1"] == 0
    assert found["polarity/pressure_turn_2"] == 1
    assert found["polarity/positive_flow_turn_2"] == found["polarity/negative_flow_turn_2"] == 0
    assert math.isnan(found["polarity/entropy_turn_2"])
