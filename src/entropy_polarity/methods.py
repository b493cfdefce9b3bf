"""The table of methods: a name, and the documented transform behind it.

To add one: write the function that builds its transform, whose arguments are its settings, and add a row. Torch is
loaded when a transform is built, so that a wrong name, and a wrong setting of PAPO, is answered at once.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from entropy_polarity import controllers
from entropy_polarity.support.errors import check_settings, unknown_name

if TYPE_CHECKING:
    from entropy_polarity.controllers import Controller
    from entropy_polarity.transforms import Transform


@dataclass(frozen=True)
class Method:
    """A row of the table: `build(**settings)` gives the transform; its docstring is the method's documentation.

    `home` is the module with the function of that name. `example` has a value for every setting without default, for
    tests and first tries; it is nobody's recommendation. `controllers` are the builders that the setting "controller"
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
    for about one backward and two forward passes over it (the rollouts between use T); "shuffled", an ablation.
    Source: arXiv 2605.11775; the weighting rule and the controllers are our reconstruction, "exact" is ours.
    """
    if every < 1 or (every > 1 and sign_from != "exact"):
        raise ValueError(
            f"papo: every is {every}, sign_from {sign_from!r}; expected a whole number of rollouts from 1 up, and 1 "
            "unless sign_from is 'exact'"
        )
    law = _controller(controller, controller_settings)
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


def _controller(name: str, settings: Mapping[str, Any]) -> "Controller":
    """The controller of PAPO called `name`. Raises ValueError for what it does not take, and says who does."""
    if name not in controllers.CONTROLLERS:
        raise unknown_name("controller", name, controllers.CONTROLLERS)
    owner = f"papo's controller {name!r}"
    takers = {other: _parameters(build) for other, build in controllers.CONTROLLERS.items()}
    for setting in settings:
        others = [other for other, taken in takers.items() if setting in taken]
        if setting not in takers[name] and others:
            taken = ", ".join(takers[name])
            raise ValueError(f"{setting!r} is no setting of {owner} ({taken}), but of controller {', '.join(others)}")
    check_settings(owner, controllers.CONTROLLERS[name], settings, *_named(_parameters(papo)))
    return controllers.CONTROLLERS[name](**settings)


def papo_positive_only() -> "Transform":
    """Ablation: only tokens that expand entropy keep their advantage."""
    from entropy_polarity.transforms.weights import one_branch

    return one_branch(+1)


def papo_negative_only() -> "Transform":
    """Ablation: only tokens that contract entropy keep their advantage."""
    from entropy_polarity.transforms.weights import one_branch

    return one_branch(-1)


def papo_random_half(size_of: Literal["positive", "negative"] = "negative", seed: int = 0) -> "Transform":
    """Ablation: as many tokens as one branch has keep their advantage, drawn at random from both.

    `size_of` says which branch: the "positive" one expands entropy, the "negative" one contracts it.
    """
    from entropy_polarity.transforms.weights import random_branch

    return random_branch(+1 if size_of == "positive" else -1, seed)


METHODS = {
    method.name: method
    for method in (
        Method("grpo", "methods", "arXiv 2402.03300"),
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
        Method(
            "opefo",
            "transforms.weights",
            "unresolved: arXiv 2605.11491, from third-party summaries, whose λ is not ours",
        ),
        Method("opefo_polarity", "transforms.weights", "ours; the rule of arXiv 2605.11491 with P for its d"),
        Method("stare", "transforms.shaping", "arXiv 2606.19236"),
        Method(
            "entropic",
            "transforms.shaping",
            "arXiv 2511.15248, not checked against its code; the threshold is a guess",
            {"probability": 0.5},
        ),
        Method(
            "gepo",
            "transforms.shaping",
            "arXiv 2607.16850, from a third-party summary; width and rate are guesses",
            {"width": 1.0, "rate": 0.1},
        ),
        Method("qae", "transforms.rewards", "arXiv 2509.22611, from third-party summaries"),
        Method(
            "papo",
            "methods",
            "arXiv 2605.11775; rule and controllers are our reconstruction",
            controllers=controllers.CONTROLLERS,
        ),
        Method("papo_positive_only", "methods", "ours"),
        Method("papo_negative_only", "methods", "ours"),
        Method("papo_random_half", "methods", "ours"),
    )
}


# Names that meant another rule in results made before a day.
RENAMED = {"opefo": ("opefo_polarity", "2026-11-28")}


def name_of(name: str, date: str) -> str:
    """Today's name of what was called `name` on an ISO date.

    >>> name_of("opefo", "2026-11-23T20:19:45+00:00"), name_of("grpo", "2026-11-23")
    ('opefo_polarity', 'grpo')
    """
    now, until = RENAMED.get(name, (name, ""))
    return now if date < until else name


def make_transform(name: str, settings: dict[str, Any] | None = None) -> "Transform":
    """The transform of the method `name`. Unknown names, unknown settings and missing ones raise ValueError.

    >>> make_transform("papo", {"controller": "balance"}).decides_from
    'whole batch'
    """
    check_method(name, settings)
    return METHODS[name].build(**settings or {})


def check_method(name: str, settings: Mapping[str, Any] | None = None) -> None:
    """Raise as `make_transform`, for names, types and what is missing, and for all that PAPO's controllers check.

    Torch is loaded only for settings of a method whose home is in `transforms`.
    """
    check_name(name)
    method, settings = METHODS[name], settings or {}
    if not settings and not method.example:
        return
    parameters = _parameters(method.build)
    named = _named(parameters)
    open_ended = len(named) < len(parameters)  # the rest is the controller's, and checked with it
    own = {key: value for key, value in settings.items() if key in named}
    check_settings(f"method {name!r}", method.build, own if open_ended else settings)
    missing = [key for key in named if parameters[key].default is inspect.Parameter.empty and key not in settings]
    if missing:
        raise ValueError(
            f"method {name!r} needs a value for {', '.join(missing)} (no published one is known): "
            f"--set method.{missing[0]}=... or method_settings={{{missing[0]!r}: ...}}"
        )
    if open_ended:
        _controller(_controller_of(settings), {key: value for key, value in settings.items() if key not in named})


def check_name(name: Any) -> None:
    if not isinstance(name, str) or name not in METHODS:
        raise unknown_name("method", name, METHODS)


def given_beside(
    table: Mapping[str, Any], given: Mapping[str, Any], say: Callable[[str], None], owner: str = "method"
) -> dict[str, Any]:
    """The method `table` of a recipe (its name, its settings) with what is `given` beside its name.

    What is given changes that alone. But another name takes nothing of the table along; another controller no setting
    of the one before, and `say` gets a line that names them; of `level` and `fraction`, which exclude each other, the
    given one stays, and `every` goes with sign_from "exact". `owner` is what the line calls the table. Raises
    ValueError for a name that is no method's.
    """
    name = given.get("name", table.get("name"))
    check_name(name)
    if name != table.get("name"):
        return {"name": name, **given}
    dropped: dict[str, Any] = {}
    if METHODS[name].controllers:
        before, after, own = _controller_of(table), _controller_of({**table, **given}), _named(_parameters(papo))
        if after != before:
            dropped = {key: table[key] for key in table if key not in ("name", *own)}
        if lost := [f"{key}={value!r}" for key, value in dropped.items() if key not in given]:
            verb = "is" if len(lost) == 1 else "are"
            say(
                f"{owner}.controller={after}: the recipe's {', '.join(lost)} belonged to controller {before!r} and "
                f"{verb} dropped"
            )
        for one, other in (("level", "fraction"), ("fraction", "level")):
            dropped |= {other: None} if one in given else {}
        dropped |= {"every": None} if given.get("sign_from", "exact") != "exact" else {}
    return {key: value for key, value in table.items() if key not in dropped} | dict(given)


def _controller_of(settings: Mapping[str, Any]) -> str:
    """The controller of PAPO with these settings."""
    return settings.get("controller", _parameters(papo)["controller"].default)


def _parameters(build: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(build).parameters


def _named(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    return [p.name for p in parameters.values() if p.kind is not p.VAR_KEYWORD]


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
            **_facts(make_transform(method.name, method.example)),
            "settings": _defaults(method.build),
            "controllers": {
                name: {
                    "default": name == _controller_of({}),
                    "decides": make_transform(method.name, {"controller": name}).decides_from,
                    "settings": _defaults(build),
                }
                for name, build in method.controllers.items()
            },
        }
        for method in METHODS.values()
    ]


def _facts(transform: "Transform") -> dict[str, Any]:
    words = {"entropy_grad": "entropy with gradient", "reuse": "several updates on a rollout"}
    return {
        "decides": transform.decides_from,
        "cost": COST[transform.decides_from],
        "needs": sorted(words.get(need, need) for need in transform.needs),
        "fixes": {name: value for name, value in transform.loss._asdict().items() if value is not None},
    }


def _defaults(build: Callable[..., Any]) -> dict[str, Any]:
    parameters = _parameters(build).values()
    return {
        p.name: "required" if p.default is p.empty else p.default for p in parameters if p.kind is not p.VAR_KEYWORD
    }
