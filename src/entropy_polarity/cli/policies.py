"""Commands about one policy: train, eval, report, pretrain."""

import sys
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from entropy_polarity.cli.common import Json, Overrides, check_early, note, print_json
from entropy_polarity.experiments.flags import resumed_recipe, training_folder, training_recipe
from entropy_polarity.report.terminal import print_estimates, print_evaluation
from entropy_polarity.runs.recipe import DEFAULT_RECIPE, Recipe, apply_override
from entropy_polarity.support.errors import check_settings
from entropy_polarity.support.text import printable


def train(
    recipe: Positional[str] = DEFAULT_RECIPE,
    /,
    output: Path | None = None,
    task: str | None = None,
    method: str | None = None,
    max_steps: int | None = None,
    seed: int | None = None,
    model: str | None = None,
    resume: Path | None = None,
    from_checkpoint: int | None = None,
    overrides: Overrides = (),
    as_json: Json = False,
) -> None:
    """Train a policy by reinforcement, from a recipe into a run directory.

    Args:
        recipe: name of a recipe that comes with the package, or path of a .toml file
        output: the run directory; must not hold a run yet (default: runs/<recipe>-<method>-<seed>)
        task: in place of the recipe's: countdown, math:PRESET, gym:DATASET, guess, keydoor, textarena:GAME,
            textworld:CHALLENGE, math (with --set task.data=FILE) or env (with --set task.factory=MODULE:CLASS)
        method: a name of `papo methods` (default: the recipe's)
        max_steps: optimiser steps (default: the recipe's)
        seed: seed of prompts, sampling and training (default: the recipe's)
        model: "embedded", a folder with a Hugging Face causal language model, or the name of one on the
            Hugging Face hub (default: the recipe's)
        resume: a run directory to go on with, from its last checkpoint (its own recipe is used)
        from_checkpoint: with --resume: the step of the checkpoint to go on from, 0 for the beginning. Later steps and
            checkpoints of the run are dropped, and what is lost of the record before it stays lost
        overrides: any key of the recipe, e.g. trainer.learning_rate=1e-4; one of method.KEY changes that setting alone.
            With --resume it says again what the run names beyond itself, e.g. task.factory=MODULE:CLASS
    """
    if from_checkpoint is not None and resume is None:
        raise ValueError(f"--from-checkpoint {from_checkpoint} needs --resume DIR, the run whose checkpoint it is")
    if resume is None:
        chosen = training_recipe(recipe, model, task, method, max_steps, seed, overrides, note)
    else:
        fixed = {"output": output, "task": task, "method": method, "seed": seed, "model": model}
        chosen = resumed_recipe(resume, recipe, max_steps, overrides, **fixed)
    check_early(chosen)
    _train(chosen, resume or output or training_folder(recipe, chosen), resume is not None, from_checkpoint, as_json)


def _train(chosen: Recipe, directory: Path, resume: bool, from_step: int | None, as_json: bool) -> None:
    from entropy_polarity.experiments.training import train as run
    from entropy_polarity.report.live import LiveView

    steps = chosen.trainer.get("max_steps", -1)
    with LiveView(chosen.title or str(directory), steps, sys.stderr if as_json else sys.stdout) as view:
        shown = {"watch": view.watch, "say": view.say, "progress": view.progress}
        summary = run(chosen, directory, resume=resume, from_step=from_step, **shown)
    if as_json:
        print_json({"run": str(directory), **summary})
    else:
        print_estimates({name: summary[name] for name in ("before", "after") if name in summary})
        print(printable(f"{summary['status']}: {directory}/report.html"))


