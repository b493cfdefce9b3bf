"""Which models are meant, where their weights are, and which task they were made for."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from entropy_polarity.methods import name_of
from entropy_polarity.policy import resolve_model
from entropy_polarity.runs.checkpoints import checkpoint_step, last_checkpoint, refuse_broken, refuse_in_the_way
from entropy_polarity.runs.consent import check_said_again
from entropy_polarity.runs.layout import CHECKPOINTS, CONFIG, read_config, read_environment
from entropy_polarity.runs.method_state import STATE_FILE
from entropy_polarity.runs.recipe import apply_override, load_recipe
from entropy_polarity.support.errors import unknown_name
from entropy_polarity.tasks import check_task

_LABELLED = re.compile(r"([^=/\\]+)=(.+)")


def labelled(models: Sequence[str]) -> dict[str, str]:
    """Labels and models: "label=model", or a model under the last part of its name.

    >>> labelled(["embedded", "long=runs/b", "runs/c"])
    {'embedded': 'embedded', 'long': 'runs/b', 'c': 'runs/c'}
    """
    named: dict[str, str] = {}
    for text in models:
        match = None if Path(text).exists() else _LABELLED.fullmatch(text)
        label, model = match.groups() if match else (Path(text).name or text, text)
        if label in named:
            raise ValueError(f"two models are called {label!r}: give them labels, as in a={named[label]} b={model}")
        named[label] = model
    if not named:
        raise ValueError("no model to evaluate: give one with --model")
    return named


def weights_of(model: str) -> tuple[str, dict[str, Any] | None]:
    """Where the weights of `model` are, and where it is a run, its recipe: the weights are its last checkpoint then.
    Raises ValueError where a file of the checkpoint that a policy needs is missing or was changed."""
    folder, config = Path(model), None
    if (folder / CONFIG).is_file():
        config, checkpoint = read_config(folder), last_checkpoint(folder)
        if checkpoint is None:
            raise FileNotFoundError(f"{model} is a run without a finished checkpoint: nothing to look at yet")
        refuse_in_the_way(checkpoint.parent, checkpoint_step(checkpoint), math.inf, f"--model {checkpoint} takes it")
        folder = checkpoint
    if (folder / STATE_FILE).is_file():
        refuse_broken(folder, lambda whole: f"{whole} beside it is whole", policy_only=True)
    return (model, None) if config is None else (str(folder), config)


def refuse_renamed(run: Path) -> None:
    """Raise ValueError where the name of a run's method meant another rule when the run was made."""
    made = str(read_environment(run).get("date", ""))
    name = read_config(run).get("method", {}).get("name", "")
    if (now := name_of(name, made)) != name:
        raise ValueError(f"{run} was made when {name!r} was what {now!r} is now, and cannot go on as {name!r}")


def settle_task(named: dict[str, str], task: str | None, task_settings: Sequence[str]) -> dict[str, Any]:
    """The settings of the one task for all: `task`, or what the runs among the models were trained on. A setting is
    "key=value", or "task.key=value" as in a recipe. Raises ValueError where a run's task names code or a data set of
    the hub that no setting says again."""
    trained = {label: found for label, model in named.items() if (found := _trained_on(model)) is not None}
    known = [found for found in trained.values() if task in (None, found["name"])]
    if any(found != known[0] for found in known):
        said = "; ".join(f"{label}: {found}" for label, found in trained.items())
        raise ValueError(f"the models were trained on different tasks ({said}): say --task, and --set for its settings")
    settings = dict(known[0]) if known else {"name": task or "countdown"}
    said = [setting.removeprefix("task.") for setting in task_settings]
    for setting in said:
        apply_override(settings, setting)
    if known:
        run = next(named[label] for label, found in trained.items() if found == known[0])
        check_said_again(run, {"task": settings}, [f"task.{setting}" for setting in said])
    return settings


def _trained_on(model: str) -> dict[str, Any] | None:
    """The task of a run, or of the run that a checkpoint belongs to."""
    folder = Path(model)
    for run in (folder, folder.parent.parent if folder.parent.name == CHECKPOINTS else folder):
        if (run / CONFIG).is_file():
            read_config(run)  # whole, and not cut off
            return load_recipe(str(run / CONFIG)).task
    return None


class ChosenModels(NamedTuple):
    """The models of an evaluation: where the weights of each label are, the label that the others are compared with,
    and the name and settings of the one task for all."""

    weights: dict[str, str]
    baseline: str | None
    task: dict[str, Any]


def chosen_models(
    models: Sequence[str], baseline: str | None, task: str | None, task_settings: Sequence[str]
) -> ChosenModels:
    """What an evaluation is of. Raises ValueError or OSError for all names that can be known to be wrong without the
    seconds that torch takes to load: of models, of the baseline, and of the task and its settings."""
    named = labelled(models)
    if baseline is not None and baseline not in named:
        raise unknown_name("baseline", baseline, list(named))
    if baseline is not None and len(named) == 1:
        raise ValueError(f"--baseline {baseline} needs several models to compare: give them with --model")
    weights = {label: weights_of(model)[0] for label, model in named.items()}
    for place in weights.values():
        resolve_model(place)
    settled = settle_task(named, task, task_settings)
    check_task(**settled)
    return ChosenModels(weights, (baseline or next(iter(named))) if len(named) > 1 else None, settled)
