"""Methods that weigh a token by what the policy thought of it, by hand."""

import math
from dataclasses import replace

import pytest
import torch
from batches import by_row, literal, run, sampled_batch
from cases import COVARYING, advantages, close, method

from entropy_polarity.tokens import Tokens


def test_cw_grpo_by_hand():
    # c = 4, 2, 0, 6: mean 3, variance (1 + 1 + 9 + 9) / 4 = 5; w = exp(-c² / 10), Σ w = 1.899543.
    found = advantages(method("cw_grpo"), literal(**COVARYING))[0]
    weights = [4 * math.exp(-x / 10) / 1.899542 for x in (16, 4, 0, 36)]
    assert found == close([2 * weights[0], 2 * weights[1], -2 * weights[2], -2 * weights[3]])


def test_cw_grpo_weighs_one_on_average():
    for seed in range(5):
        batch = sampled_batch(seed)
        batch = replace(batch, advantages=1.0 + batch.response)
        weight = run(method("cw_grpo"), batch)[0].advantages / batch.advantages
        assert weight.mean().item() == pytest.approx(1, abs=1e-6)
        assert weight.std() > 0.05


def test_entropy_advantage_by_hand():
    # A + min(0.4 H, |A| / 2)
    batch = literal(advantages=[[2.0, 2.0, -2.0, -2.0, 0.0]], entropy=[[1.0, 5.0, 1.0, 5.0, 5.0]])
    assert advantages(method("entropy_advantage", kappa=2.0), batch)[0] == close([2.4, 3.0, -1.6, -1.0, 0.0])
    assert advantages(method("entropy_advantage", kappa=4.0, alpha=0.1), batch)[0] == close([2.1, 2.5, -1.9, -1.5, 0])


def test_steer_linear_by_hand():
    # p = 1/2 and H = log 2 + 2 x make (1 - p)(log p + H) = x. |O| = |A| r |x| = 0, 1, 3, 2 · 1/2 = 1, and the
    # environment's 40 is not the largest: 1.2 - 0.4 |O| / 3.
    half, doubled = math.log(0.5), math.log(0.25)
    batch = literal(
        mask=[[1, 1, 1, 1, 0]],
        advantages=[[1.0, 1.0, -3.0, -1.0, 1.0]],
        logp=[[half] * 5],
        old_logp=[[half, half, half, doubled, half]],
        entropy=[[-half + 2 * x for x in (0.0, -1.0, 1.0, 0.5, 40.0)]],
    )
    weights = [1.2, 1.2 - 0.4 / 3, 0.8, 1.2 - 0.4 / 3]
    expected = [a * w for a, w in zip(batch.advantages.tolist(), weights, strict=True)]
    assert advantages(method("steer"), batch)[0] == close(expected)
    # k = -log 0.8 / 3: 0.8^(|O| / 3)
    weights = [1, 0.8 ** (1 / 3), 0.8, 0.8 ** (1 / 3)]
    expected = [a * w for a, w in zip(batch.advantages.tolist(), weights, strict=True)]
    assert advantages(method("steer", shape="exponential"), batch)[0] == close(expected)
    # All |O| within 0.02: k = -log 0.8 / 0.02. |O| = 0, 0.01: 1 and √0.8.
    small = literal(advantages=[[1.0, 1.0]], logp=[[half] * 2], old_logp=[[half] * 2], entropy=[[-half, -half + 0.02]])
    assert advantages(method("steer", shape="exponential"), small)[0] == close([1, math.sqrt(0.8)])


def test_stare_by_hand():
    # -log p = 3, 1, 2 where A > 0, 4, 5 where A < 0; the share is rounded up.
    batch = literal(
        mask=[[1, 1, 1, 1, 1, 0]],
        advantages=[[1.0, 1.0, 1.0, -1.0, -1.0, 1.0]],
        logp=[[-3.0, -1.0, -2.0, -4.0, -5.0, -99.0]],
        entropy=[[0.2] * 5 + [70.0]],
    )
    assert advantages(method("stare"), batch) == close([[1.1, 1, 1, -1, -1]])
    assert advantages(method("stare", fraction=0.34), batch) == close([[1.1, 1, 1.1, -1, -1]])
    assert advantages(method("stare", variant="C2", positive=2.0), batch) == close([[2, 1, 1, -1, -0.9]])
    assert advantages(method("stare", below=0.2), batch) == [batch.advantages.tolist()]  # the gate is strict
    assert run(method("stare", below=0.2), batch)[2] == {"polarity/stare_weight": 1.0}
    assert run(method("stare", positive=1.3), batch)[2] == {"polarity/stare_weight": 1.3}
    assert 0.07 * 100 == 7.000000000000001  # and no eighth token
    hundred = literal(advantages=[[1.0] * 100], logp=[[-float(i) for i in range(100)]], entropy=[[0.1] * 100])
    assert advantages(method("stare", fraction=0.07, positive=2.0), hundred)[0].count(2.0) == 7


