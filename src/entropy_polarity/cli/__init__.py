"""The `papo` command. Torch is imported inside the commands, so that help and errors are instant."""

import os
import sys
import warnings
from collections.abc import Callable

import tyro

from entropy_polarity import __version__
from entropy_polarity.cli.about import doctor, methods
from entropy_polarity.cli.common import readable
from entropy_polarity.cli.policies import evaluate, pretrain, report, train
from entropy_polarity.cli.studies import ablate, audit, compare

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


def main() -> None:
    """Bad input ends in one clear line and exit code 2; PAPO_DEBUG=1 shows the traceback instead."""
    if sys.argv[1:] == ["--version"]:
        return print(f"entropy-polarity {__version__}")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports every trainer: nobody here asked for that
    warnings.filterwarnings("ignore")
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="papo",
            description="Measure and control entropy. papo --version: which one; papo COMMAND --help: its flags.",
            config=(tyro.conf.DisallowNone,),
        )
    except KeyboardInterrupt as stop:
        how = str(stop) or "papo train --resume goes on with a run from its last checkpoint"
        print(f"papo: stopped; {how}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if os.environ.get("PAPO_DEBUG"):
            raise
        line = _one_line(error)
        if line is None:
            raise
        print(f"papo: {line}", file=sys.stderr)
        sys.exit(2)


def _one_line(error: BaseException | None) -> str | None:
    """What a user can act on; None for what is a bug and deserves its traceback."""
    chain = error
    while chain is not None:
        # Writers of checkpoints turn a full disk into errors of their own.
        full = ("No space left on device", "code: 28", "inline_container", "PytorchStreamWriter")
        if any(sign in str(chain) for sign in full):
            return "no space left on the device: free some, then go on with papo train --resume"
        chain = chain.__cause__ or chain.__context__
    package = error.name.partition(".")[0] if isinstance(error, ModuleNotFoundError) and error.name else None
    if package in ("trl", "transformers", "datasets", "accelerate"):
        return f"this needs TRL ({error}): pip install 'entropy-polarity[trl]'"
    if isinstance(error, ValueError | OSError | ImportError):
        return " ".join(str(error).split()) or type(error).__name__
    return None
