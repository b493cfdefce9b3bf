"""Exact sensitivities of a rollout that TRL has generated."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from entropy_polarity.diagnostics.entropy import (
    Sequences,
    accumulation_dtype,
    entropy_gradient,
    trainable_parameters,
)
from entropy_polarity.diagnostics.exact import exact_sensitivity

if TYPE_CHECKING:
    from entropy_polarity.trainers.trl import PolarityTrainer


def sequences_of(inputs: dict[str, Any], mask: Bool[Tensor, "B T"]) -> Sequences:
    """Prompts and completions of a batch as TRL lays it out; `mask` is True at the model tokens."""
    if "pixel_values" in inputs:
        raise ValueError("exact polarity looks at text alone, and this batch has images")
    return Sequences(
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        pad(mask, (inputs["prompt_ids"].size(1), 0)),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
    )


def joined(parts: Iterable[Sequences]) -> Sequences:
    """The rows of several micro-batches of one rollout, which TRL pads alike."""
    return Sequences(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def exact_sensitivity_of(
    trainer: "PolarityTrainer", inputs: dict[str, Any], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """N T* of this process's model tokens, N and the mean entropy over those of all processes.

    One backward, and one forward pass with derivatives; the random state and the gradients are not touched.
    """
    sequences, own = sequences_of(inputs, mask), mask.sum()
    model, count = trainer.accelerator.unwrap_model(trainer.model), _summed(trainer, own)
    temperature = trainer.temperature
    if own > 0:
        entropy, g = entropy_gradient(model, sequences, temperature=temperature)
    else:
        parameters = trainable_parameters(model).items()
        entropy, g = 0.0, {name: torch.zeros_like(p, dtype=accumulation_dtype(p.dtype)) for name, p in parameters}
    if trainer.accelerator.num_processes > 1:
        g = {name: _summed(trainer, part * (own / count)) for name, part in g.items()}
    if own == 0:
        return torch.zeros_like(mask, dtype=torch.float32)
    found = exact_sensitivity(model, sequences, gradient=(entropy, g), temperature=temperature).sensitivity
    return found[:, -mask.size(1) :] * count


def _summed(trainer: "PolarityTrainer", value: Tensor) -> Tensor:
    """Over all processes."""
    total = trainer.accelerator.reduce(value.clone(), "sum")
    assert isinstance(total, Tensor)
    return total
