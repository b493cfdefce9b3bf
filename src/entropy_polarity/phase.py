"""Controllers: from the entropy trajectory to λ, the pressure moved between expansion and contraction.

A controller is a pair of pure functions. `init()` gives its state, a small dict that JSON can hold;
`update(observation, state)` gives (λ, state, metrics). λ > 0 moves pressure to the expanding tokens,
λ < 0 to the contracting ones, and |λ| <= lambda_max < 1, so that both branches stay alive.

A *causal* controller's λ is used on the next rollout batch; it needs nothing that training does not compute
anyway. A *batch* controller's λ is used on the very batch it observed.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from entropy_polarity._errors import check_range

# Nearer to 1 a float32 weight 1 - λ would round to 0, and a branch would be silenced after all.
LAMBDA_LIMIT = 0.999

State = dict[str, Any]
Metrics = dict[str, float]


class Observation(NamedTuple):
    """One rollout batch, as a controller sees it; nats, and nats per unit of step size.

    entropy         H_k, mean entropy of the model tokens at the sampling temperature
    positive_flow   D+ = Σ_{P>0} P / N, before reweighting
    negative_flow   D- = Σ_{P<0} |P| / N, before reweighting
    signed_flow     G = Σ P s / N, what a unit of λ adds to the net flow D+ - D-; with the hard sign D+ + D-
    tilt            m = Σ |A| s / Σ |A|, what a unit of λ adds to the total pressure Σ |A|, as a share, where the
                    transform takes it back; 0 where it does not
    entropy_error   standard error of `entropy` as an estimate of the policy's; None if it was not estimated
    """

    entropy: float
    positive_flow: float
    negative_flow: float
    signed_flow: float | None = None
    tilt: float = 0.0
    entropy_error: float | None = None


class Controller(NamedTuple):
    """`start` is the λ of a causal controller's first rollout, before anything was observed."""

    init: Callable[[], State]
    update: Callable[[Observation, State], tuple[float, State, Metrics]]
    causal: bool
    start: float = 0.0


def _check_gain(gain: float, lambda_max: float) -> None:
    check_range("controller", "gain", gain)
    if not 0 <= lambda_max <= LAMBDA_LIMIT:
        raise ValueError(
            f"lambda_max is {lambda_max}; expected 0 <= lambda_max <= {LAMBDA_LIMIT}: no branch may be silenced"
        )


def _clip(value: float, bound: float) -> float:
    return 0.0 if math.isnan(value) else max(-bound, min(bound, value))


def _entropy_path(
    owner: str, level: float | None, fraction: float | None, path: str, horizon: int
) -> Callable[[float, float], float]:
    """H_ref(k, H_0): the entropy wanted at rollout k."""
    if level is not None and fraction is not None:
        raise ValueError(f"{owner}: level={level} and fraction={fraction} were both given; give one of them")
    if level is not None and not level > 0:
        raise ValueError(f"{owner}: level is {level}; expected an entropy above 0 nats")
    if fraction is not None and not fraction > 0:
        raise ValueError(f"{owner}: fraction is {fraction}; expected a positive part of the first entropy")
    if path not in ("constant", "linear", "cosine"):
        raise ValueError(f"{owner}: path is {path!r}; expected 'constant', 'linear' or 'cosine'")
    if path != "constant" and horizon < 1:
        raise ValueError(f"{owner}: path {path!r} needs horizon >= 1 rollouts, got {horizon}")

    def wanted(k: float, first: float) -> float:
        end = level if level is not None else first * (1.0 if fraction is None else fraction)
        done = 1.0 if path == "constant" else min(1.0, k / horizon)
        if path == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return first + (end - first) * done

    return wanted


def constant(lambda_: float = 0.0) -> Controller:
    """λ held fixed; 0 is plain GRPO. Causal. Source: ours, for ablations.

    >>> constant(0.3).update(Observation(1.0, 0.1, 0.2), {})
    (0.3, {}, {})
    """
    if not abs(lambda_) <= LAMBDA_LIMIT:
        raise ValueError(f"lambda_ is {lambda_}; expected at most {LAMBDA_LIMIT} in size: no branch may be silenced")
    return Controller(dict, lambda observed, state: (lambda_, state, {}), causal=True, start=lambda_)


def trend(gain: float = 5.0, lambda_max: float = 0.5, fast: float = 3.0, slow: float = 20.0) -> Controller:
    """Lean against the entropy's own trend: λ = clip(gain (slow - fast) / slow, ±lambda_max).

    `fast` and `slow` are moving averages of H over about that many rollouts (rates 1 / fast and 1 / slow).
    Entropy falling: fast < slow, λ > 0, pressure moves to expansion. Causal.
    Source: the most literal reading of the abstract of arXiv 2605.11775; law and constants are our
    reconstruction.

    >>> law = trend()
    >>> _, state, _ = law.update(Observation(1.0, 0, 0), law.init())
    >>> law.update(Observation(0.8, 0, 0), state)[0] > 0
    True
    """
    _check_gain(gain, lambda_max)
    check_range("trend", "fast", fast, 1)
    check_range("trend", "slow", slow, fast)

    def init() -> State:
        return {"fast": None, "slow": None}

    def update(observed: Observation, state: State) -> tuple[float, State, Metrics]:
        h = observed.entropy
        if not math.isfinite(h):
            return 0.0, state, {}  # one broken batch must not poison the averages
        average = {
            name: h if state[name] is None else state[name] + (h - state[name]) / horizon
            for name, horizon in (("fast", fast), ("slow", slow))
        }
        drift = (average["slow"] - average["fast"]) / max(average["slow"], 1e-12)
        metrics = {"polarity/entropy_fast": average["fast"], "polarity/entropy_slow": average["slow"]}
        return _clip(gain * drift, lambda_max), average, metrics

    return Controller(init, update, causal=True)


