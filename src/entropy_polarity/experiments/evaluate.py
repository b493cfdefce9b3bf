"""Evaluate a model folder, or the last checkpoint of a run."""

from pathlib import Path
from typing import Any

from entropy_polarity.evaluate import evaluate
from entropy_polarity.experiments.train import load_policy, quiet
from entropy_polarity.recipe import apply_override
from entropy_polarity.record import CONFIG, Run, last_checkpoint
from entropy_polarity.tasks import make_task


def evaluate_model(
    model: str,
    task: str | None,
    task_settings: tuple[str, ...],
    problems: int,
    samples: int,
    seed: int,
    temperature: float,
) -> dict[str, Any]:
    """The evaluation as plain data. `model` may be a run: then its last checkpoint, on its own task by default."""
    quiet()
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a positive number")
    weights, trained_on = weights_of(model)
    settings: dict[str, Any] = {"name": task or "countdown"}
    if trained_on is not None and task in (None, trained_on["task"]["name"]):
        settings = dict(trained_on["task"])
    for setting in task_settings:
        apply_override(settings, setting)
    judged = make_task(**settings)
    policy, tokenizer = load_policy(weights)
    evaluation = evaluate(
        policy, tokenizer, judged, problems=problems, samples=samples, seed=seed, temperature=temperature
    )
    return {"model": weights, "task": settings, **evaluation.to_json()}


def weights_of(model: str) -> tuple[str, dict[str, Any] | None]:
    """Where the weights of `model` are, and where it is a run, its recipe: the weights are its last checkpoint then."""
    folder = Path(model)
    if not (folder / CONFIG).is_file():
        return model, None
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        raise FileNotFoundError(f"{model} is a run without a finished checkpoint: nothing to look at yet")
    return str(checkpoint), Run.read(folder).config
