"""Train from a recipe into a run directory: evaluate, train, evaluate again, write the page."""

import logging
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)

from entropy_polarity.evaluation import evaluate
from entropy_polarity.experiments.models import refuse_renamed
from entropy_polarity.generation import Progress, silent
from entropy_polarity.generation.tools import check_tool_support
from entropy_polarity.policy import resolve_model
from entropy_polarity.policy.folder import check_folder
from entropy_polarity.policy.loading import load_policy
from entropy_polarity.report.page import render_page
from entropy_polarity.runs.recipe import Recipe
from entropy_polarity.runs.record import (
    CHECKPOINTS,
    Run,
    RunWriter,
    checkpoint_step,
    read_config,
    read_summary,
    refuse_occupied,
)
from entropy_polarity.support.errors import check_settings, unknown_name
from entropy_polarity.support.files import locked
from entropy_polarity.support.machine import kept_memory
from entropy_polarity.tasks import Task, distinct_problems, make_task
from entropy_polarity.trainers.trl import PolarityConfig, PolarityTrainer
from entropy_polarity.trainers.trl.recording import RunRecorder
from entropy_polarity.trainers.trl.rewards import Reward, reward_of

# Set by the run itself: a recipe that names one would be overruled silently.
_OWNED = {"output_dir", "seed", "method", "method_settings", "logging_steps", "disable_tqdm"}


def trainer_config(recipe: Recipe, output: Path, task: Task) -> PolarityConfig:
    """The TRL configuration of a recipe. Unknown and owned keys raise ValueError."""
    known = {f.name for f in fields(PolarityConfig) if f.init} - _OWNED
    for key in recipe.trainer:
        if key in _OWNED:
            raise ValueError(f"recipe key 'trainer.{key}' is set by the run itself: leave it out")
        if key not in known:
            raise unknown_name("recipe key", f"trainer.{key}", [f"trainer.{name}" for name in known])
    check_settings("recipe table [trainer]", PolarityConfig, recipe.trainer)
    if recipe.trainer.get("max_steps", 0) < 1:
        raise ValueError(f"trainer.max_steps is {recipe.trainer.get('max_steps')}; expected at least 1 (--max-steps)")
    method = dict(recipe.method)
    name = method.pop("name")
    defaults = {"report_to": "none", "shuffle_dataset": False, "bf16": torch.cuda.is_available()}
    if task.max_completion_tokens is not None:
        defaults["max_completion_length"] = task.max_completion_tokens
    config = PolarityConfig(
        output_dir=str(output),
        seed=recipe.seed,
        method=name,
        method_settings=method,
        logging_steps=1,
        disable_tqdm=True,
        **defaults | recipe.trainer,
    )
    assert config.steps_per_generation is not None
    if config.steps_per_generation * config.num_iterations < config.gradient_accumulation_steps:
        raise ValueError(
            f"trainer.gradient_accumulation_steps={config.gradient_accumulation_steps} spans several rollouts of "
            f"{config.steps_per_generation} micro-batches: leave trainer.steps_per_generation out"
        )
    return config


def checked(recipe: Recipe, output: Path) -> tuple[Task, PolarityConfig]:
    """The task and the TRL configuration of a recipe. All that needs no model is checked: ValueError or OSError."""
    task = make_task(**recipe.task)
    config = trainer_config(recipe, output / CHECKPOINTS, task)
    problems = distinct_problems(task, recipe.evaluation.seed, "test", recipe.evaluation.problems)  # may be too few
    task.check_starts(problems)
    if (folder := Path(resolve_model(recipe.policy.model))).is_dir():
        check_folder(folder)
    return task, config


