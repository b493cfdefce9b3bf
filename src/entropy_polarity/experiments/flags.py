"""From the flags of a command to the recipe that it runs and the folder that it writes. No torch here: errors are
instant."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from entropy_polarity.experiments.models import weights_of
from entropy_polarity.runs.consent import check_said_again, stay_offline
from entropy_polarity.runs.layout import CONFIG, read_config
from entropy_polarity.runs.recipe import DEFAULT_RECIPE, Recipe, fitting, load_recipe, with_flags

Say = Callable[[str], None]
# One update per rollout, made by the policy that sampled it.
ON_POLICY = (
    "trainer.num_iterations=1",
    "trainer.gradient_accumulation_steps=1",
    "trainer.steps_per_generation=1",
    "trainer.save_strategy=no",
)
OPTIMIZERS = {"adamw": ("trainer.optim=adamw_torch",), "sgd": ("trainer.optim=sgd", "trainer.learning_rate=0.1")}


def training_recipe(
    recipe: str,
    model: str | None,
    task: str | None,
    method: str | None,
    max_steps: int | None,
    seed: int | None,
    overrides: Sequence[str] = (),
    say: Say = warnings.warn,
) -> Recipe:
    """The recipe of a training, with the flags in place of what it says. Raises as `load_recipe`."""
    chosen = load_recipe(recipe, (*_task(task), *overrides), method, say)
    return fitting(with_flags(chosen, max_steps=max_steps, seed=seed, model=model), load_recipe(recipe))


def resumed_recipe(run: Path, recipe: str, max_steps: int | None, overrides: Sequence[str], **flags: object) -> Recipe:
    """The recipe of a run to go on with, whose length alone may change. Raises ValueError for a flag that would change
    it, and for what the run names beyond itself and `overrides` do not say again."""
    given = [f"--{name}" for name, value in flags.items() if value is not None]
    if given or recipe != DEFAULT_RECIPE:
        what = ", ".join(given) or f"recipe {recipe}"
        raise ValueError(
            f"{what} cannot be given with --resume: a resumed run keeps its recipe (only --max-steps may change)"
        )
    read_config(run)
    own = load_recipe(str(run / CONFIG))
    if load_recipe(str(run / CONFIG), overrides) != own:
        raise ValueError(
            "--set with --resume can only say again what the run itself says: it keeps its recipe (only --max-steps "
            "may change)"
        )
    check_said_again(str(run), own.to_dict(), overrides)
    stay_offline(str(run), own.to_dict(), overrides)
    return with_flags(own, max_steps=max_steps)


def audit_recipe(
    recipe: str,
    model: str | None,
    task: str | None,
    method: str | None,
    steps: int,
    optimizer: str | None = None,
    overrides: Sequence[str] = (),
    say: Say = warnings.warn,
) -> Recipe:
    """The recipe of an audit, with one update per rollout; where `model` is a run, that of the run with its method.

    `method` is GRPO where nothing says otherwise, `optimizer` the recipe's; overrides have the last word. Raises as
    `load_recipe`, and where a run names what the overrides do not say again.
    """
    weights, trained = (None, None) if model is None else weights_of(model)
    if trained is None:
        method = method or "grpo"
    elif recipe != DEFAULT_RECIPE:
        raise ValueError(f"recipe {recipe} cannot be given with the run {model}, which has its own: leave it out")
    else:
        recipe = str(Path(str(model)) / CONFIG)
    chosen = [*ON_POLICY, *OPTIMIZERS.get(optimizer or "", ()), f"trainer.max_steps={steps}"]
    if trained is None or task != load_recipe(recipe).task["name"]:
        chosen.extend(_task(task))
    loaded = with_flags(load_recipe(recipe, [*chosen, *overrides], method, say), model=weights)
    if trained is not None:
        check_said_again(str(model), loaded.to_dict(), overrides)
    return loaded


def training_folder(recipe: str, chosen: Recipe) -> Path:
    """The folder of a training that was given none, named by what it trains."""
    return Path("runs") / f"{Path(recipe).stem}-{chosen.method['name']}-{chosen.seed}"


def audit_folder(recipe: str, chosen: Recipe) -> Path:
    """The folder of an audit that was given none, named by what it audits."""
    optimizer = chosen.trainer.get("optim", "adamw").partition("_")[0]
    return Path("runs") / f"audit-{Path(recipe).stem}-{chosen.method['name']}-{optimizer}"


def _task(name: str | None) -> tuple[str, ...]:
    """The override that makes it the task, with none of the settings of another one."""
    return () if name is None else (f"task={{name={name!r}}}",)
