"""What TRL's losses do with a token: which settings a method fixes, what is left of its policy gradient, how the
tokens are averaged. Each is tested against TRL's own loss.
"""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig

from entropy_polarity.maths import surviving_ratio
from entropy_polarity.tokens import Tokens
from entropy_polarity.trainers.loss_settings import to_set
from entropy_polarity.transforms import LossOverrides

CLIPPED_LOSSES = ("dapo", "grpo", "bnpo", "dr_grpo", "luspo")


def fix_loss(config: GRPOConfig, method: str, loss: LossOverrides) -> None:
    """Put what `method` fixes of the loss into `config`. Raises ValueError where the user asked for something else."""
    wanted = {
        "epsilon": loss.clip_low,
        "epsilon_high": loss.clip_high,
        "loss_type": "dapo" if loss.average == "token" else None,
    }
    defaults = {f.name: f.default for f in fields(GRPOConfig)}
    for name, value in to_set(method, wanted, vars(config), defaults).items():
        setattr(config, name, value)
    if loss.clip_low is not None and config.loss_type not in CLIPPED_LOSSES:
        raise ValueError(
            f"method {method!r} sets the PPO clip, which loss_type={config.loss_type!r} does not have: use one of "
            f"{', '.join(CLIPPED_LOSSES)}"
        )


def importance(trainer: Any, tokens: Tokens, correction: Tensor | None) -> Tensor:
    """w: what the loss of `trainer`, a GRPOTrainer, leaves of each token's policy gradient, as a factor on
    A grad log p, in a loss averaged as it averages tokens.

    Where the ratio is of whole sequences, s = exp(mean_t log r_t), each model token t of n has the gradient
    ds/dlog p_t = s / n of it, and the sequence counts as n tokens: w is s while the clip leaves the sequence alive,
    else 0, one value for all its tokens; a rollout engine's correction enters by its mean over them.

    Not counted: tokens that TRL masks by `top_entropy_quantile` or `off_policy_mask_threshold`. Source: TRL's losses.
    """
    args, advantages = trainer.args, tokens.advantages
    log_ratio = tokens.require("logp") - tokens.require("old_logp")
    sequences = trainer.importance_sampling_level == "sequence"
    ratio = (_sequence_mean(log_ratio, tokens.mask) if sequences else log_ratio).exp()
    if trainer.loss_type == "vespo":  # its weight holds the correction already
        return trainer.get_gamma_weights(
            advantages, log_ratio, tokens.mask, correction,
            args.vespo_k_pos, args.vespo_lambda_pos, args.vespo_k_neg, args.vespo_lambda_neg,
        ).expand_as(ratio)  # fmt: skip
    if trainer.loss_type == "cispo":  # its ratio has no gradient: each token has its own log p, and its own correction
        weight, sequences = ratio.clamp(max=trainer.epsilon_high), False
    elif trainer.loss_type == "sapo":
        gate = torch.sigmoid(
            torch.where(advantages > 0, args.sapo_temperature_pos, args.sapo_temperature_neg) * (ratio - 1)
        )
        weight = 4 * gate * (1 - gate) * ratio
    else:
        weight = surviving_ratio(ratio, advantages, (trainer.epsilon_low, trainer.epsilon_high))
        if args.delta is not None:  # TRL's second, outer clip
            weight = torch.where((advantages < 0) & (ratio > args.delta), 0.0, weight)
    if correction is None:
        return weight
    return weight * (_sequence_mean(correction.expand_as(weight), tokens.mask) if sequences else correction)


def _sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """(B, T): the mean over the model tokens of each row, repeated; as TRL takes it, 0 where there are none."""
    means = torch.where(mask, values, 0.0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return means.expand_as(values)


def averaged(trainer: Any, values: Tensor, mask: Tensor, inputs: dict[str, Any]) -> Tensor:
    """`values` (B, T) averaged over a micro-batch as TRL averages its policy loss, accumulation included."""
    accumulation = trainer.current_gradient_accumulation_steps
    values = torch.where(mask, values, 0.0)
    if trainer.loss_type in ("grpo", "sapo"):
        return (values.sum(-1) / mask.sum(-1).clamp(min=1)).mean() / accumulation
    if trainer.loss_type == "luspo":
        return values.sum(-1).mean() / accumulation
    if trainer.loss_type == "bnpo":
        return values.sum() / mask.sum().clamp(min=1) / accumulation
    if trainer.loss_type == "dr_grpo":
        return values.sum() / (len(values) * trainer.max_completion_length) / accumulation
    windows = trainer.args.steps_per_generation / accumulation  # the rollout's tokens are met in so many windows
    return values.sum() / (inputs["num_items_in_batch"].clamp(min=1) / trainer.accelerator.num_processes) * windows


def restrict(batch: dict[str, Any], mask: Tensor, tokens: Tensor) -> None:
    """Restrict the loss to `mask`, and its denominator to `tokens`, the number of model tokens on all ranks.

    TRL's `tool_mask` does that: the model still attends to what is masked.
    """
    batch["tool_mask"] = mask.to(batch["completion_mask"].dtype)
    batch["num_items_in_batch"] = tokens.to(batch["num_items_in_batch"].dtype)
