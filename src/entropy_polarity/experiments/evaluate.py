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
    settings: dict[str, Any] = {"name": task or "countdown"}
    folder, weights = Path(model), model
    if (folder / CONFIG).is_file():
        checkpoint = last_checkpoint(folder)
        if checkpoint is None:
            raise FileNotFoundError(f"{model} is a run without a finished checkpoint: nothing to evaluate yet")
        weights = str(checkpoint)
        trained_on = Run.read(folder).config["task"]
        if task in (None, trained_on["name"]):
            settings = dict(trained_on)
    for setting in task_settings:
        apply_override(settings, setting)
    judged = make_task(**settings)
    policy, tokenizer = load_policy(weights)
    evaluation = evaluate(
        policy, tokenizer, judged, problems=problems, samples=samples, seed=seed, temperature=temperature
    )
    return {"model": weights, "task": settings, **evaluation.to_json()}
