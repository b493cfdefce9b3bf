"""Controllers: from the entropy trajectory to λ, the pressure moved between expansion and contraction.

A controller is a pair of pure functions. `init()` gives its state, a small dict that JSON can hold;
`update(observation, state)` gives (λ, state, metrics). λ > 0 moves pressure to the expanding tokens,
λ < 0 to the contracting ones, and |λ| <= lambda_max < 1, so that both branches stay alive.

A *causal* controller's λ is used on the next rollout batch; it needs nothing that training does not compute
anyway. A *batch* controller's λ is used on the very batch it observed.

core         what a controller is and sees        laws         constant, trend, reference, balance
thermostat   any level or path, learning on the way what a weight does
"""

from collections.abc import Callable

from entropy_polarity.controllers.core import LAMBDA_LIMIT, Controller, Metrics, Observation, State
from entropy_polarity.controllers.kalman import thermostat
from entropy_polarity.controllers.laws import balance, constant, reference, trend

__all__ = [
    "CONTROLLERS",
    "LAMBDA_LIMIT",
    "Controller",
    "Metrics",
    "Observation",
    "State",
    "balance",
    "constant",
    "reference",
    "thermostat",
    "trend",
]

CONTROLLERS: dict[str, Callable[..., Controller]] = {
    "trend": trend,
    "reference": reference,
    "balance": balance,
    "thermostat": thermostat,
    "constant": constant,
}
