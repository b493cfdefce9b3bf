"""The plan of `papo ablate`: what is left of PAPO when a part is taken away."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from entropy_polarity.experiments.compare.plan import Plan, checked_plan
from entropy_polarity.methods import given_beside
from entropy_polarity.runs.recipe import load_recipe

# Label: method, and what the label stands for. `papo` and its shuffled twin have the settings of the recipe.
ARMS: dict[str, tuple[dict[str, Any], str]] = {
    "grpo": ({"name": "grpo"}, "both branches at their own weight, nothing steered"),
    "positive_only": (
        {"name": "papo_positive_only"},
        "only tokens whose update expands entropy: surprising ones that were rewarded, likely ones that were punished",
    ),
    "negative_only": (
        {"name": "papo_negative_only"},
        "only tokens whose update contracts entropy: likely ones that were rewarded, surprising ones that were "
        "punished",
    ),
    "random_as_positive": (
        {"name": "papo_random_half", "size_of": "positive"},
        "as many tokens as positive_only has, at random from both branches: what fewer tokens do by themselves",
    ),
    "random_as_negative": (
        {"name": "papo_random_half", "size_of": "negative"},
        "as many tokens as negative_only has, at random from both branches",
    ),
    "steer": (
        {"name": "steer", "low": 0.5},  # the strength that its search chose: docs/results.md
        "STEER, without sign: what moves the entropy much, in either direction, weighs less",
    ),
    "papo": ({"name": "papo"}, "both branches, pressure moved between them as the entropy goes"),
    "papo_shuffled": (
        {"name": "papo", "sign_from": "shuffled"},
        "PAPO, with the signs dealt out anew among the tokens: weights by the same rule, on tokens that have nothing "
        "to do with them",
    ),
}


def ablation_plan(
    recipe: str, seeds: Sequence[int], overrides: Sequence[str] = (), say: Callable[[str], None] = warnings.warn
) -> Plan:
    """Every arm on `recipe`, whose method, where it is papo, says how PAPO is set. Raises as `load_plan`."""
    own = load_recipe(recipe, overrides, "papo", say).method
    if own["name"] != "papo":
        raise ValueError(f"method.name is {own['name']!r}: papo ablate takes PAPO apart, and sets the method itself")
    methods = {label: given_beside(own, table, say) for label, (table, _) in ARMS.items()}
    notes = {label: note for label, (_, note) in ARMS.items()}
    # The method is in the tables: an override of its settings would be one of every method.
    rest = [override for override in overrides if override.partition("=")[0].partition(".")[0].strip() != "method"]
    return checked_plan(Plan(recipe, rest, [*seeds], baselines=["grpo", "papo"], methods=methods, notes=notes))