def reference(
    gain: float = 5.0,
    lambda_max: float = 0.8,
    level: float | None = None,
    fraction: float | None = None,
    path: Literal["constant", "linear", "cosine"] = "constant",
    horizon: int = 0,
) -> Controller:
    """Hold the entropy at a reference: λ = clip(gain (H_ref(k) - H_k) / H_ref(k), ±lambda_max).

    The end of the reference is `level` nats, or `fraction` of the first rollout's entropy H_0 (give one; with
    neither it is H_0 itself). `path` "constant" is there from the start; "linear" and "cosine" go from H_0 to it
    over `horizon` rollouts and stay. Causal. Source: our reconstruction.

    >>> law = reference(gain=2.0, level=0.5)
    >>> round(law.update(Observation(0.4, 0, 0), law.init())[0], 6)
    0.4
    """
    _check_gain(gain, lambda_max)
    wanted = _entropy_path("reference", level, fraction, path, horizon)

    def init() -> State:
        return {"k": 0, "first_entropy": None}

    def update(observed: Observation, state: State) -> tuple[float, State, Metrics]:
        if not math.isfinite(observed.entropy):
            return 0.0, state | {"k": state["k"] + 1}, {}
        first = observed.entropy if state["first_entropy"] is None else state["first_entropy"]
        target = wanted(state["k"], first)
        lam = _clip(gain * (target - observed.entropy) / max(target, 1e-12), lambda_max)
        return lam, {"k": state["k"] + 1, "first_entropy": first}, {"polarity/entropy_reference": target}

    return Controller(init, update, causal=True)


def balance(lambda_max: float = 0.8) -> Controller:
    """Zero predicted net flow on this very batch: λ = clip((D- - D+) / G, ±lambda_max).

    G is what a unit of λ adds to the flow: D- + D+ with the hard sign, from D+ (1 + λ) = D- (1 - λ). With one branch
    empty there is nothing to balance: λ = 0. Batch.
    Source: ours; without the clip it is OPEFO's rule (arXiv 2605.11491).

    >>> round(balance().update(Observation(1.0, 0.1, 0.3), {})[0], 6)
    0.5
    """
    _check_gain(0.0, lambda_max)

    def update(observed: Observation, state: State) -> tuple[float, State, Metrics]:
        positive, negative = observed.positive_flow, observed.negative_flow
        if min(positive, negative) <= 0:
            return 0.0, state, {}
        per_lambda = negative + positive if observed.signed_flow is None else observed.signed_flow
        return _clip((negative - positive) / per_lambda, lambda_max) if per_lambda > 0 else 0.0, state, {}

    return Controller(dict, update, causal=False)


