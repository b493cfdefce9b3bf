"""Sequences of a batch that TRL has generated, and the exact sensitivities of its tokens."""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from entropy_polarity.diagnostics.entropy import (
    Sequences,
    accumulation_dtype,
    entropy_gradient,
    trainable_parameters,
)
from entropy_polarity.diagnostics.exact import exact_sensitivity
from entropy_polarity.tokens import Tokens
from entropy_polarity.trainers.trl.packing import at


def sequences_of(inputs: dict[str, Any], tokens: Tokens) -> Sequences:
    """Prompts and completions of a batch as TRL lays it out; their mask is True at the `tokens`."""
    if "pixel_values" in inputs:
        raise ValueError("exact polarity looks at text alone, and this batch has images")
    mask = tokens.unpack(torch.ones_like(tokens.response, dtype=torch.bool), tuple(inputs["completion_ids"].shape))
    return Sequences(
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        pad(mask, (inputs["prompt_ids"].size(1), 0)),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
    )


def concatenate_sequences(parts: Iterable[Sequences]) -> Sequences:
    """The rows of several micro-batches of one rollout, which TRL pads alike."""
    return Sequences(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def exact_sensitivity_of(
    accelerator: Accelerator, model: torch.nn.Module, inputs: dict[str, Any], tokens: Tokens, temperature: float
) -> Float[Tensor, " N"]:
    """N T* of this process's model tokens, N and the mean entropy over those of all processes.

    One backward, and one forward pass with derivatives; the random state and the gradients are not touched.
    """
    sequences, own = sequences_of(inputs, tokens), torch.tensor(len(tokens.response), device=tokens.response.device)

    def summed(value: Tensor) -> Tensor:
        return accelerator.reduce(value.clone(), "sum")  # type: ignore[return-value]

    model, count = accelerator.unwrap_model(model), summed(own)
    if own > 0:
        entropy, g = entropy_gradient(model, sequences, temperature=temperature)
    else:
        parameters = trainable_parameters(model).items()
        entropy, g = 0.0, {name: torch.zeros_like(p, dtype=accumulation_dtype(p.dtype)) for name, p in parameters}
    if accelerator.num_processes > 1:
        g = {name: summed(part * (own / count)) for name, part in g.items()}
    if own == 0:
        return torch.zeros_like(tokens.advantages)
    found = exact_sensitivity(model, sequences, gradient=(entropy, g), temperature=temperature).sensitivity
    return at(tokens, found[:, inputs["prompt_ids"].size(1) :]) * count
