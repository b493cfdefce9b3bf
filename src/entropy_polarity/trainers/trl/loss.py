"""What TRL's losses do with a token: which settings a method fixes, what is left of its policy gradient, how the
tokens are averaged. Each is tested against TRL's own loss.
"""

from dataclasses import fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from trl import GRPOConfig

from entropy_polarity.maths import surviving_ratio
from entropy_polarity.tokens import Tokens, mean
from entropy_polarity.trainers.loss import fixed_settings
from entropy_polarity.trainers.trl.packing import at
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
    for name, value in fixed_settings(method, wanted, vars(config), defaults).items():
        setattr(config, name, value)
    if loss.clip_low is not None and config.loss_type not in CLIPPED_LOSSES:
        raise ValueError(
            f"method {method!r} sets the PPO clip, which loss_type={config.loss_type!r} does not have: use one of "
            f"{', '.join(CLIPPED_LOSSES)}"
        )


def importance(trainer: Any, tokens: Tokens, correction: Float[Tensor, "B _"] | None) -> Float[Tensor, " N"]:
    """w: what the loss of `trainer`, a GRPOTrainer, leaves of each token's policy gradient, as a factor on
    A grad log p, in a loss averaged as it averages tokens.

    Where the ratio is of whole sequences, s = exp(mean_t log r_t), each model token t of n has the gradient
    ds/dlog p_t = s / n of it, and the sequence counts as n tokens: w is s while the clip leaves the sequence alive,
    else 0, one value for all its tokens; a rollout engine's `correction`, padded (B, T) or (B, 1), enters by its mean
    over them.

    Not counted: tokens that TRL masks by `top_entropy_quantile` or `off_policy_mask_threshold`. Source: TRL's losses.
    """
    args, advantages = trainer.args, tokens.advantages
    log_ratio = tokens.require("logp") - tokens.require("old_logp")
    if trainer.loss_type == "vespo":  # its weight holds the correction already
        return _vespo_weight(trainer, tokens, log_ratio, correction)
    sequences = trainer.importance_sampling_level == "sequence"
    ratio = (_sequence_mean(log_ratio, tokens) if sequences else log_ratio).exp()
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
    of_token = at(tokens, correction)
    return weight * (_sequence_mean(of_token, tokens) if sequences else of_token)


def _vespo_weight(trainer: Any, tokens: Tokens, log_ratio: Tensor, correction: Tensor | None) -> Float[Tensor, " N"]:
    """TRL's own function makes it, of padded columns."""
    args, rows = trainer.args, tokens.responses if correction is None else len(correction)
    shape = (rows, int(tokens.position.max()) + 1 if len(tokens.position) else 1)
    padded = (tokens.unpack(x, shape) for x in (tokens.advantages, log_ratio, torch.ones_like(log_ratio)))
    weight = trainer.get_gamma_weights(
        *padded, correction, args.vespo_k_pos, args.vespo_lambda_pos, args.vespo_k_neg, args.vespo_lambda_neg
    )
    return at(tokens, weight.expand(shape))


def _sequence_mean(values: Float[Tensor, " N"], tokens: Tokens) -> Float[Tensor, " N"]:
    """The mean over the tokens of each response, repeated."""
    return _response_means(values, tokens, tokens.responses)[tokens.response]


def _response_means(values: Float[Tensor, " N"], tokens: Tokens, rows: int) -> Float[Tensor, " B"]:
    """The mean over each response, 0 of none, summed in the precision of the values, as TRL sums."""
    sums, counts = (values.new_zeros(rows).index_add(0, tokens.response, x) for x in (values, torch.ones_like(values)))
    return sums / counts.clamp(min=1)


def averaged(trainer: Any, values: Float[Tensor, " N"], tokens: Tokens, inputs: dict[str, Any]) -> Float[Tensor, ""]:
    """`values` of the `tokens` of a micro-batch, averaged as TRL averages its policy loss, accumulation included."""
    accumulation, rows = trainer.current_gradient_accumulation_steps, len(inputs["completion_ids"])
    if trainer.loss_type in ("grpo", "sapo"):
        return _response_means(values, tokens, rows).mean() / accumulation
    if trainer.loss_type == "luspo":
        return values.sum() / rows / accumulation
    if trainer.loss_type == "bnpo":
        return mean(values) / accumulation
    if trainer.loss_type == "dr_grpo":
        return values.sum() / (rows * trainer.max_completion_length) / accumulation
    # The number of optimiser steps over which the rollout is spread.
    steps = trainer.args.steps_per_generation / accumulation
    return values.sum() / (inputs["num_items_in_batch"].clamp(min=1) / trainer.accelerator.num_processes) * steps
