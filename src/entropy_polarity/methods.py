"""The table of methods: a name, and the documented chain of transforms behind it.

To add one: write its transform, write a builder here whose arguments are its settings, add a row to METHODS.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from entropy_polarity import phase
from entropy_polarity._errors import check_settings, unknown_name
from entropy_polarity.transforms import Transform, identity, monitored, polarity_weights


@dataclass(frozen=True)
class Method:
    """A row of the table: `build(**settings)` gives the transform.

    `decides` says from what: "every token" from its own facts, in the training pass itself; "whole batch" from all
    tokens of the rollout, in one more pass without gradient. `controllers` are the builders that the setting
    "controller" chooses from.
    """

    name: str
    summary: str
    decides: str
    source: str
    build: Callable[..., Transform]
    controllers: dict[str, Callable[..., Any]] = field(default_factory=dict)


def grpo() -> Transform:
    """Plain GRPO: every polarity metric is logged, nothing is changed. arXiv 2402.03300."""
    return identity()


def papo(
    controller: str = "trend", soft_sign: float = 0.0, conserve: bool = False, **controller_settings: Any
) -> Transform:
    """PAPO, A' = A (1 + λ_k s): see `polarity_weights`; `controller_settings` are those of `phase.<controller>`.

    arXiv 2605.11775; the weighting rule and the controllers are our reconstruction.
    """
    if controller not in phase.CONTROLLERS:
        raise unknown_name("controller", controller, phase.CONTROLLERS)
    build = phase.CONTROLLERS[controller]
    owner = f"papo's controller {controller!r}"
    check_settings(owner, build, controller_settings, "controller", "soft_sign", "conserve")
    return polarity_weights(build(**controller_settings), soft_sign, conserve)


METHODS = {
    method.name: method
    for method in (
        Method(
            "grpo",
            "plain GRPO; logs every polarity metric, changes nothing",
            "every token",
            "arXiv 2402.03300",
            grpo,
        ),
        Method(
            "papo",
            "reweights expanding and contracting tokens, steered by the entropy trajectory",
            "every token (balance, conserve: whole batch)",
            "arXiv 2605.11775; rule and controllers are our reconstruction",
            papo,
            phase.CONTROLLERS,
        ),
    )
}


def make_transform(name: str, settings: dict[str, Any] | None = None) -> Transform:
    """The transform of the method `name`, monitored. Unknown names and settings raise ValueError.

    >>> make_transform("papo", {"controller": "balance"}).local is None   # needs the whole batch
    True
    """
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    build, settings = METHODS[name].build, settings or {}
    parameters = inspect.signature(build).parameters.values()
    named = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    open_ended = len(named) < len(parameters)  # the rest is the controller's, and checked with it
    check_settings(f"method {name!r}", build, {k: v for k, v in settings.items() if k in named or not open_ended})
    return monitored(build(**settings))


def describe_methods() -> list[dict[str, Any]]:
    """The table as plain data."""
    return [
        {
            "name": method.name,
            "summary": method.summary,
            "decides": method.decides,
            "source": method.source,
            "settings": _defaults(method.build),
            "controllers": {name: _defaults(build) for name, build in method.controllers.items()},
        }
        for method in METHODS.values()
    ]


def _defaults(build: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(build).parameters.values()
    return {
        p.name: "required" if p.default is p.empty else p.default for p in parameters if p.kind is not p.VAR_KEYWORD
    }
