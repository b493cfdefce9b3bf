"""The thermostat: the flow it asks for is the one it gets, and a policy that answers to flows is held where asked.

The policies here are made of its own assumption: their entropy h goes by κ times the (lagging) net flow plus a drift b,
with noise on the way and 5 % of noise on every reading. The constants are the controller's defaults.
"""

import inspect
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from batches import in_double, run, sampled_batch

from entropy_polarity import controllers
from entropy_polarity.controllers import Controller, Observation, thermostat
from entropy_polarity.controllers.kalman import FLOOR, RESPONSE
from entropy_polarity.maths import branch_flows
from entropy_polarity.tokens import Tokens, mean
from entropy_polarity.transforms import Transform, observe, polarity_weights, token_polarity

nan = math.nan
NOISE = 0.05
# Mean absolute deviation of readings of a policy that stands still: that of a normal is √(2 / π) of its sd.
NOISE_ALONE = NOISE * math.sqrt(2 / math.pi)
CLIP = 0.8 - 1e-9  # where λ is at its bound, to rounding


# ---- what it asks for is what the weights do -------------------------------------------------------------


def flows(tokens: Tokens) -> tuple[float, float]:
    """Net and total predicted flow."""
    positive, negative = branch_flows(token_polarity(tokens))
    return float(positive - negative), float(positive + negative)


DEFAULT = {name: parameter.default for name, parameter in inspect.signature(thermostat).parameters.items()}


def asked_share(state: dict[str, Any], momentum: float, level: float) -> float:
    """u = (gain (level - where h will coast to) - b) / (κ + σ_κ² / κ), from the controller's state, for its defaults.

    `momentum` is that before the rollout, everything else is the state after it.
    """
    rho, (h, kappa, drift) = DEFAULT["memory"], state["mean"]
    kappa = max(kappa, FLOOR * state["first_entropy"])
    coasting = h + (state["mean"][1] * momentum + drift) * rho / (1 - rho)
    return (DEFAULT["gain"] * (level - coasting) - drift) / (kappa + state["covariance"][1][1] / kappa)


@pytest.mark.parametrize("soft_sign", [0.0, 0.02])
@pytest.mark.parametrize("conserve", [False, True])
def test_the_weights_make_the_flow_that_was_asked_for(soft_sign, conserve):
    inside = clipped = 0
    for seed in range(6):
        for level in (1.0, 1.42, 1.44, 2.0):
            transform = polarity_weights(thermostat(level=level), soft_sign, conserve)
            state = transform.init()
            for rollout in range(3):
                batch = in_double(sampled_batch(20 * seed + rollout))
                momentum = state["controller"]["momentum"]
                result, state, metrics = run(transform, batch, state=state)
                (before, total), (after, _) = flows(batch), flows(result)
                asked = asked_share(state["controller"], momentum, level) * total
                lam = metrics["polarity/lambda"]
                if abs(lam) < CLIP:
                    inside += 1
                    assert after == pytest.approx(asked, abs=1e-9 * total)
                else:
                    clipped += 1
                    assert abs(lam) == pytest.approx(0.8)
                    # As far towards what was asked as the clip goes, and not there.
                    assert (asked - after) * lam > 0
                    assert (after - before) * lam > 0
                if conserve:
                    pressure = [mean(tokens.advantages.abs()).item() for tokens in (batch, result)]
                    assert pressure[1] == pytest.approx(pressure[0], rel=1e-9)
                # What it remembers of the flow is what the clip let through.
                assert state["controller"]["momentum"] == pytest.approx(0.8 * momentum + 0.2 * after / total, abs=1e-9)
    assert inside >= 10
    assert clipped >= 10


def test_lambda_by_hand():
    # D+ = 0.1, D- = 0.3: F = -0.2, G = 0.4. A first reading on its level with no momentum asks for u = 0:
    # λ = (0 + 0.2) / (0.4 - 0) = 0.5. A reading of 0.98 at level 1: κ = σ_κ = 0.05 · 0.98, so u = 0.5 · 0.02 / 2 κ =
    # 0.102041, x = 0.4 u = 0.040816, λ = 0.240816 / 0.4 = 0.602041; with m = 0.25: λ = 0.240816 / (0.4 - 0.25 x).
    assert RESPONSE == 0.05
    for tilt, entropy, expected in ((0.0, 1.0, 0.5), (0.25, 1.0, 0.5), (0.0, 0.98, 0.602041), (0.25, 0.98, 0.617801)):
        law = thermostat(gain=0.5, level=1.0)
        lam, _, _ = law.update(Observation(entropy, 0.1, 0.3, 0.4, tilt, 0.01), law.init())
        assert lam == pytest.approx(expected, abs=1e-6)


