"""The table of methods: a name, and the documented transform behind it.

To add one: write the function that builds its transform, whose arguments are its settings, and add a row.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from entropy_polarity.controllers import CONTROLLERS

if TYPE_CHECKING:
    from entropy_polarity.transforms import Transform


@dataclass(frozen=True)
class Method:
    """A row of the table: `build(**settings)` gives the transform; its docstring is the method's documentation.

    `home` is the module with the function of that name. `example` has a value for every setting without default, for
    tests and first tries; they are no recommendation. `controllers` are the builders that the setting "controller"
    chooses from.
    """

    name: str
    home: str
    source: str
    example: dict[str, Any] = field(default_factory=dict)
    controllers: dict[str, Callable[..., Any]] = field(default_factory=dict)

    @property
    def build(self) -> "Callable[..., Transform]":
        return getattr(import_module(f"entropy_polarity.{self.home}"), self.name)

    @property
    def summary(self) -> str:
        return " ".join((inspect.getdoc(self.build) or "").split("\n\n")[0].split())


METHODS = {
    method.name: method
    for method in (
        Method("grpo", "methods.builders", "arXiv 2402.03300"),
        Method("dapo", "transforms.rewards", "arXiv 2503.14476; without resampling"),
        Method("entropy_bonus", "transforms.terms", "folklore", {"coefficient": 0.01}),
        Method("adaptive_coefficient", "transforms.terms", "Skywork-OR1, arXiv 2505.22312"),
        Method("top_entropy", "transforms.selection", "80/20, arXiv 2506.01939"),
        Method("clip_cov", "transforms.selection", "arXiv 2505.22617"),
        Method("kl_cov", "transforms.selection", "arXiv 2505.22617"),
        Method("cw_grpo", "transforms.shaping", "arXiv 2605.11538, from a third-party summary"),
        Method("clip_b", "transforms.selection", "arXiv 2602.03392"),
        Method("clip_v", "transforms.selection", "arXiv 2602.03392"),
        Method("entropy_advantage", "transforms.shaping", "arXiv 2506.14758; kappa is a guess", {"kappa": 2.0}),
        Method("w_reinforce", "transforms.rewards", "arXiv 2506.01347"),
        Method("nsr", "transforms.rewards", "arXiv 2506.01347"),
        Method("psr", "transforms.rewards", "arXiv 2506.01347"),
        Method("steer", "transforms.shaping", "arXiv 2510.10150"),
        Method("opefo", "transforms.weights", "unresolved: arXiv 2605.11491, third-party summaries; not their λ"),
        Method("opefo_polarity", "transforms.weights", "ours; the rule of arXiv 2605.11491 with P for its d"),
        Method("stare", "transforms.shaping", "arXiv 2606.19236"),
        Method("entropic", "transforms.shaping", "arXiv 2511.15248, unchecked; p is a guess", {"probability": 0.5}),
        Method("gepo", "transforms.shaping", "arXiv 2607.16850, third-party; guesses", {"width": 1.0, "rate": 0.1}),
        Method("qae", "transforms.rewards", "arXiv 2509.22611, from third-party summaries"),
        Method(
            "papo",
            "methods.builders",
            "arXiv 2605.11775; rule and controllers are our reconstruction",
            controllers=CONTROLLERS,
        ),
        Method("papo_positive_only", "transforms.weights", "ours"),
        Method("papo_negative_only", "transforms.weights", "ours"),
        Method("papo_random_half", "transforms.weights", "ours"),
    )
}
