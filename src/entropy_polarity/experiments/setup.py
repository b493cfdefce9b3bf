"""Set up a training from a recipe, for `papo train`, `papo audit`, `papo compare` and scripts."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback

from entropy_polarity.generation.tools import check_tool_support
from entropy_polarity.policy import resolve_model
from entropy_polarity.policy.loading import check_folder, load_policy
from entropy_polarity.runs.recipe import Recipe
from entropy_polarity.support.errors import check_settings, unknown_name
from entropy_polarity.tasks import Task, distinct_problems, make_task
from entropy_polarity.trainers.trl import PolarityConfig, PolarityTrainer
from entropy_polarity.trainers.trl.rewards import Reward, reward_of

# Set by the run itself: a recipe that names one would be overruled silently.
_OWNED = {"output_dir", "seed", "method", "method_settings", "logging_steps", "disable_tqdm"}
# What TRL and transformers refuse in the first rollout or update, when a run has begun: a test, and what passes it.
_BOUNDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_steps": (lambda value: value >= 1, "at least 1 (--max-steps)"),
    "per_device_train_batch_size": (lambda value: value >= 1, "at least 1"),
    "max_completion_length": (lambda value: value >= 1, "at least 1"),
    "learning_rate": (lambda value: value >= 0, "a number from 0 up"),
    "temperature": (lambda value: value > 0, "a number above 0"),
    "top_p": (lambda value: 0 < value <= 1, "a number above 0, at most 1"),
    "top_k": (lambda value: value >= 0, "a whole number from 0 up (0: all tokens)"),
    "min_p": (lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "repetition_penalty": (lambda value: value > 0, "a number above 0"),
}


@dataclass(frozen=True)
class TrainingRun:
    """Everything that a training from a recipe needs; `trainer.train()` is all that is left to do. `reward.judged` has
    the texts and verdicts of the last rollout."""

    recipe: Recipe
    task: Task
    config: PolarityConfig
    model: Any
    tokenizer: Any
    reward: Reward
    trainer: PolarityTrainer

    @classmethod
    def from_recipe(
        cls, recipe: Recipe, folder: Path, *, task: Task | None = None, policy: tuple[Any, Any] | None = None
    ) -> "TrainingRun":
        """Set a training up whose checkpoints go into `folder`.

        `task` and `policy`, a pair (model, tokenizer), take the place of those of the recipe. Raises ValueError or
        OSError for what a user can get wrong, before anything but empty folders is written.
        """
        task, config = check_recipe(recipe, folder, task)
        model, tokenizer = policy or load_policy(recipe.policy.model)
        dataset, reward = prompts_of(task, tokenizer, config, recipe.seed)
        trainer = quiet_trainer(model, tokenizer, config, dataset, reward)
        return cls(recipe, task, config, model, tokenizer, reward, trainer)


def check_recipe(recipe: Recipe, folder: Path, task: Task | None = None) -> tuple[Task, PolarityConfig]:
    """The task and the TRL configuration of a recipe. Raises ValueError or OSError for all that needs no model."""
    task = task or make_task(**recipe.task)
    config = trainer_config(recipe, folder, task)
    problems = distinct_problems(task, recipe.evaluation.seed, "test", recipe.evaluation.problems)  # may be too few
    task.check_starts(problems)
    if (model := Path(resolve_model(recipe.policy.model))).is_dir():
        check_folder(model)
    return task, config


def trainer_config(recipe: Recipe, folder: Path, task: Task) -> PolarityConfig:
    """The TRL configuration of a recipe. Raises ValueError for keys that are unknown or set by the run itself, and for
    values that could only fail later."""
    known = {f.name for f in fields(PolarityConfig) if f.init} - _OWNED
    for key in recipe.trainer:
        if key in _OWNED:
            raise ValueError(f"recipe key 'trainer.{key}' is set by the run itself: leave it out")
        if key not in known:
            raise unknown_name("recipe key", f"trainer.{key}", [f"trainer.{name}" for name in known])
    check_settings("recipe table [trainer]", PolarityConfig, recipe.trainer)
    method = dict(recipe.method)
    name = method.pop("name")
    defaults = {"report_to": "none", "shuffle_dataset": False, "bf16": torch.cuda.is_available()}
    if task.max_completion_tokens is not None:
        defaults["max_completion_length"] = task.max_completion_tokens
    config = PolarityConfig(
        output_dir=str(folder),
        seed=recipe.seed,
        method=name,
        method_settings=method,
        logging_steps=1,
        disable_tqdm=True,
        **defaults | recipe.trainer,
    )
    for key, (is_right, expected) in _BOUNDS.items():
        value = getattr(config, key)
        if value is not None and not is_right(value):
            raise ValueError(f"trainer.{key} is {value}; expected {expected}")
    assert config.steps_per_generation is not None
    if config.steps_per_generation * config.num_iterations < config.gradient_accumulation_steps:
        raise ValueError(
            f"trainer.gradient_accumulation_steps={config.gradient_accumulation_steps} spans several rollouts of "
            f"{config.steps_per_generation} micro-batches: leave trainer.steps_per_generation out"
        )
    return config


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
    """The trainer of a run, without the lines that TRL would print. Raises ValueError where the task has tools and the
    tokenizer has no way to call them."""
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


def quiet() -> None:
    """Warnings of libraries about their own internals would bury the one line a user needs."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("accelerate", "trl", "datasets", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
