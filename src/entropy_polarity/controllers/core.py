"""What a controller is, and what it observes."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

State = dict[str, Any]
Metrics = dict[str, float]


class Observation(NamedTuple):
    """One rollout batch, as a controller sees it; the entropy in nats, flows in nats per unit of step size.

    entropy         H_k, the mean entropy of the model tokens at the sampling temperature
    positive_flow   D+ = Σ_{P>0} P / N, before reweighting
    negative_flow   D- = Σ_{P<0} |P| / N, before reweighting
    signed_flow     G = Σ P s / N, what a unit of λ adds to the net flow D+ - D-; with the hard sign D+ + D-
    tilt            m = Σ |A| s / Σ |A|, what a unit of λ adds to the total pressure Σ |A|, as a share, where the
                    transform takes it back; 0 where it does not
    entropy_error   the standard error of `entropy` as an estimate of the policy's; None if it was not estimated
    """

    entropy: float
    positive_flow: float
    negative_flow: float
    signed_flow: float | None = None
    tilt: float = 0.0
    entropy_error: float | None = None


class Controller(NamedTuple):
    """A pair of pure functions (see `controllers`); `start` is the λ of a causal controller's first rollout."""

    init: Callable[[], State]
    update: Callable[[Observation, State], tuple[float, State, Metrics]]
    causal: bool
    start: float = 0.0


def clip(value: float, bound: float) -> float:
    """The value within ±bound; 0 for NaN."""
    return 0.0 if math.isnan(value) else max(-bound, min(bound, value))
