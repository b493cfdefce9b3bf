"""Train from a recipe into a run directory: evaluate, train, evaluate again, write the page."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from entropy_polarity.evaluation import evaluate
from entropy_polarity.experiments.models import refuse_renamed
from entropy_polarity.experiments.setup import TrainingRun, quiet
from entropy_polarity.generation import Progress, silent
from entropy_polarity.policy.loading import load_policy
from entropy_polarity.report.page import render_page
from entropy_polarity.runs.checkpoints import checkpoint_step
from entropy_polarity.runs.layout import CHECKPOINTS, read_config, read_summary, refuse_occupied
from entropy_polarity.runs.recipe import Recipe
from entropy_polarity.runs.record import Run, RunWriter
from entropy_polarity.runs.resuming import resume_run
from entropy_polarity.support.files import locked
from entropy_polarity.support.machine import kept_memory
from entropy_polarity.trainers.trl import PolarityTrainer
from entropy_polarity.trainers.trl.recording import RunRecorder

Say = Callable[[str], None]
Watch = Callable[[dict[str, Any]], None]
# A run that is set up, its writer, the checkpoint to go on from, and what is known of its summary.
Begun = tuple[TrainingRun, RunWriter, Path | None, dict[str, Any]]


def train(
    recipe: Recipe,
    output: Path,
    *,
    resume: bool = False,
    from_step: int | None = None,
    watch: Watch = lambda row: None,
    say: Say = lambda line: None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run `recipe` into `output`, or with `resume` go on from its last checkpoint, or that of `from_step`.

    `watch` gets the metrics of each step, `say` a line at each stage, `progress` how far an evaluation is. Returns the
    summary. What a user can get wrong raises ValueError or an OSError before anything is written. A run that was
    stopped in its last evaluation is only evaluated again. The run directory is locked meanwhile.
    """
    quiet()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("papo train runs in one process: for several, use PolarityTrainer in a script of your own")
    begun = _resumed(recipe, output, from_step, say) if resume else _begun(recipe, output)
    with begun as (run, writer, checkpoint, summary):

        def held_out(policy: Any) -> dict[str, Any]:
            say(f"evaluating on {recipe.evaluation.problems} held-out problems x {recipe.evaluation.samples} samples")
            budget = asdict(recipe.evaluation)
            return evaluate(policy, run.tokenizer, run.task, **budget, progress=progress, say=say).to_json()

        try:
            if "before" not in summary:
                summary["before"] = held_out(run.model)
            writer.write_summary(summary | {"status": "running"})
            policy, reached = _trained(run, writer, checkpoint, watch, say)
            summary |= {"status": "interrupted", "steps": reached}
            if reached >= run.config.max_steps:
                summary |= {"after": held_out(policy), "status": "finished"}
        except BaseException as error:
            writer.write_summary(summary | {"status": f"stopped: {type(error).__name__}"})
            raise
        writer.write_summary(summary)
        page = writer.write_report(render_page(Run.read(output)))
        say(f"report: {page}")
        return summary


@contextmanager
def _begun(recipe: Recipe, output: Path) -> Iterator[Begun]:
    refuse_occupied(output)
    run = TrainingRun.from_recipe(recipe, output / CHECKPOINTS)
    with locked(output):
        yield run, RunWriter.create(output, recipe.to_dict(), recipe.seed), None, {}


@contextmanager
def _resumed(recipe: Recipe, output: Path, from_step: int | None, say: Say) -> Iterator[Begun]:
    read_config(output)  # a lock is put into no other folder
    with locked(output):
        refuse_renamed(output)
        summary = read_summary(output)
        ended = summary.get("status") == "finished" and summary["steps"] >= recipe.trainer.get("max_steps", 0)
        if from_step is None and ended:
            raise ValueError(
                f"{output} is finished at step {summary['steps']}: a larger --max-steps lengthens it, "
                f"papo report {output} writes its page again"
            )
        run = TrainingRun.from_recipe(recipe, output / CHECKPOINTS)
        writer, checkpoint = resume_run(output, recipe.to_dict(), from_step, say)
        still_true = {"before": summary["before"]} if "before" in summary else {}
        yield run, writer, checkpoint, still_true


def _trained(run: TrainingRun, writer: RunWriter, checkpoint: Path | None, watch: Watch, say: Say) -> tuple[Any, int]:
    """The policy after the steps that are left to make, and the step it has reached."""
    reached = checkpoint_step(checkpoint) if checkpoint else 0
    if reached >= run.config.max_steps:
        return load_policy(str(checkpoint))[0], reached
    RunRecorder(writer, run.recipe.record.completions, lambda: run.reward.judged, watch).attach(run.trainer)
    say(f"training from step {reached} to {run.config.max_steps} with {run.config.method}, seed {run.recipe.seed}")
    stop = _StopOnSignal(run.trainer, say)
    run.trainer.add_callback(stop)
    with stop, kept_memory() if run.config.device.type == "cpu" else nullcontext():
        run.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return run.model, run.trainer.state.global_step


class _StopOnSignal(TrainerCallback):
    """The first Ctrl-C (or SIGTERM) ends training at the next rollout boundary, saved; the second at once."""

    def __init__(self, trainer: PolarityTrainer, say: Say) -> None:
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
