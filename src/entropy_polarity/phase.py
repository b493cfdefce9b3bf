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

# Nearer to 1 a float32 weight 1 - λ would round to 0, and a branch would be silenced after all.
LAMBDA_LIMIT = 0.999

State = dict[str, Any]
Metrics = dict[str, float]


class Observation(NamedTuple):
    """One rollout batch, as a controller sees it; nats, and nats per unit of step size.

    entropy         H_k, mean entropy of the model tokens at the sampling temperature
    positive_flow   D+ = Σ_{P>0} P / N, before reweighting
    negative_flow   D- = Σ_{P<0} |P| / N, before reweighting
    """

    entropy: float
    positive_flow: float
    negative_flow: float


class Controller(NamedTuple):
    """`start` is the λ of a causal controller's first rollout, before anything was observed."""

    init: Callable[[], State]
    update: Callable[[Observation, State], tuple[float, State, Metrics]]
    causal: bool
    start: float = 0.0


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; expected a value from {low} to {high}")


def _check_gain(gain: float, lambda_max: float) -> None:
    _check_range("gain", gain, 0, math.inf)
    if not 0 <= lambda_max <= LAMBDA_LIMIT:
        raise ValueError(
            f"lambda_max is {lambda_max}; expected 0 <= lambda_max <= {LAMBDA_LIMIT}: no branch may be silenced"
        )


def _clip(value: float, bound: float) -> float:
    return 0.0 if math.isnan(value) else max(-bound, min(bound, value))


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
    _check_range("fast", fast, 1, math.inf)
    _check_range("slow", slow, fast, math.inf)

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
    if level is not None and fraction is not None:
        raise ValueError(f"reference: level={level} and fraction={fraction} were both given; give one of them")
    if level is not None and not level > 0:
        raise ValueError(f"reference: level is {level}; expected an entropy above 0 nats")
    if fraction is not None and not fraction > 0:
        raise ValueError(f"reference: fraction is {fraction}; expected a positive part of the first entropy")
    if path not in ("constant", "linear", "cosine"):
        raise ValueError(f"reference: path is {path!r}; expected 'constant', 'linear' or 'cosine'")
    if path != "constant" and horizon < 1:
        raise ValueError(f"reference: path {path!r} needs horizon >= 1 rollouts, got {horizon}")

    def init() -> State:
        return {"k": 0, "first_entropy": None}

    def update(observed: Observation, state: State) -> tuple[float, State, Metrics]:
        if not math.isfinite(observed.entropy):
            return 0.0, state | {"k": state["k"] + 1}, {}
        first = observed.entropy if state["first_entropy"] is None else state["first_entropy"]
        end = level if level is not None else first * (1.0 if fraction is None else fraction)
        done = 1.0 if path == "constant" else min(1.0, state["k"] / horizon)
        if path == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        target = first + (end - first) * done
        lam = _clip(gain * (target - observed.entropy) / max(target, 1e-12), lambda_max)
        return lam, {"k": state["k"] + 1, "first_entropy": first}, {"polarity/entropy_reference": target}

    return Controller(init, update, causal=True)


def balance(lambda_max: float = 0.8) -> Controller:
    """Zero predicted net flow on this very batch: λ = clip((D- - D+) / (D- + D+), ±lambda_max).

    From D+ (1 + λ) = D- (1 - λ). With one branch empty there is nothing to balance: λ = 0. Batch.
    Source: ours; without the clip it is OPEFO's rule (arXiv 2605.11491).

    >>> round(balance().update(Observation(1.0, 0.1, 0.3), {})[0], 6)
    0.5
    """
    _check_gain(0.0, lambda_max)

    def update(observed: Observation, state: State) -> tuple[float, State, Metrics]:
        positive, negative = observed.positive_flow, observed.negative_flow
        if min(positive, negative) <= 0:
            return 0.0, state, {}
        return _clip((negative - positive) / (negative + positive), lambda_max), state, {}

    return Controller(dict, update, causal=False)


CONTROLLERS: dict[str, Callable[..., Controller]] = {
    "trend": trend,
    "reference": reference,
    "balance": balance,
    "constant": constant,
}
