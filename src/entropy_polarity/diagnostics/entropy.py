"""The entropy of whole sequences under a model: at every sampled token, on average, and the gradient of that average.

All of it runs in `in_eval_mode`, over a few sequences at a time, and leaves parameters, gradients, modes and the random
state to the bit as they were. Source: ours.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from entropy_polarity.kernels import token_stats
from entropy_polarity.kernels.state import accumulation_dtype
from entropy_polarity.support.modes import evaluating
from entropy_polarity.tokens import TokenStats

Parameters = dict[str, Tensor]

# The memory of the logits and activations of the sequences that go through the model together.
CHUNK_BYTES = 2**28


class Sequences(NamedTuple):
    """Whole sequences, prompts included. `mask` is True at the tokens that the policy sampled, which the first of a
    sequence never is; `attention_mask` is 0 at padding, and None where there is none."""

    input_ids: Int[Tensor, "B S"]
    mask: Bool[Tensor, "B S"]
    attention_mask: Int[Tensor, "B S"] | None = None

    def rows(self, index: Int[Tensor, " N"] | slice) -> "Sequences":
        return Sequences(*(None if column is None else column[index] for column in self))  # type: ignore[arg-type]


def entropy_gradient(
    model: nn.Module, states: Sequences, *, temperature: float = 1.0, chunk_bytes: int = CHUNK_BYTES
) -> tuple[float, Parameters]:
    """The mean entropy at the sampled tokens of `states`, in nats, and its gradient g in every trainable parameter.

    g is summed in float32 or float64, whatever the type of the parameters. Raises ValueError for masks that are empty,
    do not fit, or hold padding or a first token; for a model without trainable parameters; under inference_mode; and
    where `token_stats` does.
    """
    check_sequences(states)
    if torch.is_inference_mode_enabled():
        raise ValueError("entropy_gradient needs gradients, and inference_mode forbids them; use no_grad around it")
    parameters, count = trainable_parameters(model), states.mask.sum()
    gradient = {name: torch.zeros_like(p, dtype=accumulation_dtype(p.dtype)) for name, p in parameters.items()}
    total = 0.0
    with in_eval_mode(model), torch.enable_grad():
        for chunk in chunks(model, states, chunk_bytes):
            logits, tokens, mask = predictions(model, model, chunk)
            stats = token_stats(logits, tokens, temperature=temperature, mask=mask, entropy_grad=True)
            share = stats.entropy.sum() / count
            parts = torch.autograd.grad(share, [*parameters.values()], allow_unused=True)
            for sums, part in zip(gradient.values(), parts, strict=True):
                if part is not None:
                    sums += part
            total += share.item()
    return total, gradient


def sequence_stats(
    model: nn.Module,
    sequences: Sequences,
    *,
    temperature: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
    check_logits: Callable[[Tensor], None] | None = None,
) -> TokenStats:
    """The statistics of every sampled token under `model`, (B, S) each, without gradient; 0 where nothing was sampled.
    `check_logits` may refuse the logits of a chunk. Raises ValueError as `entropy_gradient` does for the sequences."""
    check_sequences(sequences)
    parts = []
    with in_eval_mode(model), torch.no_grad():
        for chunk in chunks(model, sequences, chunk_bytes):
            logits, tokens, mask = predictions(model, model, chunk)
            if check_logits is not None:
                check_logits(logits)
            parts.append(token_stats(logits, tokens, temperature=temperature, mask=mask))
    # 0 at the first tokens, which nothing predicts
    return TokenStats(*(nn.functional.pad(torch.cat(columns), (1, 0)) for columns in zip(*parts, strict=True)))


def predictions(
    model: nn.Module, call: Callable[..., Any], batch: Sequences
) -> tuple[Float[Tensor, "b s V"], Int[Tensor, "b s"], Bool[Tensor, "b s"]]:
    """The logits of every token but the first, the tokens themselves, and which of them were sampled."""
    inputs = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.attention_mask is not None:
        inputs["attention_mask"] = batch.attention_mask
        base = getattr(model, "get_base_model", lambda: model)()
        if "position_ids" in inspect.signature(base.forward).parameters:  # padding on the left is no position
            inputs["position_ids"] = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    return call(**inputs).logits[:, :-1], batch.input_ids[:, 1:], batch.mask[:, 1:]


def chunks(model: Any, batch: Sequences, chunk_bytes: int) -> Iterator[Sequences]:
    """The sequences in parts whose logits and, by and large, activations take `chunk_bytes`."""
    config = model.config.get_text_config()
    width = config.vocab_size + 16 * config.num_hidden_layers * config.hidden_size
    rows = max(1, chunk_bytes // (batch.input_ids.shape[1] * width * next(model.parameters()).element_size()))
    for start in range(0, len(batch.input_ids), rows):
        yield batch.rows(slice(start, start + rows))


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name. Raises ValueError where there is none."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not parameters:
        raise ValueError("no parameter of the model requires a gradient; nothing could move")
    return parameters


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """The model without dropout and without autocast; its modes are put back at the end."""
    with evaluating(model), torch.autocast(next(model.parameters()).device.type, enabled=False):
        yield


def check_sequences(batch: Sequences) -> None:
    """Raise ValueError for sequences that do not fit together, or in which nothing can have been sampled."""
    shapes = [tuple(x.shape) for x in batch if x is not None]
    if len(set(shapes)) > 1 or batch.input_ids.dim() != 2:
        raise ValueError(f"Sequences have shapes {', '.join(map(str, shapes))}; expected one (B, S) for all")
    if batch.mask.dtype != torch.bool or not batch.mask.any() or batch.mask[:, 0].any():
        raise ValueError(
            "Sequences: the mask must be boolean, True at one token or more and never at the first of a sequence, "
            "which nothing predicts"
        )
    if batch.attention_mask is not None and (batch.mask & (batch.attention_mask == 0)).any():
        raise ValueError("Sequences: the mask is True where attention_mask is 0; padding was not sampled")
