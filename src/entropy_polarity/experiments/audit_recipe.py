"""What `papo audit` trains: one update a rollout, by the recipe's method or GRPO, with its optimiser or another."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from entropy_polarity.experiments.models import weights_of
from entropy_polarity.runs.consent import check_said_again
from entropy_polarity.runs.recipe import DEFAULT_RECIPE, Recipe, load_recipe, with_flags
from entropy_polarity.runs.record import CONFIG

# One update a rollout, made by the policy that sampled it.
ON_POLICY = (
    "trainer.num_iterations=1",
    "trainer.gradient_accumulation_steps=1",
    "trainer.steps_per_generation=1",
    "trainer.save_strategy=no",
)
OPTIMIZERS = {
    "adamw": ("trainer.optim=adamw_torch",),
    "sgd": ("trainer.optim=sgd", "trainer.learning_rate=0.1"),
}


def audit_recipe(
    recipe: str,
    model: str | None,
    task: str | None,
    method: str | None,
    steps: int,
    optimizer: str | None = None,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = warnings.warn,
) -> Recipe:
    """The recipe of an audit, with one update a rollout: where `model` is a run that of the run, its method included.

    `method` is GRPO where nothing says otherwise, `optimizer` the recipe's; overrides have the last word. Raises as
    `load_recipe`, and where a run names what they do not say again.
    """
    weights, trained = (None, None) if model is None else weights_of(model)
    if trained is None:
        method = method or "grpo"
    elif recipe != DEFAULT_RECIPE:
        raise ValueError(f"recipe {recipe} cannot be given with the run {model}, which has its own: leave it out")
    else:
        recipe = str(Path(str(model)) / CONFIG)
    chosen = [*ON_POLICY, *OPTIMIZERS.get(optimizer or "", ()), f"trainer.max_steps={steps}"]
    if task is not None and (trained is None or task != load_recipe(recipe).task["name"]):
        chosen.append(f"task={{name={task!r}}}")
    loaded = with_flags(load_recipe(recipe, [*chosen, *overrides], method, say), model=weights)
    if trained is not None:
        check_said_again(str(model), loaded.to_dict(), overrides)
    return loaded


def default_output(recipe: str, chosen: Recipe) -> Path:
    """The folder of an audit that was given none, named by what it audits."""
    optimizer = chosen.trainer.get("optim", "adamw").partition("_")[0]
    return Path("runs") / f"audit-{Path(recipe).stem}-{chosen.method['name']}-{optimizer}"
