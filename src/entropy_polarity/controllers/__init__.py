"""Controllers: from the entropy trajectory to λ, the pressure moved between expansion and contraction.

A controller is a pair of pure functions. `init()` gives its state, a small dict that JSON can hold, and
`update(observation, state)` gives (λ, state, metrics). λ > 0 moves pressure to the expanding tokens, λ < 0 to the
contracting ones, and |λ| <= lambda_max < 1, so that both branches stay alive. The λ of a *causal* controller is used on
the next rollout batch; it needs nothing that training does not compute anyway. The λ of a *batch* controller is used on
the very batch that it observed.

core.py       what a controller is and observes    settings.py   the ranges of settings, and the path of the entropy
laws.py       constant, trend, reference, balance
kalman.py     thermostat: any level or path, held by a Kalman filter
"""

from collections.abc import Callable

from entropy_polarity.controllers.core import Controller, Metrics, Observation, State
from entropy_polarity.controllers.kalman import thermostat
from entropy_polarity.controllers.laws import balance, constant, reference, trend
from entropy_polarity.controllers.settings import LAMBDA_LIMIT

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
