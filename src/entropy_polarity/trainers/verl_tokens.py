"""verl's columns, nested (B, j) tensors, as Tokens, and back."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from entropy_polarity.tokens import Tokens
from entropy_polarity.trainers.verl_engine import ENTROPY, SENSITIVITY

READ = ("response_mask", "advantages", "rollout_is_weights", ENTROPY, SENSITIVITY)
READ_FOR = {"reward": "rm_scores", "logp": "old_log_probs", "old_logp": "old_log_probs"}


def columns_for(needs: Iterable[str]) -> list[str]:
    """The columns to read for a method that reads the fields `needs` of Tokens: each of millions of tokens costs."""
    return [*READ, *sorted({READ_FOR[need] for need in needs if need in READ_FOR})]


def tokens_of(data: Any, keys: list[str]) -> Tokens:
    """A batch of verl's as Tokens (B, T), of the columns that were read. What the model computed at a token stands one
    place before it, for prompt and response; everything else is as long as the response."""
    lengths = data["response_mask"].offsets().diff().tolist()

    def padded(values: Tensor) -> Tensor:
        return pad_sequence(list(values.split(lengths)), batch_first=True)

    def read(name: str) -> Tensor | None:
        return padded(data[name].values()) if name in data else None

    def model(name: str) -> Tensor:
        values, ends = data[name].values(), data[name].offsets()[1:].tolist()
        rows = [values[end - 1 - length : end - 1] for end, length in zip(ends, lengths, strict=True)]
        return pad_sequence(rows, batch_first=True)

    parts = [_parts(key) for key in keys]
    number = {prompt: i for i, prompt in enumerate(sorted({prompt for prompt, _, _ in parts}))}
    rank = {part: i for i, part in enumerate(sorted(parts))}
    logp, scores = read("old_log_probs"), read("rm_scores")
    return Tokens(
        mask=padded(data["response_mask"].values().bool()),
        advantages=padded(data["advantages"].values()),
        logp=logp,
        old_logp=logp,
        entropy=model(ENTROPY),
        sensitivity=model(SENSITIVITY),
        importance=read("rollout_is_weights"),
        reward=None if scores is None else scores.sum(1),
        group=torch.tensor([number[prompt] for prompt, _, _ in parts]),
        sample_id=torch.tensor([rank[part] for part in parts]),
    )


def column_of(data: Any, name: str, new: Tensor, real: Tensor) -> Tensor:
    """The values (b, T) of the rows `real` as a nested column; the other rows keep theirs, or have 0."""
    offsets = data["response_mask"].offsets()
    lengths = offsets.diff().tolist()
    old = data[name].values() if name in data else torch.zeros(sum(lengths), dtype=new.dtype)
    rows = list(old.split(lengths))
    for row, values in zip(real.nonzero()[:, 0].tolist(), new.to(old.dtype), strict=True):
        rows[row] = values[: lengths[row]]
    return torch.nested.nested_tensor_from_jagged(torch.cat(rows), offsets)


def _parts(key: str) -> tuple[str, int, int]:
    """verl's keys are {prompt}_{session}_{output}."""
    prompt, session, output = key.rsplit("_", 2)
    return prompt, int(session), int(output)