def prompts_of(task: Task, tokenizer: Any, config: PolarityConfig, seed: int) -> tuple[Dataset, Reward]:
    """The prompts of the whole run in order, and the reward function that judges completions of them."""
    assert config.generation_batch_size is not None
    assert config.steps_per_generation is not None
    assert config.num_generations is not None
    rollouts = -(-config.max_steps * config.gradient_accumulation_steps // config.steps_per_generation)
    rollouts = -(-rollouts // config.num_iterations)
    count = rollouts * config.generation_batch_size // config.num_generations
    problems = [task.problem(seed, index, "train") for index in range(count)]
    reward = reward_of(task, problems)
    return Dataset.from_dict({"prompt": reward.prompts(tokenizer), "problem": list(range(count))}), reward


def quiet_trainer(
    model: Any, tokenizer: Any, config: PolarityConfig, dataset: Dataset, reward: Reward
) -> PolarityTrainer:
    """The trainer of a run, without the lines that TRL would print.

    Raises ValueError where the task has tools and the tokenizer has no way to call them.
    """
    if reward.tools:
        check_tool_support(tokenizer)
    trainer = PolarityTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
        rollout_func=reward.rollout,
        tools=reward.tools,
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


class _StopOnSignal(TrainerCallback):
    """The first Ctrl-C (or SIGTERM) ends training at the next rollout boundary, saved; the second at once."""

    def __init__(self, trainer: PolarityTrainer, say: Callable[[str], None]) -> None:
        self.trainer, self.say = trainer, say
        self.asked = False

    def __enter__(self) -> "_StopOnSignal":
        self._previous = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.asked:
            self.say("stopping with a checkpoint at the end of this rollout; Ctrl-C again stops at once")
            if self.trainer.at_rollout_boundary:
                control.should_save = control.should_training_stop = True


def train(
    recipe: Recipe,
    output: Path,
    *,
    resume: bool = False,
    from_step: int | None = None,
    watch: Callable[[dict[str, Any]], None] = lambda row: None,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run `recipe` into `output`; with `resume`, go on from its last checkpoint, or that of `from_step`. Returns the
    summary.

    `watch` gets each step's metrics, `say` a line at each stage, `progress` how far an evaluation is. What a user can
    get wrong raises ValueError or an OSError before anything is written. A run stopped while it was being evaluated is
    only evaluated again. While it works, the run directory is locked.
    """
    with ExitStack() as held:
        return _train(recipe, output, resume, from_step, watch, say, progress, held)


def _train(
    recipe: Recipe,
    output: Path,
    resume: bool,
    from_step: int | None,
    watch: Callable[[dict[str, Any]], None],
    say: Callable[[str], None],
    progress: Progress,
    held: ExitStack,
) -> dict[str, Any]:
    quiet()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("papo train runs in one process: for several, use PolarityTrainer in a script of your own")
    task, config = checked(recipe, output)
    if resume:
        read_config(output)  # a lock is put into no other folder
        held.enter_context(locked(output))
        refuse_renamed(output)
        summary = _summary_to_resume(output, config.max_steps, from_step)
    else:
        refuse_occupied(output)
        summary = {}
    model, tokenizer = load_policy(recipe.policy.model)
    dataset, reward = prompts_of(task, tokenizer, config, recipe.seed)
    trainer = quiet_trainer(model, tokenizer, config, dataset, reward)
    if resume:
        writer, checkpoint = RunWriter.resume(output, recipe.to_dict(), from_step, say)
    else:
        refuse_occupied(output)
        held.enter_context(locked(output))
        writer, checkpoint = RunWriter.create(output, recipe.to_dict(), recipe.seed), None

    def held_out(policy: Any) -> dict[str, Any]:
        say(f"evaluating on {recipe.evaluation.problems} held-out problems x {recipe.evaluation.samples} samples")
        budget = asdict(recipe.evaluation)
        return evaluate(policy, tokenizer, task, **budget, progress=progress, say=say).to_json()

    try:
        if "before" not in summary:
            summary["before"] = held_out(model)
        writer.write_summary(summary | {"status": "running"})
        reached = checkpoint_step(checkpoint) if checkpoint else 0
        if reached < config.max_steps:
            RunRecorder(writer, recipe.record.completions, lambda: reward.judged, watch).attach(trainer)
            say(f"training from step {reached} to {config.max_steps} with {config.method}, seed {recipe.seed}")
            stop = _StopOnSignal(trainer, say)
            trainer.add_callback(stop)
            memory = kept_memory() if config.device.type == "cpu" else nullcontext()
            with stop, memory:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            reached = trainer.state.global_step
        else:
            model, _ = load_policy(str(checkpoint))
        summary |= {"status": "interrupted", "steps": reached}
        if reached >= config.max_steps:
            summary |= {"after": held_out(model), "status": "finished"}
    except BaseException as error:
        writer.write_summary(summary | {"status": f"stopped: {type(error).__name__}"})
        raise
    writer.write_summary(summary)
    page = writer.write_report(render_page(Run.read(output)))
    say(f"report: {page}")
    return summary


def _summary_to_resume(output: Path, max_steps: int, from_step: int | None) -> dict[str, Any]:
    """What is still true of the summary of a run that goes on. Raises ValueError if there is nothing left to do."""
    summary = read_summary(output)
    if from_step is None and summary.get("status") == "finished" and summary["steps"] >= max_steps:
        raise ValueError(
            f"{output} is finished at step {summary['steps']}: a larger --max-steps lengthens it, "
            f"papo report {output} writes its page again"
        )
    return {name: summary[name] for name in ("before",) if name in summary}


def quiet() -> None:
    """Warnings of libraries about their own internals would bury the one line a user needs."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("accelerate", "trl", "datasets", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
