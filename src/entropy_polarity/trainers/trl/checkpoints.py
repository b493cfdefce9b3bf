"""TRL checkpoints that are complete, lie between rollouts and hold the method's state.

TRL itself ignores missing files on resuming and rotates by date.
"""

import math
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from entropy_polarity.controllers import State
from entropy_polarity.runs.checkpoints import begin, finish, last_of, refuse_broken, refuse_in_the_way, rotate
from entropy_polarity.runs.method_state import load_state
from entropy_polarity.support.damage import damaged_file
from entropy_polarity.trainers.trl.config import PolarityConfig
from entropy_polarity.transforms import Monitor, Transform

# What torch.load raises for a file that is none of its own, or holds more than tensors.
_UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, AttributeError, TypeError)


def refuse_what_cannot_resume(trainer: Any, checkpoint: Path) -> None:
    """Raise FileNotFoundError or ValueError, in one line, where `trainer` would not go on from `checkpoint` on the same
    path: a file is missing, was changed or cannot be read, or it is of another method or inside a rollout."""
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"no checkpoint at {checkpoint}: give a folder that a trainer saved")
    if trainer.args.local_process_index == 0:  # the others of this machine see the same files

        def go_on(whole: Path) -> str:
            return f"resume_from_checkpoint={str(whole)!r} goes on from the last whole one"

        if not refuse_broken(checkpoint, go_on):
            warnings.warn(f"{checkpoint} has no sums of its files: an older version saved it", stacklevel=3)
            if (damage := damaged_file(checkpoint)) is not None:
                raise ValueError(f"{damage}: resume from another checkpoint")
    load_state(checkpoint, trainer.args.method, trainer.args.settings, trainer.checkpoint_state)
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:  # these keep files of their own, and miss them
        return
    for name, pattern in (("optimizer.pt", "optimizer.*"), ("scheduler.pt",) * 2, ("rng_state.pth", "rng_state*.pth")):
        if not any(checkpoint.glob(pattern)):
            raise FileNotFoundError(
                f"{checkpoint} has no {name}, without which training takes another path (save_only_model=True leaves "
                "it out): resume from another checkpoint"
            )


@contextmanager
def naming_the_file(checkpoint: str | None, *names: str) -> Iterator[None]:
    """Errors of torch.load name no file: find out which of `names` it was."""
    try:
        yield
    except _UNREADABLE:
        for file in filter(Path.is_file, (Path(str(checkpoint), name) for name in names)):
            try:
                with safe_globals():
                    torch.load(file, map_location="cpu", weights_only=True)
            except _UNREADABLE as error:
                wrong = str(error).partition(".")[0].partition("\n")[0]
                raise ValueError(f"{file} cannot be read as PyTorch's tensors and numbers ({wrong})") from None
        raise


class RolloutBoundaries(TrainerCallback):
    """Checkpoints only between rollouts: a save that falls inside one waits for its end."""

    def __init__(self, trainer: "CheckpointedTrainer") -> None:
        self.trainer = trainer
        self.waiting = False

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.at_rollout_boundary:
            control.should_save |= self.waiting
            self.waiting = False
        elif control.should_save and state.global_step < state.max_steps:
            control.should_save, self.waiting = False, True


class CheckpointedTrainer(GRPOTrainer):
    """GRPOTrainer with checkpoints that are whole or refused, and the state of the method in them."""

    args: PolarityConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    transform: Transform
    method_state: State  # of the transform, fixed for all updates on a rollout
    monitor: Monitor
    _limit: int | None = None  # of checkpoints, while a training keeps it from TRL

    @property
    def steps_per_generation(self) -> int:
        assert self.args.steps_per_generation is not None  # GRPOConfig fills it in
        return self.args.steps_per_generation

    @property
    def micro_steps_per_rollout(self) -> int:
        return self.steps_per_generation * self.num_iterations

    @property
    def at_rollout_boundary(self) -> bool:
        """Whether every update on the last rollout batch has been made: where a run can be resumed."""
        return self._step % self.micro_steps_per_rollout == 0

    @property
    def checkpoint_state(self) -> State:
        """What a checkpoint holds of the method: its state, and the monitor's last entropy."""
        return {"entropy": self.monitor.entropy, "inner": self.method_state}

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """As GRPOTrainer's. A checkpoint to resume from must be whole: ValueError names the file that is missing or was
        changed, and the last whole checkpoint beside it. True is the last that was saved to its end."""
        reached = 0
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_of(Path(str(self.args.output_dir)), resumable=True) or True
        if isinstance(resume_from_checkpoint, str | Path):
            refuse_what_cannot_resume(self, Path(resume_from_checkpoint))
            resume_from_checkpoint = str(resume_from_checkpoint)
            reached = TrainerState.load_from_json(f"{resume_from_checkpoint}/{TRAINER_STATE_NAME}").global_step
        # Now, and not after hours of training, when it is to be saved there.
        last = self.args.max_steps if self.args.max_steps > 0 else math.inf
        refuse_in_the_way(Path(str(self.args.output_dir)), reached, last)
        # Old checkpoints go only when the new one is whole: TRL's own rotation would come before, goes by date, and may
        # end by deleting all that is called checkpoint-* but the best.
        self._limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.args.save_total_limit = self._limit

    def _save_checkpoint(self, model, trial):
        run = Path(self._get_output_dir(trial=trial))
        folder = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            begin(folder)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            finish(folder, self.args.method, self.args.settings, self.checkpoint_state, self.at_rollout_boundary)
            best = self.state.best_model_checkpoint
            rotate(folder, self._limit, Path(best) if best else None)
        self.accelerator.wait_for_everyone()  # every process that reads it from here on finds it whole

    def _load_optimizer_and_scheduler(self, checkpoint):
        with naming_the_file(checkpoint, "optimizer.pt", "scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            saved = load_state(Path(checkpoint), self.args.method, self.args.settings, self.checkpoint_state)
            self.monitor, self.method_state = Monitor(saved["entropy"]), saved["inner"]

    def _load_rng_state(self, checkpoint):
        with naming_the_file(checkpoint, "rng_state.pth", f"rng_state_{self.args.process_index}.pth"):
            super()._load_rng_state(checkpoint)
