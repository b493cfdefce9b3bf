"""Where TRL's private parts are checked, and where its fused output head learns to return our statistics."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import trl
from packaging.version import Version
from trl import GRPOTrainer
from trl.trainer import utils as trl_utils

from entropy_polarity.kernels import linear_token_stats

TESTED_TRL = ("1.16", "1.17")


def check_trl() -> None:
    """Raise ImportError if the installed TRL is not one whose private seams were tested."""
    low, high = TESTED_TRL
    if Version(trl.__version__).release[:2] != Version(low).release[:2]:
        raise ImportError(
            f"entropy-polarity hooks private methods of TRL {low}, but TRL {trl.__version__} is installed: "
            f"pip install 'trl>={low},<{high}'"
        )
    seams = {
        "GRPOTrainer._compute_loss": (GRPOTrainer._compute_loss, {"model", "inputs"}),
        "GRPOTrainer._get_per_token_logps_and_entropies": (
            GRPOTrainer._get_per_token_logps_and_entropies,
            {"model", "input_ids", "logits_to_keep", "compute_entropy"},
        ),
        "GRPOTrainer._generate_and_score_completions": (
            GRPOTrainer._generate_and_score_completions,
            {"inputs"},
        ),
        "GRPOTrainer._calculate_rewards": (GRPOTrainer._calculate_rewards, {"inputs", "prompts"}),
        "ChunkedLogProbFunction": (
            trl_utils._ChunkedLogProbFunction.forward,
            {"hidden", "weight", "bias", "targets", "temperature", "outputs"},
        ),
    }
    for name, (function, wanted) in seams.items():
        missing = wanted - inspect.signature(function).parameters.keys()
        if missing:
            raise ImportError(
                f"TRL {trl.__version__}: {name} has no parameter {', '.join(sorted(missing))}; this is not the "
                f"TRL that entropy-polarity was tested with ({low})"
            )


check_trl()
_TRL_LOG_PROB = trl_utils._ChunkedLogProbFunction


class StatisticsHead:
    """Stands where TRL's fused log-prob function does, and is that function except within `requested()`.

    There log-probs and entropy are still TRL's own; Σp², T and Σp² log p ride in the slots of log Σp², the mean
    logit and top-1. Not an autograd function itself: the statistics carry no gradient.
    """

    forward = _TRL_LOG_PROB.forward  # what `check_trl` and TRL may inspect
    _requested = False

    @classmethod
    @contextmanager
    def requested(cls) -> Iterator[None]:
        cls._requested = True
        try:
            yield
        finally:
            cls._requested = False

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap=None, logit_scale=1.0, outputs=()):
        rest = (hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale)
        if not StatisticsHead._requested:
            return _TRL_LOG_PROB.apply(*rest, outputs)
        logp, entropy, *_ = _TRL_LOG_PROB.apply(*rest, ("log_probs", "entropy"))
        with torch.no_grad():
            stats = linear_token_stats(
                hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
                check=False,
            )  # fmt: skip
        return logp, entropy, stats.sum_p2, stats.sensitivity, stats.sum_p2_logp


trl_utils._ChunkedLogProbFunction = StatisticsHead  # type: ignore[assignment]