def test_a_tilt_against_the_net_flow_does_not_stop_the_control():
    """P = -0.02 on twenty tokens of small advantage, 0.03 on one of large: with a soft sign G < |F m|, and F m < 0."""
    advantages = torch.tensor([-0.01] * 20 + [10.0], dtype=torch.float64)
    p = torch.tensor([-0.02] * 20 + [0.03], dtype=torch.float64)
    place = torch.arange(21)
    batch = Tokens(0 * place, place, advantages, entropy=torch.ones_like(p), sensitivity=p / advantages)
    flat = polarity_weights(controllers.constant(0.5), soft_sign=1.0, conserve=True)
    assert flows(run(flat, batch)[0])[0] > flows(batch)[0] + 1e-4  # λ = 0.5 does raise the flow
    steered = polarity_weights(thermostat(level=2.0), soft_sign=1.0, conserve=True)
    assert run(steered, batch)[2]["polarity/lambda"] == pytest.approx(0.8)


@pytest.mark.parametrize("conserve", [False, True])
def test_no_lambda_where_none_could_do_anything(conserve):
    batch = in_double(sampled_batch(0))
    silent = replace(batch, advantages=torch.zeros_like(batch.advantages))
    transform = polarity_weights(thermostat(level=9.0), conserve=conserve)
    _, state, metrics = run(transform, silent)
    assert metrics["polarity/lambda"] == 0
    assert state["controller"]["momentum"] == 0
    # One branch alone: conserving, every weight is the same, whatever λ.
    lonely = replace(batch, sensitivity=batch.sensitivity.abs(), advantages=batch.advantages.abs(), importance=None)
    result, state, _ = run(transform, lonely)
    torch.testing.assert_close(result.advantages, lonely.advantages * (1 if conserve else 1.8))
    assert state["controller"]["momentum"] == pytest.approx(0.2 * (1 if conserve else 1.8))


def test_a_larger_error_of_the_reading_is_believed_less():
    def filtered(error: float) -> float:
        law = thermostat(level=1.0)
        _, state, _ = law.update(Observation(1.0, 0.1, 0.1, entropy_error=error), law.init())
        _, _, metrics = law.update(Observation(1.2, 0.1, 0.1, entropy_error=error), state)
        return metrics["polarity/entropy_filtered"]

    assert 1.0 < filtered(0.5) < filtered(0.05) < filtered(0.005) <= 1.2
    assert filtered(0.005) > 1.15
    law = thermostat(level=1.0)
    unknown, known = (Observation(1.0, 0.1, 0.1, entropy_error=error) for error in (None, 0.05))
    assert law.update(unknown, law.init()) == law.update(known, law.init())


# ---- policies that answer --------------------------------------------------------------------------------


@dataclass
class Policy:
    """h_{k+1} = h_k + κ m_{k+1} + b + noise, m_{k+1} = ρ m_k + (1 - ρ) u_k, from h_0 = 1; flows of any size."""

    kappa: float
    drift: float
    rho: float
    entropy: float = 1.0
    momentum: float = 0.0

    def observe(self, random: np.random.Generator) -> Observation:
        reading, size, share = random.standard_normal(3)
        total, natural = 0.01 * math.exp(0.3 * size), -0.2 + 0.05 * share  # the size says nothing
        positive, negative = total * (1 + natural) / 2, total * (1 - natural) / 2
        return Observation(self.entropy * (1 + NOISE * reading), positive, negative, total, 0.0, NOISE * self.entropy)

    def train(self, lam: float, observed: Observation, random: np.random.Generator) -> None:
        total = observed.positive_flow + observed.negative_flow
        net = (observed.positive_flow - observed.negative_flow + lam * total) / (1 + lam * observed.tilt)
        self.momentum = self.rho * self.momentum + (1 - self.rho) * (net / total if total > 0 else 0)
        step = self.kappa * self.momentum + self.drift + 0.003 * random.standard_normal()
        self.entropy = max(1e-3, self.entropy + step)


def trajectory(
    law: Controller,
    seed: int,
    rollouts: int,
    disturb: Callable[[int, Policy], None] = lambda k, policy: None,
    broken: dict[int, Observation] | None = None,
    **policy: float,
) -> dict[str, Any]:
    """Readings, entropies and λ of every rollout; those in `broken` are seen as given there."""
    random, subject, state = np.random.default_rng(seed), Policy(**policy), law.init()
    rows = []
    for k in range(rollouts):
        disturb(k, subject)
        observed = (broken or {}).get(k, subject.observe(random))
        lam, state, _ = law.update(observed, state)
        rows.append((observed.entropy, subject.entropy, lam))
        subject.train(lam, observed, random)
    readings, entropies, lambdas = np.array(rows).T
    return {"readings": readings, "entropy": entropies, "lambda": lambdas, "state": state}


