"""The simple laws: λ held fixed, against the trend, towards a reference, and to balanced flows."""

import math

from entropy_polarity.controllers.core import Controller, Metrics, Observation, State, clip
from entropy_polarity.controllers.settings import Path, check_ranges, entropy_path

# Where `reference` leads the entropy by default, as a part of the first: to 0.35 nats of the embedded policy's 0.59.
FRACTION = 0.6


def constant(lambda_: float = 0.0) -> Controller:
    """λ held fixed; 0 is plain GRPO. Causal. Source: ours, for ablations.

    >>> constant(0.3).update(Observation(1.0, 0.1, 0.2), {})
    (0.3, {}, {})
    """
    check_ranges("constant", lambda_=lambda_)
    return Controller(dict, lambda observed, state: (lambda_, state, {}), causal=True, start=lambda_)


def trend(gain: float = 5.0, lambda_max: float = 0.5, fast: float = 3.0, slow: float = 20.0) -> Controller:
    """Lean against the entropy's own trend: λ = clip(gain (slow - fast) / slow, ±lambda_max).

    `fast` and `slow` are moving averages of H over about that many rollouts (rates 1 / fast and 1 / slow). While the
    entropy falls, fast < slow, so λ > 0 and pressure moves to expansion. Causal. Source: the most literal reading of
    the abstract of arXiv 2605.11775; law and constants are our reconstruction.

    >>> law = trend()
    >>> _, state, _ = law.update(Observation(1.0, 0, 0), law.init())
    >>> law.update(Observation(0.8, 0, 0), state)[0] > 0
    True
    """
    check_ranges("trend", gain=gain, lambda_max=lambda_max, fast=fast, slow=slow)

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
        return clip(gain * drift, lambda_max), average, metrics

    return Controller(lambda: {"fast": None, "slow": None}, update, causal=True)


def reference(
    gain: float = 5.0,
    lambda_max: float = 0.8,
    level: float | None = None,
    fraction: float | None = None,
    path: Path = "linear",
    horizon: int = 50,
) -> Controller:
    """Lead the entropy to a level and hold it there: λ = clip(gain (H_ref(k) - H_k) / H_ref(k), ±lambda_max).

    The reference ends at `level` nats, or at `fraction` of the first rollout's entropy H_0 (give one; with neither it
    is 0.6 H_0). `path` "linear" and "cosine" lead from H_0 to it over `horizon` rollouts and stay; "constant" is there
    from the start, whatever the horizon. Causal. Source: our reconstruction.

    >>> law = reference(gain=2.0, level=0.5, path="constant")
    >>> round(law.update(Observation(0.4, 0, 0), law.init())[0], 6)
    0.4
    """
    if level is None and fraction is None:
        fraction = FRACTION
    check_ranges("reference", gain=gain, lambda_max=lambda_max)
    wanted = entropy_path("reference", level, fraction, path, horizon)

    def update(observed: Observation, state: State) -> tuple[float, State, Metrics]:
        if not math.isfinite(observed.entropy):
            return 0.0, state | {"k": state["k"] + 1}, {}
        first = observed.entropy if state["first_entropy"] is None else state["first_entropy"]
        target = wanted(state["k"], first)
        lam = clip(gain * (target - observed.entropy) / max(target, 1e-12), lambda_max)
        return lam, {"k": state["k"] + 1, "first_entropy": first}, {"polarity/entropy_reference": target}

    return Controller(lambda: {"k": 0, "first_entropy": None}, update, causal=True)


def balance(lambda_max: float = 0.8) -> Controller:
    """Make the predicted net flow of this very batch zero: λ = clip((D- - D+) / G, ±lambda_max).

    G is what a unit of λ adds to the flow: D- + D+ with the hard sign, from D+ (1 + λ) = D- (1 - λ). With one branch
    empty there is nothing to balance: λ = 0. Batch. Source: ours; without the clip it is OPEFO's rule (arXiv
    2605.11491) with P for its d.

    >>> round(balance().update(Observation(1.0, 0.1, 0.3), {})[0], 6)
    0.5
    """
    check_ranges("balance", lambda_max=lambda_max)

    def update(observed: Observation, state: State) -> tuple[float, State, Metrics]:
        positive, negative = observed.positive_flow, observed.negative_flow
        if min(positive, negative) <= 0:
            return 0.0, state, {}
        per_lambda = negative + positive if observed.signed_flow is None else observed.signed_flow
        return clip((negative - positive) / per_lambda, lambda_max) if per_lambda > 0 else 0.0, state, {}

    return Controller(dict, update, causal=False)
