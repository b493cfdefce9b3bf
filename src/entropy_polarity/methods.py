"""The table of methods: a name, and the documented chain of transforms behind it.

To add one: write its transform, write a builder here whose arguments are its settings, add a row to METHODS.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from entropy_polarity import phase
from entropy_polarity._errors import unknown_name
from entropy_polarity.transforms import Transform, identity, monitored, polarity_weights


@dataclass(frozen=True)
class Method:
    """A row of the table: `build(**settings)` gives the transform."""

    name: str
    summary: str
    source: str
    build: Callable[..., Transform]

    def settings(self) -> dict[str, Any]:
        """The builder's explicit settings with their defaults."""
        parameters = inspect.signature(self.build).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}


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
    known = inspect.signature(build).parameters
    for name in controller_settings:
        if name not in known:
            raise unknown_name(
                f"setting of papo's controller {controller!r}", name, [*known, "controller", "soft_sign", "conserve"]
            )
    return polarity_weights(build(**controller_settings), soft_sign, conserve)


METHODS = {
    method.name: method
    for method in (
        Method("grpo", "plain GRPO; logs every polarity metric, changes nothing", "arXiv 2402.03300", grpo),
        Method(
            "papo",
            "reweights expanding and contracting tokens, steered by the entropy trajectory",
            "arXiv 2605.11775; rule and controllers are our reconstruction",
            papo,
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
    parameters = inspect.signature(build).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in settings:
        if key not in parameters and not open_ended:
            raise unknown_name(f"setting of method {name!r}", key, parameters)
    return monitored(build(**settings))


def describe_methods() -> list[dict[str, Any]]:
    """The table as plain data. "every token": from the statistics of the training pass itself, at no extra pass;
    "whole batch": one more pass without gradient over each rollout batch.
    """
    return [
        {
            "name": method.name,
            "summary": method.summary,
            "source": method.source,
            "decides": "every token" if method.build().local else "whole batch",
            "settings": method.settings(),
            **({"controllers": _controllers()} if method.name == "papo" else {}),
        }
        for method in METHODS.values()
    ]


def _controllers() -> dict[str, dict[str, Any]]:
    return {
        name: {p.name: p.default for p in inspect.signature(build).parameters.values()}
        for name, build in phase.CONTROLLERS.items()
    }
