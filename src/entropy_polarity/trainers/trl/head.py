"""Check TRL's private interfaces, replace its fused log-prob function, and verify the weights that it loads."""

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from operator import attrgetter
from types import SimpleNamespace
from typing import NamedTuple

import torch
import trl
from packaging.version import Version
from torch import Tensor
from trl.trainer import grpo_trainer
from trl.trainer import utils as trl_utils

from entropy_polarity.kernels import linear_token_stats
from entropy_polarity.support.weights import load_whole

logger = logging.getLogger("entropy_polarity")
warn_once = cache(logger.warning)

TESTED_TRL = (1, 16)

# Every private method and function that is overridden, replaced or called, and the parameters that it is relied on to
# have. Attributes that are read, such as `_step` and `_metrics`, are not checked.
_SEAMS = {
    grpo_trainer: {
        "GRPOTrainer._compute_loss": {"model", "inputs"},
        "GRPOTrainer._get_per_token_logps_and_entropies": {"model", "input_ids", "logits_to_keep", "compute_entropy"},
        "GRPOTrainer._generate_and_score_completions": {"inputs"},
        "GRPOTrainer._calculate_rewards": {"inputs", "prompts"},
        "GRPOTrainer._save_checkpoint": {"model", "trial"},
        "GRPOTrainer._load_optimizer_and_scheduler": {"checkpoint"},
        "GRPOTrainer._load_rng_state": {"checkpoint"},
        "GRPOTrainer._get_output_dir": {"trial"},
        "GRPOTrainer.get_gamma_weights": {"log_ratio_per_token", "mask", "importance_sampling_ratio", "k_pos", "k_neg"},
        "create_model_from_path": {"model_id", "kwargs"},
        "disable_gradient_checkpointing": {"model", "gradient_checkpointing_kwargs"},
    },
    trl_utils: {
        "_ChunkedLogProbFunction.forward": {"hidden", "weight", "bias", "targets", "temperature", "outputs"},
    },
}


def seams() -> dict[str, set[str]]:
    """What is hooked in TRL, and the parameters that each part should have but does not."""
    return {
        name: wanted - inspect.signature(attrgetter(name)(module)).parameters.keys()
        for module, parts in _SEAMS.items()
        for name, wanted in parts.items()
    }


def check_trl() -> None:
    """Raise ImportError if the installed TRL is not one whose private seams were tested."""
    tested, following = (f"{TESTED_TRL[0]}.{TESTED_TRL[1] + more}" for more in (0, 1))
    if Version(trl.__version__).release[:2] != TESTED_TRL:
        raise ImportError(
            f"entropy-polarity hooks private methods of TRL {tested}, but TRL {trl.__version__} is installed: "
            f"pip install 'trl>={tested},<{following}'"
        )
    for name, missing in seams().items():
        if missing:
            raise ImportError(
                f"TRL {trl.__version__}: {name} has no parameter {', '.join(sorted(missing))}; this is not the "
                f"TRL that entropy-polarity was tested with ({tested})"
            )


@contextmanager
def loading_whole() -> Iterator[None]:
    """While TRL loads what it was given by name, policy, reference and reward models, weights that do not fit raise
    ValueError; see `load_whole`."""
    by_path, reward = grpo_trainer.create_model_from_path, grpo_trainer.AutoModelForSequenceClassification
    grpo_trainer.create_model_from_path = partial(load_whole, by_path)
    checked = SimpleNamespace(from_pretrained=partial(load_whole, reward.from_pretrained))
    grpo_trainer.AutoModelForSequenceClassification = checked  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        grpo_trainer.create_model_from_path, grpo_trainer.AutoModelForSequenceClassification = by_path, reward


check_trl()
_TRL_LOG_PROB = trl_utils._ChunkedLogProbFunction

HEADS = ("fused", "trl")


class Request(NamedTuple):
    """What a trainer wants of the output head: whose it is, and what it returns."""

    head: str  # "fused": ours; "trl": TRL's, and a second product for the statistics
    statistics: bool  # T rides in the slot of the mean logit
    entropy_grad: bool  # whether the loss uses the entropy


class StatisticsHead:
    """Stands where TRL's fused log-prob function does, and is that function unless a `Request` is being served."""

    forward = _TRL_LOG_PROB.forward  # what `check_trl` and TRL may inspect
    _request: Request | None = None

    @classmethod
    @contextmanager
    def serving(cls, request: Request) -> Iterator[None]:
        before, cls._request = cls._request, request
        try:
            yield
        finally:
            cls._request = before

    @staticmethod
    @torch.compiler.disable
    def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap=None, logit_scale=1.0, outputs=()):
        trl_arguments = (hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale)
        request = StatisticsHead._request
        if request is None:
            return _TRL_LOG_PROB.apply(*trl_arguments, outputs)
        head = {"bias": bias, "temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
        reason = why_not_fused(weight, softcap, logit_scale)
        if request.head == "fused" and reason is None:
            stats = linear_token_stats(hidden, weight, targets, **head, entropy_grad=request.entropy_grad, check=False)
            logp, entropy = stats.logp, stats.entropy
        else:
            if reason is not None and request.head == "fused":
                warn_once(f"TRL's own output head is used, and a second product: {reason}")
            logp, entropy, *rest = _TRL_LOG_PROB.apply(*trl_arguments, ("log_probs", "entropy"))
            if not request.statistics:
                return logp, entropy, *rest
            with torch.no_grad():
                stats = linear_token_stats(hidden, weight, targets, **head, check=False)
        return logp, entropy, None, stats.sensitivity if request.statistics else None, None


def why_not_fused(weight: Tensor, softcap: float | None, logit_scale: float) -> str | None:
    """Why our head cannot serve a model, or None."""
    if hasattr(weight, "ds_id"):
        return "DeepSpeed ZeRO-3 shards the head, and only TRL's gathers it again in the backward"
    if logit_scale <= 0 or (softcap is not None and softcap <= 0):
        return f"logit_scale={logit_scale} and softcap={softcap}, expected positive numbers"
    return None


trl_utils._ChunkedLogProbFunction = StatisticsHead  # type: ignore[assignment]