def test_stare_adaptive_weights_move_before_they_are_used_and_keep_their_bounds():
    low = literal(advantages=[[1.0, -1.0]], logp=[[-1.0, -1.0]], entropy=[[0.2, 0.2]])
    high, even = replace(low, entropy=torch.tensor([0.4, 0.4])), replace(low, entropy=torch.tensor([0.3, 0.3]))
    transform = method("stare", variant="C2", adaptive=True, below=float(torch.tensor(0.3)))
    state, path = transform.init(), []
    for batch in (low, low, high, even, low):
        result, state, _ = run(transform, batch, state=state)
        path.append(result.advantages.tolist())
    # W = 1.11, 1.12, 1.11, 1.11, 1.12 and M = 0.89, 0.88, 0.89, 0.89, 0.88; unused where H is not below.
    assert path == close([[1.11, -0.89], [1.12, -0.88], [1, -1], [1, -1], [1.12, -0.88]])
    for batch, end in ((low, {"positive": 1.5, "negative": 0.5}), (high, {"positive": 1.0, "negative": 1.0})):
        assert run(transform, *[batch] * 60)[1] == pytest.approx(end)


def test_entropic_by_hand():
    transform = method("entropic", probability=0.5)

    def batch(entropy: float) -> Tokens:
        return literal(advantages=[[1.0, -1.0, 1.0]], logp=[[-0.5, -0.6, -0.8]], entropy=[[entropy] * 3])

    # p = 0.61, 0.55, 0.45. e = 0.2, Σ e = 0.2: a = 0.202. Then e = 0, Σ e = 0.2: 0.002. Then e = -0.1, Σ e = 0.1.
    state, found = transform.init(), []
    for entropy in (0.3, 0.1, 0.0):
        result, state, metrics = run(transform, batch(entropy), state=state)
        found.append(result.advantages.tolist())
        assert metrics["polarity/entropic_strength"] == pytest.approx({0.3: 0.202, 0.1: 0.002, 0.0: -0.099}[entropy])
    assert found == close([[1.202, -0.798, 1], [1.002, -0.998, 1], [0.901, -1.099, 1]])
    assert advantages(transform, batch(9.0)) == close([[2, 0, 1]])  # a is clipped at 1
    assert advantages(method("entropic", probability=0.5, target=9.0), batch(0.0)) == close([[0, -2, 1]])
    assert method("entropic", probability=0.5).init() == {"error_sum": 0}


def test_gepo_by_hand():
    def batch(low: float, high: float) -> Tokens:
        return literal(
            mask=[[1, 1], [1, 0], [1, 1], [1, 0]],
            advantages=[[2.0, 2.0], [-2.0, -2.0]] * 2,
            entropy=[[low - 1, low + 1], [low, 80.0], [high, high], [high, 80.0]],
            group=[4, 4, 9, 9],
        )

    # Group means 1 and 3: mean 2, sd 1; low is under 1.5, high is over 2.5.
    transform = method("gepo", width=0.5, rate=0.5)
    first, state, _ = run(transform, batch(1.0, 3.0))
    assert by_row(first, first.advantages) == close([[1, 1], [-2], [2, 2], [-0.4]])
    assert state == {"low": 1.5, "high": 2.5}
    # Means 2 and 4 move them half way to 2.5 and 3.5, to 2 and 3: 2 is not under 2.
    second, state, _ = run(transform, batch(2.0, 4.0), state=state)
    assert by_row(second, second.advantages) == close([[2, 2], [-2], [2, 2], [-0.4]])
    assert state == {"low": 2.0, "high": 3.0}
    gentle = method("gepo", width=0.5, rate=0.5, low=0.9, high=0.8)
    assert advantages(gentle, batch(1.0, 3.0)) == close([[1.8, 1.8], [-2], [2, 2], [-1.6]])
