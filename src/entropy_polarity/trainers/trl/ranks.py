"""The tokens of all processes: each sends as many values as the process with the most tokens has, and no padding."""

from dataclasses import fields, replace

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import pad

from entropy_polarity.tokens import Tokens
from entropy_polarity.transforms.core import REWARD_COLUMNS

_PER_RESPONSE = sorted(REWARD_COLUMNS)  # in one order on every process


def gather_columns(accelerator: Accelerator, columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """Columns of tokens, (N,) each with the N of this process, of all processes one after the other."""
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
    of_responses = {name: _gathered(accelerator, columns.pop(name)) for name in _PER_RESPONSE}
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
    whole = accelerator.gather(value.contiguous())
    assert isinstance(whole, Tensor)
    return whole
