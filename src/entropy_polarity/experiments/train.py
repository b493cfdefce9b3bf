"""Train from a recipe into a run directory: evaluate, train, evaluate again, write the page."""

import logging
import os
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)

from entropy_polarity._errors import unknown_name
from entropy_polarity.evaluate import Evaluation, evaluate
from entropy_polarity.policy import resolve_model
from entropy_polarity.recipe import Recipe
from entropy_polarity.record import CHECKPOINTS, Run, RunWriter, checkpoint_step, last_checkpoint
from entropy_polarity.report.page import render_page
from entropy_polarity.tasks import Task, make_task
from entropy_polarity.trainers.recording import RunRecorder
from entropy_polarity.trainers.trl import PolarityConfig, PolarityTrainer

# Set by the run itself: a recipe that names one would be overruled silently.
_OWNED = {"output_dir", "seed", "method", "method_settings", "logging_steps", "disable_tqdm"}


def load_policy(model: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder, a hub name or "embedded", in float32. No remote code is run."""
    path = resolve_model(model)
    local = Path(path).is_dir()
    try:
        policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=local)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=local)
    except OSError as error:
        hint = "" if local else " (not a local folder; HF_HUB_OFFLINE=0 allows a download from the hub)"
        raise FileNotFoundError(f"cannot load a model from {model!r}{hint}: {str(error).splitlines()[0]}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return policy, tokenizer


def trainer_config(recipe: Recipe, output: Path) -> PolarityConfig:
    """The TRL configuration of a recipe. Unknown and owned keys raise ValueError."""
    known = {f.name for f in fields(PolarityConfig) if f.init} - _OWNED
    for key in recipe.trainer:
        if key in _OWNED:
            raise ValueError(f"recipe key 'trainer.{key}' is set by the run itself: leave it out")
        if key not in known:
            raise unknown_name("recipe key", f"trainer.{key}", [f"trainer.{name}" for name in known])
    if not recipe.trainer.get("max_steps", 0) > 0:
        raise ValueError(f"trainer.max_steps is {recipe.trainer.get('max_steps')}; expected at least 1 (--max-steps)")
    settings = dict(recipe.method)
    name = settings.pop("name")
    defaults = {"report_to": "none", "shuffle_dataset": False, "bf16": torch.cuda.is_available()}
    return PolarityConfig(
        output_dir=str(output),
        seed=recipe.seed,
        method=name,
        method_settings=settings,
        logging_steps=1,
        disable_tqdm=True,
        **defaults | recipe.trainer,
    )


def prompts_of(task: Task, config: PolarityConfig, seed: int) -> tuple[Dataset, Callable[..., list[float]]]:
    """The prompts of the whole run in order, and the reward function that judges completions of them."""
    assert config.generation_batch_size
    assert config.steps_per_generation
    rollouts = -(-config.max_steps * config.gradient_accumulation_steps // config.steps_per_generation)
    rollouts = -(-rollouts // config.num_iterations)
    count = rollouts * config.generation_batch_size // (config.num_generations or 1)
    problems = [task.problem(seed, index, "train") for index in range(count)]
    dataset = Dataset.from_dict({"prompt": [p.prompt for p in problems], "problem": list(range(count))})

    def verified(completions: list[str], problem: list[int], log_metric: Callable, **_: Any) -> list[float]:
        scores = [task.score(problems[i], text) for i, text in zip(problem, completions, strict=True)]
        verdicts = Counter(score.reason for score in scores)
        for reason in task.reasons:
            log_metric(f"verdict/{reason.replace(' ', '_')}", verdicts[reason] / len(scores))
        return [score.reward for score in scores]

    return dataset, verified


class _StopOnSignal(TrainerCallback):
    """The first Ctrl-C (or SIGTERM) ends the run at the next rollout boundary with a checkpoint; the second at once."""

    def __init__(self, trainer: PolarityTrainer) -> None:
        self.trainer = trainer
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
        if self.asked and state.global_step % self.trainer.steps_per_rollout == 0:
            control.should_save = control.should_training_stop = True


def train(
    recipe: Recipe,
    output: Path,
    *,
    resume: bool = False,
    watch: Callable[[dict[str, Any]], None] = lambda row: None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run `recipe` into `output`; with `resume`, go on from its last checkpoint. Returns the summary.

    `watch` gets each step's metrics, `say` a line at each stage. Everything a user can get wrong raises ValueError
    or an OSError before anything is written.
    """
    quiet()
    task = make_task(**recipe.task)
    config = trainer_config(recipe, output / CHECKPOINTS)
    model, tokenizer = load_policy(recipe.policy.model)
    dataset, reward = prompts_of(task, config, recipe.seed)
    if resume:
        done = last_checkpoint(output)
        if done is not None and checkpoint_step(done) >= config.max_steps:
            raise ValueError(f"{output} is finished at step {checkpoint_step(done)}: --max-steps can lengthen it")
        writer, checkpoint = RunWriter.resume(output, recipe.to_dict())
        summary = Run.read(output).summary
    else:
        writer, checkpoint = RunWriter.create(output, recipe.to_dict(), recipe.seed), None
        summary = {}

    def held_out() -> Evaluation:
        say(f"evaluating on {recipe.evaluation.problems} held-out problems x {recipe.evaluation.samples} samples")
        return evaluate(model, tokenizer, task, **asdict(recipe.evaluation))

    if "before" not in summary:
        summary["before"] = held_out().to_json()
    summary["status"] = "running"
    writer.write_summary(summary)

    trainer = PolarityTrainer(
        model=model, reward_funcs=reward, args=config, train_dataset=dataset, processing_class=tokenizer
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    judge = _judge(task, dataset, recipe.seed)
    RunRecorder(writer, recipe.record.completions, judge, watch).attach(trainer)
    stop = _StopOnSignal(trainer)
    trainer.add_callback(stop)
    where = f"from step {checkpoint.name.rpartition('-')[2]} " if checkpoint else ""
    say(f"training {where}to step {config.max_steps} with {recipe.method['name']}, seed {recipe.seed}")
    try:
        with stop:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except BaseException as error:
        writer.write_summary(summary | {"status": f"stopped: {type(error).__name__}"})
        raise
    finished = trainer.state.global_step >= config.max_steps
    summary |= {"status": "finished" if finished else "interrupted", "steps": trainer.state.global_step}
    if finished:
        summary["after"] = held_out().to_json()
    writer.write_summary(summary)
    page = writer.write_report(render_page(Run.read(output)))
    say(f"report: {page}")
    return summary


def _judge(task: Task, dataset: Dataset, seed: int) -> Callable[[str, str], str]:
    index = {prompt: number for number, prompt in zip(dataset["problem"], dataset["prompt"], strict=True)}

    def judge(prompt: str, completion: str) -> str:
        number = index.get(prompt)
        return "unknown" if number is None else task.score(task.problem(seed, number, "train"), completion).reason

    return judge


def quiet() -> None:
    """Warnings of libraries about their own internals would bury the one line a user needs."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("accelerate", "trl", "datasets", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
