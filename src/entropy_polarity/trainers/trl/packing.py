"""From TRL's padded batches to packed tokens, of this process and of all, and what a method made of them back."""

from dataclasses import fields, replace
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn.functional import pad

from entropy_polarity.tokens import PER_RESPONSE, Tokens, concatenate
from entropy_polarity.trainers.loss import TERMS

# Columns of Tokens that travel with TRL's batch through its shuffle and split, and how they are called there.
COLUMNS = {name: f"polarity_{name}" for name in PER_RESPONSE} | TERMS
# Where a method dropped tokens from the loss: all that the policy wrote, (B, T).
WRITTEN = "polarity_model_tokens"


def loss_mask(inputs: dict[str, Any]) -> Bool[Tensor, "B T"]:
    """The tokens that TRL's loss is about."""
    mask = inputs["completion_mask"].bool()
    return mask & inputs["tool_mask"].bool() if "tool_mask" in inputs else mask


def at(tokens: Tokens, padded: Shaped[Tensor, "B ..."]) -> Shaped[Tensor, " N"]:
    """The values of a padded column at the tokens: of (B, T), or of (B,) or (B, 1) repeated over each response."""
    if padded.dim() == 1 or padded.size(1) == 1:
        return padded.flatten()[tokens.response]
    return padded[tokens.response, tokens.position]


def packed(inputs: dict[str, Any], **columns: Float[Tensor, "B T"] | None) -> Tokens:
    """The tokens of a batch that the policy wrote, dropped ones too, with these padded columns and the batch's own."""
    own = {name: inputs.get(column) for name, column in COLUMNS.items()}
    mask = inputs[WRITTEN] if WRITTEN in inputs else loss_mask(inputs)
    return Tokens.pack(mask, inputs["advantages"], **own, **columns)


def without_dropped(inputs: dict[str, Any], tokens: Tokens) -> Tokens:
    """Those of the packed tokens of a batch that are in its loss."""
    return tokens.select(at(tokens, loss_mask(inputs))) if WRITTEN in inputs else tokens


def in_order(parts: list[Tokens]) -> Tokens:
    """The tokens of all micro-batches of a rollout, in the order of generation."""
    tokens = concatenate(parts)
    return tokens.of_responses(tokens.require("sample_id").argsort())


def made_columns(tokens: Tokens) -> dict[str, Tensor]:
    """The columns that a method makes."""
    return {name: column for name in ("advantages", *TERMS) if (column := getattr(tokens, name)) is not None}


def as_decided(before: Tokens, after: Tokens) -> Tokens:
    """What became of the tokens `before` in the decision `after`, which was made on fewer of their columns."""
    if after.index is not None:
        kept = torch.zeros_like(before.response, dtype=torch.bool)
        before = before.select(kept.index_fill(0, after.index, True))
    return replace(before, **made_columns(after))


def advantages_for_trl(inputs: dict[str, Any], tokens: Tokens) -> Float[Tensor, "..."]:
    """The advantages of `tokens` as TRL reads them; other places keep what they have in `inputs`.

    They are (B,) where all tokens of each response have the same, as TRL's own are: losses and metrics of whole
    sequences are then TRL's. Else (B, T).
    """
    given, made = inputs["advantages"].to(tokens.advantages.dtype), tokens.advantages
    if given.dim() == 1:
        of_response = given.clone()
        of_response[tokens.response] = made  # any one of a response's tokens
        if torch.equal(of_response[tokens.response], made):
            return of_response
        given = given[:, None].expand(inputs["completion_mask"].shape)
    return given.index_put((tokens.response, tokens.position), made)


def for_the_loss(inputs: dict[str, Any], decided: Tokens, count: int) -> dict[str, Any]:
    """TRL's batch with what a method decided on its tokens, of which `count` are left on all processes.

    Where some were dropped, TRL's `tool_mask` takes them out of the loss and `num_items_in_batch` out of its
    denominator; the model still attends to them.
    """
    batch = inputs | {"advantages": advantages_for_trl(inputs, decided)}
    shape = tuple(inputs["completion_mask"].shape)
    for name, column in TERMS.items():
        if (term := getattr(decided, name)) is not None:
            batch[column] = decided.unpack(term, shape)
    if decided.index is not None:
        batch[WRITTEN] = loss_mask(inputs)
        batch["tool_mask"] = decided.unpack(inputs["completion_mask"].new_ones(len(decided.response)), shape)
        batch["num_items_in_batch"] = torch.full_like(inputs["num_items_in_batch"], count)
    return batch


def gather_columns(accelerator: Accelerator, columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """Columns of tokens, (N,) each with the N of this process, of all processes one after the other. Each sends as many
    values as the process with the most tokens has, and no padding of responses."""
    if accelerator.num_processes == 1 or not columns:
        return columns
    own = next(iter(columns.values()))
    counts = _gathered(accelerator, torch.tensor([len(own)], device=own.device)).tolist()
    longest = max(1, *counts)
    joined = {}
    for name, column in columns.items():
        parts = _gathered(accelerator, pad(column, (0, longest - len(column)))).view(len(counts), longest)
        joined[name] = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    return joined


def gather_tokens(accelerator: Accelerator, tokens: Tokens) -> Tokens:
    """The tokens of all processes, of which each has equally many responses, numbered in the order of processes."""
    if accelerator.num_processes == 1:
        return tokens
    first = len(tokens.require("reward")) * accelerator.process_index
    columns = {f.name: column for f in fields(tokens) if (column := getattr(tokens, f.name)) is not None}
    of_responses = {name: _gathered(accelerator, columns.pop(name)) for name in PER_RESPONSE}
    return Tokens(**gather_columns(accelerator, columns | {"response": tokens.response + first}), **of_responses)


def own_part(accelerator: Accelerator, whole: Tokens, after: Tokens) -> Tokens:
    """This process's part of `after`, which a method made of `whole`, the tokens of all processes."""
    if accelerator.num_processes == 1:
        return after
    rows = len(whole.require("reward")) // accelerator.num_processes
    first = rows * accelerator.process_index
    part = after.of_responses(torch.arange(first, first + rows, device=whole.response.device))
    if part.index is None:
        return part
    return replace(part, index=part.index - (whole.response < first).count_nonzero())


def _gathered(accelerator: Accelerator, value: Tensor) -> Tensor:
    return accelerator.gather(value.contiguous())  # type: ignore[return-value]
