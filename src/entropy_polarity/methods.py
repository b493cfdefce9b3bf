"""The table of methods: a name, and the documented transform behind it.

To add one: write the function that builds its transform, whose arguments are its settings, and add a row.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from entropy_polarity import phase
from entropy_polarity._errors import check_settings, unknown_name
from entropy_polarity.transforms import Transform, identity, monitored, polarity_weights
from entropy_polarity.transforms.rewards import dapo, nsr, psr, qae, w_reinforce
from entropy_polarity.transforms.selection import clip_b, clip_cov, clip_v, kl_cov, top_entropy
from entropy_polarity.transforms.shaping import cw_grpo, entropic, entropy_advantage, gepo, stare, steer
from entropy_polarity.transforms.terms import adaptive_coefficient, entropy_bonus
from entropy_polarity.transforms.weights import (
    exact_where_known,
    one_branch,
    opefo,
    opefo_polarity,
    random_branch,
    shuffled_signs,
    with_sensitivity,
)


@dataclass(frozen=True)
class Method:
    """A row of the table: `build(**settings)` gives the transform; its docstring is the method's documentation.

    `example` has a value for every setting without default, for tests and first tries; it is nobody's
    recommendation. `controllers` are the builders that the setting "controller" chooses from.
    """

    name: str
    build: Callable[..., Transform]
    source: str
    example: dict[str, Any] = field(default_factory=dict)
    controllers: dict[str, Callable[..., Any]] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        return " ".join((inspect.getdoc(self.build) or "").split("\n\n")[0].split())


def grpo() -> Transform:
    """Plain GRPO: logs every polarity metric, changes nothing."""
    return identity()


def papo(
    controller: str = "trend",
    soft_sign: float = 0.0,
    conserve: bool = False,
    sign_from: Literal["local", "exact", "shuffled"] = "local",
    every: int = 1,
    **controller_settings: Any,
) -> Transform:
    """PAPO: weighs expanding tokens 1 + λ and contracting ones 1 - λ, λ steered by the entropy trajectory.

    A' = A (1 + λ_k s): see `polarity_weights`; `controller_settings` are those of `phase.<controller>`. `sign_from`
    says whose sign s is: "local", that of T, which sees a token's own state alone; "exact", that of T*, what the token
    does to the whole rollout's mean entropy through shared parameters, made on every `every`-th rollout for about one
    backward and two forward passes over it (the rollouts between use T); "shuffled", an ablation.
    Source: arXiv 2605.11775; the weighting rule and the controllers are our reconstruction, "exact" is ours.
    """
    if every < 1 or (every > 1 and sign_from != "exact"):
        raise ValueError(
            f"papo: every is {every}, sign_from {sign_from!r}; expected a whole number of rollouts from 1 up, and 1 "
            "unless sign_from is 'exact'"
        )
    if controller not in phase.CONTROLLERS:
        raise unknown_name("controller", controller, phase.CONTROLLERS)
    build = phase.CONTROLLERS[controller]
    owner = f"papo's controller {controller!r}"
    takers = {name: inspect.signature(other).parameters for name, other in phase.CONTROLLERS.items()}
    for setting in controller_settings:
        others = [name for name, taken in takers.items() if setting in taken]
        if setting not in takers[controller] and others:
            taken = ", ".join(takers[controller])
            raise ValueError(f"{setting!r} is no setting of {owner} ({taken}), but of controller {', '.join(others)}")
    check_settings(owner, build, controller_settings, "controller", "soft_sign", "conserve", "sign_from", "every")
    weights = polarity_weights(build(**controller_settings), soft_sign, conserve)
    if sign_from == "exact":
        return with_sensitivity(weights, exact_where_known, exact_every=every)
    return with_sensitivity(weights, shuffled_signs, "sample_id") if sign_from == "shuffled" else weights


def papo_positive_only() -> Transform:
    """Ablation: only tokens that expand entropy keep their advantage."""
    return one_branch(+1)


def papo_negative_only() -> Transform:
    """Ablation: only tokens that contract entropy keep their advantage."""
    return one_branch(-1)


def papo_random_half(size_of: Literal["positive", "negative"] = "negative", seed: int = 0) -> Transform:
    """Ablation: as many tokens as one branch has keep their advantage, drawn at random from both.

    `size_of` says which branch: the "positive" one expands entropy, the "negative" one contracts it.
    """
    return random_branch(+1 if size_of == "positive" else -1, seed)


METHODS = {
    method.name: method
    for method in (
        Method("grpo", grpo, "arXiv 2402.03300"),
        Method("dapo", dapo, "arXiv 2503.14476; without resampling"),
        Method("entropy_bonus", entropy_bonus, "folklore", {"coefficient": 0.01}),
        Method("adaptive_coefficient", adaptive_coefficient, "Skywork-OR1, arXiv 2505.22312"),
        Method("top_entropy", top_entropy, "80/20, arXiv 2506.01939"),
        Method("clip_cov", clip_cov, "arXiv 2505.22617"),
        Method("kl_cov", kl_cov, "arXiv 2505.22617"),
        Method("cw_grpo", cw_grpo, "arXiv 2605.11538, from a third-party summary"),
        Method("clip_b", clip_b, "arXiv 2602.03392"),
        Method("clip_v", clip_v, "arXiv 2602.03392"),
        Method("entropy_advantage", entropy_advantage, "arXiv 2506.14758; kappa is a guess", {"kappa": 2.0}),
        Method("w_reinforce", w_reinforce, "arXiv 2506.01347"),
        Method("nsr", nsr, "arXiv 2506.01347"),
        Method("psr", psr, "arXiv 2506.01347"),
        Method("steer", steer, "arXiv 2510.10150"),
        Method("opefo", opefo, "unresolved: arXiv 2605.11491, from third-party summaries, whose λ is not ours"),
        Method("opefo_polarity", opefo_polarity, "ours; the rule of arXiv 2605.11491 with P for its d"),
        Method("stare", stare, "arXiv 2606.19236"),
        Method(
            "entropic",
            entropic,
            "arXiv 2511.15248, not checked against its code; the threshold is a guess",
            {"probability": 0.5},
        ),
        Method(
            "gepo",
            gepo,
            "arXiv 2607.16850, from a third-party summary; width and rate are guesses",
            {"width": 1.0, "rate": 0.1},
        ),
        Method("qae", qae, "arXiv 2509.22611, from third-party summaries"),
        Method(
            "papo", papo, "arXiv 2605.11775; rule and controllers are our reconstruction", controllers=phase.CONTROLLERS
        ),
        Method("papo_positive_only", papo_positive_only, "ours"),
        Method("papo_negative_only", papo_negative_only, "ours"),
        Method("papo_random_half", papo_random_half, "ours"),
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


def make_transform(name: str, settings: dict[str, Any] | None = None) -> Transform:
    """The transform of the method `name`, monitored. Unknown names, unknown settings and missing ones raise ValueError.

    >>> make_transform("papo", {"controller": "balance"}).decides
    'whole batch'
    """
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    build, settings = METHODS[name].build, settings or {}
    parameters = inspect.signature(build).parameters.values()
    named = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    open_ended = len(named) < len(parameters)  # the rest is the controller's, and checked with it
    check_settings(f"method {name!r}", build, {k: v for k, v in settings.items() if k in named or not open_ended})
    missing = [p.name for p in parameters if p.default is p.empty and p.name in named - settings.keys()]
    if missing:
        raise ValueError(
            f"method {name!r} needs a value for {', '.join(missing)} (no published one is known): "
            f"--set method.{missing[0]}=... or method_settings={{{missing[0]!r}: ...}}"
        )
    return monitored(build(**settings))


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
                    "decides": make_transform(method.name, {"controller": name}).decides,
                    "settings": _defaults(build),
                }
                for name, build in method.controllers.items()
            },
        }
        for method in METHODS.values()
    ]


def _facts(transform: Transform) -> dict[str, Any]:
    words = {"entropy_grad": "entropy with gradient", "reuse": "several updates on a rollout"}
    return {
        "decides": transform.decides,
        "cost": COST[transform.decides],
        "needs": sorted(words.get(need, need) for need in transform.needs),
        "fixes": {name: value for name, value in transform.loss._asdict().items() if value is not None},
    }


def _defaults(build: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(build).parameters.values()
    return {
        p.name: "required" if p.default is p.empty else p.default for p in parameters if p.kind is not p.VAR_KEYWORD
    }
