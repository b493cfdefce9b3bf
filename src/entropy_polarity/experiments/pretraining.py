"""Make an embedded policy again and measure it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from entropy_polarity.evaluation import evaluate
from entropy_polarity.experiments.setup import quiet
from entropy_polarity.policy.loading import load_policy
from entropy_polarity.policy.pretraining import PretrainSettings, pretrain
from entropy_polarity.tasks import make_task


def pretrain_policy(output: Path, settings: PretrainSettings, progress: Callable[[int, float], None]) -> dict[str, Any]:
    """Pretrain into `output` (which must not exist) and evaluate on what it has read."""
    quiet()
    if output.exists():
        raise FileExistsError(f"{output} already exists: give another --output")
    pretrain(settings, output, progress)
    model, tokenizer = load_policy(str(output))
    if settings.task == "countdown":
        judged = {f"countdown, {size} numbers": make_task("countdown", numbers=(size,)) for size in settings.numbers}
    elif settings.family == "gym":
        judged = {settings.task: make_task(settings.task, config=settings.config, max_completion_tokens=32)}
    else:
        judged = {settings.task: make_task(settings.task)}
    return {
        "output": str(output),
        # Three numbers make only about two hundred different test problems.
        "evaluation": {name: evaluate(model, tokenizer, task, problems=150).to_json() for name, task in judged.items()},
    }