def evaluate(
    model: tuple[str, ...] = ("embedded",),
    baseline: str | None = None,
    task: str | None = None,
    samples: int | None = None,
    problems: int | None = None,
    seed: int = 0,
    seeds: tuple[int, ...] = (),
    temperature: float = 1.0,
    top_p: float = 1.0,
    output: Path | None = None,
    backend: Literal["transformers", "vllm"] = "transformers",
    batch_size: int | None = None,
    overrides: Overrides = (),
    as_json: Json = False,
) -> None:
    """Evaluate models on held-out problems: avg@k, pass@k and maj@k with intervals; several side by side.

    Args:
        model: model folders, names on the Hugging Face hub, runs (their last checkpoints), checkpoints of runs, or
            "embedded"; LABEL=MODEL names one
        baseline: label of the model that the others are compared with (default: the first)
        task: name of a task (default: the runs' own, or countdown)
        samples: completions a problem, the largest k (default: 16, or 4 where the weights of a model exceed 100 MB)
        problems: number of held-out problems (default: 200, or 100 as above, or all that the task has)
        seed: seed of the problems, and of sampling unless --seeds are given
        seeds: seeds of sampling; intervals are then over problems and seeds
        temperature: sampling temperature
        top_p: sample from the likeliest tokens that make up this probability
        output: folder for evaluation.json, problems.jsonl (every completion) and evaluation.html
        backend: what generates; vllm needs the extra [vllm]
        batch_size: completions at a time to start with, halved when memory runs out (default: by free memory)
        overrides: settings of the task, e.g. numbers=[3,4]. What a run names beyond itself counts only where it is said
            again here, e.g. factory=MODULE:CLASS
    """
    from entropy_polarity.experiments.models import chosen_models

    chosen_models(model, baseline, task, overrides)  # a wrong name is told before torch is loaded

    from entropy_polarity.experiments.evaluate import PAGE, Settings, evaluate_models
    from entropy_polarity.report.lines import LiveOrLines

    settings = Settings(problems, samples, seed, seeds, temperature, top_p, backend, batch_size)
    with LiveOrLines(sys.stderr) as view:
        document = evaluate_models(
            model,
            settings,
            task=task,
            task_settings=overrides,
            baseline=baseline,
            output=output,
            say=view.line,
            progress=view.progress,
        )
    if as_json:
        return print_json(document)
    print_evaluation(document)
    if output is not None:
        print(printable(output / PAGE))


def report(run: Positional[Path], /, as_json: Json = False) -> None:
    """Write the page of a run again, from its files.

    Args:
        run: the run directory
    """
    from entropy_polarity.experiments.results import as_written
    from entropy_polarity.report.page import render_page
    from entropy_polarity.runs.record import Run, RunWriter

    with as_written(run):
        text = render_page(Run.read(run))
    page = RunWriter(run).write_report(text)
    print_json({"report": str(page)}) if as_json else print(printable(page))


def pretrain(
    output: Path,
    task: str = "countdown",
    seed: int = 0,
    steps: int | None = None,
    width: int = 128,
    layers: int = 4,
    overrides: Overrides = (),
    as_json: Json = False,
) -> None:
    """Make an embedded policy again, from a seed, and say how good it is.

    Args:
        output: where the model goes; must not exist yet
        task: countdown ("embedded"), guess ("embedded:guess"), keydoor ("embedded:keydoor") or gym:DATASET
        seed: seed of weights and problems
        steps: supervised steps, each on a batch of demonstrations (default: those of the policy that is shipped)
        width: of the hidden states, a multiple of 32
        layers: number of layers
        overrides: other settings, e.g. learning_rate=1e-3, numbers=[3] of countdown, config.max_terms=3 of a gym data
            set
    """
    from entropy_polarity.experiments.pretraining import pretrain_policy
    from entropy_polarity.policy.pretraining import PretrainSettings

    def progress(step: int, loss: float) -> None:
        if step % 50 == 0 or step == settings.steps:
            print(f"step {step}  loss {loss:.4f}", file=sys.stderr, flush=True)

    given: dict[str, Any] = {}
    for override in overrides:
        apply_override(given, override)
    check_settings("papo pretrain", PretrainSettings, given)
    flags = {"task": task, "seed": seed, "steps": steps, "width": width, "layers": layers}
    settings = PretrainSettings(**flags | given)
    quality = pretrain_policy(output, settings, progress)
    if as_json:
        return print_json(quality)
    print_estimates(quality["evaluation"])
    print(printable(f"policy written to {output}"))
