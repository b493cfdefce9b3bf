"""The table of methods as plain data: what each needs, fixes and costs."""

from collections.abc import Callable
from typing import Any

from entropy_polarity.methods.builders import controller_of, parameters_of
from entropy_polarity.methods.settings import make_transform
from entropy_polarity.methods.table import METHODS
from entropy_polarity.transforms import Transform

COST = {
    "each token": "none: statistics of the training pass",
    "rewards": "none",
    "whole batch": "one forward pass over the rollout, or none where the trainer makes it for old log-probs",
}


def describe_methods() -> list[dict[str, Any]]:
    """The table as plain data; what depends on settings is that of the example."""
    return [
        {
            "name": method.name,
            "summary": method.summary,
            "source": method.source,
            **_properties(make_transform(method.name, method.example)),
            "settings": _defaults(method.build),
            "controllers": {
                name: {
                    "default": name == controller_of({}),
                    "decides": make_transform(method.name, {"controller": name}).decides_from,
                    "settings": _defaults(build),
                }
                for name, build in method.controllers.items()
            },
        }
        for method in METHODS.values()
    ]


def _properties(transform: Transform) -> dict[str, Any]:
    needs = set(transform.needs)
    needs |= {"entropy with gradient"} if transform.entropy_gradient else set()
    needs |= {"several updates on a rollout"} if transform.several_updates else set()
    return {
        "decides": transform.decides_from,
        "cost": COST[transform.decides_from],
        "needs": sorted(needs),
        "fixes": {name: value for name, value in transform.loss._asdict().items() if value is not None},
    }


def _defaults(build: Callable[..., Any]) -> dict[str, Any]:
    return {name: "required" if p.default is p.empty else p.default for name, p in parameters_of(build).items()}
