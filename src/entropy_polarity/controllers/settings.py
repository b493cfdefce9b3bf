"""The settings of controllers: their ranges, checked here alone, and the path of the entropy that some follow."""

import math
from collections.abc import Callable
from typing import Literal

from entropy_polarity.support.errors import check_range

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

Path = Literal["constant", "linear", "cosine"]


def check_ranges(owner: str, **settings: float) -> None:
    """Raise ValueError for a setting outside its range; `slow` must be at least `fast`."""
    for name, value in settings.items():
        low, high = (settings["fast"], math.inf) if name == "slow" else RANGES[name]
        check_range(owner, name, value, low, high, ": no branch may be silenced" if name.startswith("lambda") else "")


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