@pytest.mark.parametrize("target", [0.8, 1.2])
@pytest.mark.parametrize("drift", [-0.01, 0.0, 0.01])
@pytest.mark.parametrize(("rho", "kappa"), [(0.8, 0.03), (0.8, 0.1), (0.8, 0.3), (0.8, 0.6), (0.0, 0.03), (0.0, 0.3)])
def test_the_entropy_is_held_where_it_is_asked(rho, kappa, drift, target):
    runs = [
        trajectory(thermostat(level=target, memory=rho), seed, 101, kappa=kappa, drift=drift, rho=rho)["readings"]
        for seed in range(10)
    ]
    off = np.array(runs)[:, 50:] / target - 1
    # Where standing still takes a third of all pressure, noise meets the clip on one side only.
    assert abs(off.mean()) < (0.03 if abs(drift) / kappa > 0.3 else 0.02)
    assert abs(off).mean() < 1.3 * NOISE_ALONE


@pytest.mark.parametrize("kappa", [0.03, 0.1, 0.3])
@pytest.mark.parametrize("rho", [0.0, 0.6, 0.9])
def test_momentum_need_not_be_known_exactly(rho, kappa):
    law, setting = thermostat(level=0.8), {"kappa": kappa, "drift": -0.005, "rho": rho}
    off = np.array([trajectory(law, seed, 101, **setting)["readings"] for seed in range(10)])[:, 50:] / 0.8 - 1
    assert abs(off.mean()) < 0.02
    assert abs(off).mean() < 1.4 * NOISE_ALONE


def test_the_error_of_a_reading_may_be_a_rough_estimate():
    """With two prompts a rollout σ is |z| times what it should be, z a standard normal: often far too small."""
    off = []
    for seed in range(30):
        rough = np.random.default_rng(100 + seed)
        law = thermostat(level=0.8)

        def update(observed: Observation, state: dict[str, Any], law=law, rough=rough) -> tuple:
            error = observed.entropy_error * abs(rough.standard_normal())
            return law.update(observed._replace(entropy_error=error), state)

        found = trajectory(law._replace(update=update), seed, 101, kappa=0.3, drift=-0.003, rho=0.8)
        off.append(found["readings"][50:] / 0.8 - 1)
    assert abs(np.array(off)).mean() < 1.25 * NOISE_ALONE


def test_momentum_that_is_not_known_of_is_what_memory_is_for():
    law = thermostat(level=1.2, memory=0.0)
    runs = [trajectory(law, seed, 101, kappa=0.3, drift=0.0, rho=0.8)["readings"] for seed in range(5)]
    assert abs(np.array(runs)[:, 50:] / 1.2 - 1).mean() > 1.6 * NOISE_ALONE


def off_path(path: str) -> np.ndarray:
    """Relative distance from a path that starts at the first reading, whose noise fades on the way."""
    law = thermostat(level=0.5, path=path, horizon=80)
    runs = [trajectory(law, seed, 110, kappa=0.1, drift=-0.003, rho=0.8)["entropy"] for seed in range(20)]
    done = np.minimum(1, np.arange(110) / 80)
    return np.mean(runs, axis=0) / (1 - 0.5 * (done if path == "linear" else (1 - np.cos(np.pi * done)) / 2)) - 1


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_a_path_is_followed_without_lag(path):
    off = off_path(path)
    assert abs(off[20:]).max() < 0.04
    assert abs(off[95:]).mean() < 0.02


def disturbed(change: str) -> Callable[[int, Policy], None]:
    def at(k: int, policy: Policy) -> None:
        if k == 100:
            policy.kappa *= 2 if change == "twice the response" else 1
            policy.entropy *= {"up": 1.1, "down": 0.9}.get(change, 1)

    return at


@pytest.mark.parametrize("change", ["twice the response", "up", "down"])
@pytest.mark.parametrize("kappa", [0.03, 0.1, 0.3])
@pytest.mark.parametrize("rho", [0.8, 0.0])
def test_a_disturbance_is_made_good_within_fifteen_rollouts(rho, kappa, change):
    """Against the same policies with the same noise left in peace, in means of ten rollouts."""
    law = thermostat(level=1.2, memory=rho)
    setting = {"rollouts": 160, "kappa": kappa, "drift": -0.003, "rho": rho}
    seeds = range(10)
    moved = np.mean([trajectory(law, seed, disturb=disturbed(change), **setting)["readings"] for seed in seeds], axis=0)
    calm = np.mean([trajectory(law, seed, **setting)["readings"] for seed in seeds], axis=0)
    means = np.convolve((moved - calm)[100:] / 1.2, np.ones(10) / 10, "valid")
    assert (abs(means[:16]) < 0.02).any()
    # What the filter took for a drift is unlearnt later: a part of the jump comes back with the other sign.
    assert abs(means[15:]).max() < 0.04
    assert abs(means[45:]).max() < 0.02


