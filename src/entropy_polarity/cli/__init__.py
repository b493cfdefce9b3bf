"""The `papo` command. Torch is imported inside the commands, so that help and errors are instant."""

import errno
import io
import os
import pickle
import sys
import warnings
from collections.abc import Callable

import tyro

from entropy_polarity import __version__
from entropy_polarity.cli.about import doctor, methods
from entropy_polarity.cli.common import readable
from entropy_polarity.cli.policies import evaluate, pretrain, report, train
from entropy_polarity.cli.studies import ablate, audit, compare
from entropy_polarity.support.text import one_line

COMMANDS: dict[str, Callable[..., None]] = {
    "train": readable(train),
    "eval": readable(evaluate),
    "compare": readable(compare),
    "ablate": readable(ablate),
    "audit": readable(audit),
    "report": readable(report),
    "methods": readable(methods),
    "pretrain": readable(pretrain),
    "doctor": readable(doctor),
}
_FULL = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG") if hasattr(errno, name)}
# How safetensors and torch say it.
_SIGNS_OF_A_FULL_DISK = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large (os error",
    "code: 28",
    "inline_container",
    "PytorchStreamWriter",
)


def main() -> None:
    """Bad input ends in one clear line and exit code 2; PAPO_DEBUG=1 shows the traceback instead."""
    if sys.argv[1:] == ["--version"]:
        return print(f"entropy-polarity {__version__}")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports every trainer: nobody here asked for that
    warnings.filterwarnings("ignore")
    _escape_unknown_characters()
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="papo",
            description="Measure and control entropy. papo --version: which one; papo COMMAND --help: its flags.",
            config=(tyro.conf.DisallowNone,),
        )
    except KeyboardInterrupt as stop:
        how = str(stop) or "papo train --resume goes on with a run from its last checkpoint"
        print(one_line(f"papo: stopped; {how}"), file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        line = _one_line(error)
        if line is None or os.environ.get("PAPO_DEBUG"):
            raise
        print(f"papo: {line}", file=sys.stderr)
        sys.exit(2)


def _escape_unknown_characters() -> None:
    """A terminal whose encoding lacks a character gets an escape in its place: no command ends by what it prints."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _one_line(error: BaseException | None) -> str | None:
    """An error in a line that a user can act on; None for a bug, which deserves its traceback."""
    if _disk_is_full(error):
        return "no space left on the device: free some, then go on with papo train --resume"
    package = error.name.partition(".")[0] if isinstance(error, ModuleNotFoundError) and error.name else None
    if package in ("trl", "transformers", "datasets", "accelerate", "tokenizers"):
        return f"this needs TRL ({error}): pip install 'entropy-polarity[trl]'"
    if isinstance(error, pickle.UnpicklingError):
        return "a file of the checkpoint or model holds a pickle that could run code, or is damaged: it was not read"
    if isinstance(error, OSError) and error.strerror:
        return one_line(f"{error.filename or 'a file that the system does not name'}: {error.strerror}")
    if isinstance(error, ValueError | OSError | ImportError):
        return one_line(error, limit=2500) or type(error).__name__  # commands to copy stand at the end
    return None


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether an error means a full disk, a quota or a limit: writers of checkpoints make errors of their own of it."""
    while error is not None:
        told = isinstance(error, OSError) and error.errno in _FULL
        if told or any(sign in str(error) for sign in _SIGNS_OF_A_FULL_DISK):
            return True
        error = error.__cause__ or error.__context__
    return False
