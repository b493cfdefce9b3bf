"""What a controller is, what it sees, and what several of them share."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from entropy_polarity.support.errors import check_range

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


def check_gain(gain: float, lambda_max: float) -> None:
    check_range("controller", "gain", gain)
    if not 0 <= lambda_max <= LAMBDA_LIMIT:
        raise ValueError(
            f"lambda_max is {lambda_max}; expected 0 <= lambda_max <= {LAMBDA_LIMIT}: no branch may be silenced"
        )


def clip(value: float, bound: float) -> float:
    return 0.0 if math.isnan(value) else max(-bound, min(bound, value))


def entropy_path(
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
