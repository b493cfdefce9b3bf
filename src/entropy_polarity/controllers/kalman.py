"""The controller `thermostat`: it holds any level or path of the entropy by a Kalman filter of its response."""

import math

import numpy as np

from entropy_polarity.controllers.core import Controller, Metrics, Observation, State, clip
from entropy_polarity.controllers.settings import Path, check_ranges, entropy_path

# The prior, in parts of the first entropy: all pressure on one side moves the entropy by a twentieth of it in a
# rollout, give or take as much, and without pressure it drifts by up to a fiftieth. A response below the floor is taken
# for the floor.
RESPONSE, DRIFT, FLOOR = 0.05, 0.02, 0.01
# How far the policy's entropy, the response and the drift wander in a rollout: in standard errors of the measurement,
# in parts of the prior response, and in standard errors.
WANDER = (0.25, 0.03, 0.1)


def thermostat(
    gain: float = 0.7,
    lambda_max: float = 0.8,
    level: float | None = None,
    fraction: float | None = None,
    path: Path = "constant",
    horizon: int = 0,
    memory: float = 0.8,
) -> Controller:
    """Bring the entropy to any level or path and hold it there, learning on the way how the policy responds. Batch.

    The policy's own entropy h is observed as H_k = h_k + noise, whose relative standard error is pooled over about ten
    rollouts. It is taken to respond to the net flow as a share of the total flow, u = net / (D+ + D-) (an optimiser
    that normalises its step responds to the balance of the flows, not to their size), through the optimiser's momentum:

        m_{k+1} = ρ m_k + (1 - ρ) u_k        h_{k+1} = h_k + κ m_{k+1} + b

    ρ is `memory`: Adam's β1 to the power of the updates per rollout (0.81 for two), 0 without momentum. A Kalman filter
    estimates (h, κ, b) from the levels H_k, since one-step differences carry noise several times the drift. κ and b may
    wander slowly, and κ is left alone without excitation; u_k is the flow achieved within the clip, so nothing winds up
    at it. The entropy that momentum will carry h to, c = h + (κ m + b) a with a = ρ / (1 - ρ), obeys c' = c + κ u + b
    without lag. It is c that is steered, along the path a rollouts ahead, to remove the part `gain` of the error:

        u = (gain (H_ref(k+a) - c) + H_ref(k+a+1) - H_ref(k+a) - b) / (κ + σ_κ² / κ)
        λ = (x - F) / (G - x m_A),      x = u (D+ + D-),  F = D+ - D-,  m_A the `tilt`

    which makes the predicted net flow of the reweighted batch x, with |λ| <= `lambda_max`. σ_κ, the filter's own
    uncertainty about κ, makes it cautious (Åström and Wittenmark, Adaptive Control). H_ref is as in `reference`, but
    H_0 itself where neither `level` nor `fraction` is given, and constant unless `path` says otherwise. Source: ours.

    >>> law = thermostat(level=0.5)
    >>> lam, state, _ = law.update(Observation(0.3, 0.1, 0.1, entropy_error=0.01), law.init())
    >>> lam > 0
    True
    """
    check_ranges("thermostat", gain=gain, lambda_max=lambda_max, memory=memory)
    wanted = entropy_path("thermostat", level, fraction, path, horizon)

    def init() -> State:
        return {"k": 0, "first_entropy": None, "noise": None, "momentum": 0.0, "mean": None, "covariance": None}

    def update(observed: Observation, state: State) -> tuple[float, State, Metrics]:
        if not 0 < observed.entropy < math.inf:
            return 0.0, state | {"k": state["k"] + 1}, {}
        first = observed.entropy if state["first_entropy"] is None else state["first_entropy"]
        noise = _pooled_noise(state, observed)
        # Relative to the filtered entropy: a reading that is low by chance must not be trusted more for it.
        error = math.sqrt(noise) * (observed.entropy if state["mean"] is None else max(state["mean"][0], 1e-3 * first))
        mean, covariance = _filtered(state, observed.entropy, error, first)
        entropy, response, drift = mean
        ahead = memory / (1 - memory)  # the rollouts for which momentum carries on
        coasting = entropy + (response * state["momentum"] + drift) * ahead
        target, following_target = (wanted(state["k"] + ahead + step, first) for step in (0, 1))
        # Dividing by a response that is small, or hardly known, would turn noise into pressure.
        divisor = max(response, FLOOR * first)
        divisor += covariance[1, 1] / divisor
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


def _pooled_noise(state: State, observed: Observation) -> float:
    """The relative variance of a reading, averaged over about ten rollouts: a few prompts estimate it badly."""
    error = observed.entropy_error
    relative = 0.05 if error is None or not error > 0 else min(1.0, error / observed.entropy)
    return relative**2 if state["noise"] is None else state["noise"] + 0.1 * (relative**2 - state["noise"])


def _filtered(state: State, entropy: float, error: float, first: float) -> tuple[np.ndarray, np.ndarray]:
    """The mean and covariance of (h, κ, b) after one more rollout: a step of the Kalman filter."""
    prior = np.array([error, RESPONSE * first, DRIFT * first])
    if state["mean"] is None:
        return np.array([entropy, prior[1], 0.0]), np.diag(prior**2)
    step = np.array([[1.0, state["momentum"], 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    wander = np.array(WANDER) * [error, prior[1], error]
    mean = step @ np.array(state["mean"])
    covariance = step @ np.array(state["covariance"]) @ step.T + np.diag(wander**2)
    gain = covariance[:, 0] / (covariance[0, 0] + error**2)
    return mean + gain * (entropy - mean[0]), covariance - np.outer(gain, covariance[0])


def _lambda_for(asked: float, observed: Observation, lambda_max: float) -> tuple[float, float]:
    """The λ that makes the net flow the share `asked` of the total flow, and the share it reaches within the clip."""
    total = observed.positive_flow + observed.negative_flow
    net, tilt = observed.positive_flow - observed.negative_flow, observed.tilt
    per_lambda = total if observed.signed_flow is None else observed.signed_flow
    if not per_lambda - net * tilt > 1e-9 * total:  # no flow, or none that λ could move
        return 0.0, net / total if total > 0 else 0.0
    low, high = ((net + lam * per_lambda) / (1 + lam * tilt) for lam in (-lambda_max, lambda_max))
    flow = max(low, min(high, asked * total))
    return clip((flow - net) / (per_lambda - flow * tilt), lambda_max), flow / total