def thermostat(
    gain: float = 0.7,
    lambda_max: float = 0.8,
    level: float | None = None,
    fraction: float | None = None,
    path: Literal["constant", "linear", "cosine"] = "constant",
    horizon: int = 0,
    memory: float = 0.8,
) -> Controller:
    """Bring the entropy to any level or path and hold it there, learning on the way what a weight does. Batch.

    The policy's own entropy h, seen through H_k = h_k + noise (whose relative standard error is pooled over about ten
    rollouts), is taken to answer to the net flow as a share of the total flow, u = net / (D+ + D-) (an optimiser that
    normalises its step answers to the balance of the flows, not to their size), through the optimiser's momentum:

        m_{k+1} = ρ m_k + (1 - ρ) u_k        h_{k+1} = h_k + κ m_{k+1} + b

    ρ is `memory`: Adam's β1 to the power of the updates a rollout (0.81 for two), 0 for an optimiser without momentum.
    A Kalman filter estimates (h, κ, b) from the levels H_k: one-step differences carry noise several times the drift.
    κ and b may wander slowly, and κ is left alone without excitation; u_k is the flow achieved within the clip, so
    nothing winds up at it. Where momentum will carry h, c = h + (κ m + b) a with a = ρ / (1 - ρ), obeys
    c' = c + κ u + b without lag, so that is what is steered, along the path a rollouts ahead: the flow asked for goes
    with the path and removes the part `gain` of the error,

        u = (gain (H_ref(k+a) - c) + H_ref(k+a+1) - H_ref(k+a) - b) / (κ + σ_κ² / κ)
        λ = (x - F) / (G - x m_A),      x = u (D+ + D-),  F = D+ - D-,  m_A the `tilt`

    which makes the predicted net flow of the reweighted batch x, |λ| <= `lambda_max`. σ_κ, the filter's own doubt about
    κ, makes it cautious (Åström and Wittenmark, Adaptive Control). H_ref is as in `reference`. Source: ours.

    >>> law = thermostat(level=0.5)
    >>> lam, state, _ = law.update(Observation(0.3, 0.1, 0.1, entropy_error=0.01), law.init())
    >>> lam > 0
    True
    """
    _check_gain(gain, lambda_max)
    check_range("thermostat", "memory", memory, 0, 0.99)
    wanted = _entropy_path("thermostat", level, fraction, path, horizon)

    def init() -> State:
        return {"k": 0, "first_entropy": None, "noise": None, "momentum": 0.0, "mean": None, "covariance": None}

    def update(observed: Observation, state: State) -> tuple[float, State, Metrics]:
        if not 0 < observed.entropy < math.inf:
            return 0.0, state | {"k": state["k"] + 1}, {}
        first = observed.entropy if state["first_entropy"] is None else state["first_entropy"]
        noise = _pooled_noise(state, observed)
        # Of the filtered entropy: a reading that is low by chance must not be believed for it.
        error = math.sqrt(noise) * (observed.entropy if state["mean"] is None else max(state["mean"][0], 1e-3 * first))
        mean, covariance = _filtered(state, observed.entropy, error, first)
        entropy, response, drift = mean
        ahead = memory / (1 - memory)  # rollouts that momentum is worth
        coasting = entropy + (response * state["momentum"] + drift) * ahead
        target, following_target = (wanted(state["k"] + ahead + step, first) for step in (0, 1))
        # Cautious: dividing by a response that is small, or hardly known, would turn noise into pressure.
        uncertainty = covariance[1, 1]
        divisor = max(response, _FLOOR * first)
        divisor += uncertainty / divisor
        asked = (gain * (target - coasting) + following_target - target - drift) / divisor
        lam, flow = _lambda_for(asked, observed, lambda_max)
        metrics = {
            "polarity/entropy_reference": wanted(state["k"], first),
            "polarity/entropy_filtered": float(entropy),
            "polarity/entropy_response": float(response),
            "polarity/entropy_drift": float(drift),
        }
        following = {
            "k": state["k"] + 1,
            "first_entropy": first,
            "noise": noise,
            "momentum": memory * state["momentum"] + (1 - memory) * flow,
            "mean": mean.tolist(),
            "covariance": covariance.tolist(),
        }
        return lam, following, metrics

    return Controller(init, update, causal=False)


# What is believed before anything was seen, in parts of the first entropy: all pressure on one side moves the entropy
# by a twentieth of it in a rollout, give or take as much, and without pressure it drifts by up to a fiftieth.
# A response under the floor is taken for the floor.
_RESPONSE, _DRIFT, _FLOOR = 0.05, 0.02, 0.01
# How far the policy's entropy, the response and the drift wander in a rollout: in standard errors of the
# measurement, in parts of the response, and in standard errors.
_WANDER = (0.25, 0.03, 0.1)


def _pooled_noise(state: State, observed: Observation) -> float:
    """The relative variance of a reading: few prompts estimate it badly, so that of about ten rollouts is averaged."""
    error = observed.entropy_error
    relative = 0.05 if error is None or not error > 0 else min(1.0, error / observed.entropy)
    return relative**2 if state["noise"] is None else state["noise"] + 0.1 * (relative**2 - state["noise"])


def _filtered(state: State, entropy: float, error: float, first: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of (h, κ, b) after one more rollout: a step of the Kalman filter."""
    prior = np.array([error, _RESPONSE * first, _DRIFT * first])
    if state["mean"] is None:
        return np.array([entropy, prior[1], 0.0]), np.diag(prior**2)
    step = np.array([[1.0, state["momentum"], 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    wander = np.array(_WANDER) * [error, prior[1], error]
    mean = step @ np.array(state["mean"])
    covariance = step @ np.array(state["covariance"]) @ step.T + np.diag(wander**2)
    gain = covariance[:, 0] / (covariance[0, 0] + error**2)
    return mean + gain * (entropy - mean[0]), covariance - np.outer(gain, covariance[0])


def _lambda_for(asked: float, observed: Observation, lambda_max: float) -> tuple[float, float]:
    """The λ that makes the net flow the `asked` share of the total flow, and the share it makes within the clip."""
    total = observed.positive_flow + observed.negative_flow
    net, tilt = observed.positive_flow - observed.negative_flow, observed.tilt
    per_lambda = total if observed.signed_flow is None else observed.signed_flow
    if not per_lambda - net * tilt > 1e-9 * total:  # no flow, or none that λ could move
        return 0.0, net / total if total > 0 else 0.0
    low, high = ((net + lam * per_lambda) / (1 + lam * tilt) for lam in (-lambda_max, lambda_max))
    flow = max(low, min(high, asked * total))
    return _clip((flow - net) / (per_lambda - flow * tilt), lambda_max), flow / total


CONTROLLERS: dict[str, Callable[..., Controller]] = {
    "trend": trend,
    "reference": reference,
    "balance": balance,
    "thermostat": thermostat,
    "constant": constant,
}
