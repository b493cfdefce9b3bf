"""The methods that are put together here: plain GRPO, and PAPO with its controllers.

Torch is loaded when a transform is built, so that a wrong setting of PAPO is answered at once.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from entropy_polarity.controllers import CONTROLLERS, Controller
from entropy_polarity.support.errors import check_settings, unknown_name

if TYPE_CHECKING:
    from entropy_polarity.transforms import Transform


def parameters_of(build: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The named parameters of a builder, which are a method's settings; without an open `**settings`."""
    parameters = inspect.signature(build).parameters
    return {name: parameter for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD}


def controller_of(settings: Mapping[str, Any]) -> str:
    """The name of PAPO's controller with these settings."""
    return settings.get("controller", parameters_of(papo)["controller"].default)


def make_controller(name: str, settings: Mapping[str, Any]) -> Controller:
    """The controller of PAPO called `name`. Raises ValueError for what it does not take, and says which one does."""
    if name not in CONTROLLERS:
        raise unknown_name("controller", name, CONTROLLERS)
    owner = f"papo's controller {name!r}"
    takers = {other: parameters_of(build) for other, build in CONTROLLERS.items()}
    for setting in settings:
        others = [other for other, taken in takers.items() if setting in taken]
        if setting not in takers[name] and others:
            taken = ", ".join(takers[name])
            raise ValueError(f"{setting!r} is no setting of {owner} ({taken}), but of controller {', '.join(others)}")
    check_settings(owner, CONTROLLERS[name], settings, *parameters_of(papo))
    return CONTROLLERS[name](**settings)


def grpo() -> "Transform":
    """Plain GRPO: logs every polarity metric, changes nothing."""
    from entropy_polarity.transforms import identity

    return identity()


def papo(
    controller: str = "reference",
    soft_sign: float = 0.0,
    conserve: bool = False,
    sign_from: Literal["local", "exact", "shuffled"] = "local",
    every: int = 1,
    **controller_settings: Any,
) -> "Transform":
    """PAPO: weighs expanding tokens 1 + λ and contracting ones 1 - λ, λ steered by the entropy trajectory; by default
    along a line to 0.6 of the first entropy, there after 50 rollouts.

    A' = A (1 + λ_k s): see `polarity_weights`; `controller_settings` are those of `controllers.<controller>`.
    `sign_from` says whose sign s is: "local", that of T, which sees a token's own state alone; "exact", that of T*,
    what the token does to the whole rollout's mean entropy through shared parameters, made on every `every`-th rollout
    for about one backward and two forward passes over it (the rollouts between use T; experimental); "shuffled", an
    ablation.
    Source: arXiv 2605.11775; the weighting rule and the controllers are our reconstruction, "exact" is ours.
    """
    if every < 1 or (every > 1 and sign_from != "exact"):
        raise ValueError(
            f"papo: every is {every}, sign_from {sign_from!r}; expected a whole number of rollouts from 1 up, and 1 "
            "unless sign_from is 'exact'"
        )
    law = make_controller(controller, controller_settings)
    from entropy_polarity.transforms.weights import (
        exact_where_known,
        polarity_weights,
        shuffled_signs,
        with_sensitivity,
    )

    weights = polarity_weights(law, soft_sign, conserve)
    if sign_from == "exact":
        return with_sensitivity(weights, exact_where_known, exact_every=every)
    return with_sensitivity(weights, shuffled_signs, "sample_id") if sign_from == "shuffled" else weights
