"""What must be whole before TRL goes on from a checkpoint: it takes what it finds, and is silent about the rest."""

import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from entropy_polarity._damage import damaged_file
from entropy_polarity.checkpoints import refuse_broken
from entropy_polarity.method_state import load_state

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
    load_state(checkpoint, trainer.args.method, trainer.args.settings, trainer.transform.init())
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
        for file in (Path(str(checkpoint), name) for name in names):
            if file.is_file() and (wrong := _unreadable(file)):
                raise ValueError(f"{file} cannot be read as PyTorch's tensors and numbers ({wrong})") from None
        raise


def _unreadable(file: Path) -> str | None:
    from transformers.trainer_pt_utils import safe_globals

    try:
        with safe_globals():
            torch.load(file, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        return str(error).partition(".")[0].partition("\n")[0]
    return None