@pytest.mark.parametrize("kappa", [0.03, 0.05])
@pytest.mark.parametrize("direction", [1, -1])
def test_nothing_winds_up_while_the_target_is_out_of_reach(kappa, direction):
    """For 80 rollouts full pressure does not beat the drift; then the drift is gone."""
    target = 1 + 0.1 * direction
    strongest = kappa * (0.6 if direction > 0 else -1.0)

    def relief(k: int, policy: Policy) -> None:
        if k == 80:
            policy.drift = 0.0

    setting = {"kappa": kappa, "drift": -strongest - 0.002 * direction, "rho": 0.8}
    runs = [trajectory(thermostat(level=target), seed, 160, relief, **setting) for seed in range(10)]
    assert np.mean([run["lambda"][30:80] * direction > CLIP for run in runs]) > 0.95
    off = (np.mean([run["entropy"] for run in runs], axis=0) / target - 1) * direction
    assert off[80] < -0.1
    arrival = 80 + np.flatnonzero(off[80:] > -0.02)[0]
    assert arrival < 130
    assert off[80:].max() < 0.08
    assert abs(off[arrival + 20 :]).mean() < 0.03


def test_a_new_target_is_taken_up_at_once_by_a_controller_that_was_at_its_clip():
    for seed in range(5):
        # 0.03 · 0.6 < 0.02: h falls whatever is done.
        found = trajectory(thermostat(level=3.0), seed, 60, kappa=0.03, drift=-0.02, rho=0.8)
        assert (found["lambda"][1:] > CLIP).all()
        observed = Observation(found["entropy"][-1], 0.4, 0.6, entropy_error=NOISE)
        below = thermostat(level=0.5 * found["entropy"][-1]).update(observed, found["state"])
        assert below[0] < -CLIP


# ---- what must not break it ------------------------------------------------------------------------------


BROKEN = {
    "no entropy": Observation(nan, 0.004, 0.006),
    "infinite entropy": Observation(math.inf, 0.004, 0.006),
    "no flow": Observation(1.0, 0.0, 0.0, 0.0, 0.0, 0.05),
    "one branch": Observation(1.0, 0.0, 0.01, 0.01, 0.0, 0.05),
    "one branch, conserving": Observation(1.0, 0.0, 0.01, 0.01, -1.0, 0.05),
    "tiny flows": Observation(1.0, 4e-310, 6e-310, 1e-309, 0.0, 0.05),
    "no entropy at all": Observation(0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "no error": Observation(1.0, 0.004, 0.006, 0.01, 0.0, 0.0),
    "a huge error": Observation(1.0, 0.004, 0.006, 0.01, 0.0, 1e9),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rollouts_in_mid_run_are_forgotten(name):
    assert_held(dict.fromkeys((20, 40, 41), BROKEN[name]))


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.filterwarnings("error")
def test_a_broken_first_rollout_is_forgotten(name):
    assert_held({0: BROKEN[name]})


def assert_held(broken: dict[int, Observation]) -> None:
    ends = []
    for seed in range(10):
        found = trajectory(thermostat(level=0.8), seed, 101, broken=broken, kappa=0.1, drift=-0.003, rho=0.8)
        json.dumps(found["state"], allow_nan=False)
        assert (abs(found["lambda"]) <= 0.8).all()
        ends.append(found["readings"][60:] / 0.8 - 1)
    assert abs(np.mean(ends)) < 0.02
    assert abs(np.array(ends)).mean() < 1.3 * NOISE_ALONE


def test_a_collapsed_policy_does_not_break_it():
    batch = sampled_batch(0)
    collapsed = replace(batch, entropy=torch.zeros_like(batch.entropy), sensitivity=torch.zeros_like(batch.sensitivity))
    transform: Transform = polarity_weights(thermostat(level=1.0))
    state = run(transform, batch)[1]
    for _ in range(5):
        _, state, metrics = run(transform, collapsed, state=state)
        assert metrics["polarity/lambda"] == 0
        assert all(math.isfinite(value) for value in metrics.values())
    assert observe(collapsed).entropy_error == 0
    assert 0 < abs(run(transform, batch, state=state)[2]["polarity/lambda"]) <= 0.8
