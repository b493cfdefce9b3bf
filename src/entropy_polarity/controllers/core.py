"""What a controller is and observes, the ranges of its settings, and the path of the entropy that some follow."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from entropy_polarity.support.errors import check_range

State = dict[str, Any]
Metrics = dict[str, float]
Path = Literal["constant", "linear", "cosine"]

# The largest |λ|. Nearer to 1 a float32 weight 1 - λ would round to 0, and a branch would be silenced after all.
LAMBDA_LIMIT = 0.999

# The lowest and the highest value of each setting.
RANGES = {
    "gain": (0.0, math.inf),
    "lambda_": (-LAMBDA_LIMIT, LAMBDA_LIMIT),
    "lambda_max": (0.0, LAMBDA_LIMIT),
    "fast": (1.0, math.inf),
    "memory": (0.0, 0.99),
}


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


def check_ranges(owner: str, **settings: float) -> None:
    """Raise ValueError for a setting outside its range; `slow` must be at least `fast`."""
    for name, value in settings.items():
        check_range(owner, name, value, *((settings["fast"],) if name == "slow" else RANGES[name]))


def entropy_path(
    owner: str, level: float | None, fraction: float | None, path: Path, horizon: int
) -> Callable[[float, float], float]:
    """H_ref(k, H_0): the entropy wanted at rollout k, in nats, where H_0 is that of the first.

    It ends at `level` nats, or at `fraction` of H_0; with neither it ends at H_0. `path` "linear" and "cosine" lead
    there from H_0 over `horizon` rollouts; "constant" is there from the start. Raises ValueError for both ends at once,
    for an end that is not positive, for another path, and for a horizon below 1 where one is needed.
    """
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
