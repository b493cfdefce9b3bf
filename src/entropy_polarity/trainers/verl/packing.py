"""verl's padded batch with the workers' nested columns as Tokens, and padded values as a nested column."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from entropy_polarity.tokens import Tokens
from entropy_polarity.trainers.verl.workers import ENTROPY, SENSITIVITY


def tokens_of(batch: Any, sent: Any, keys: list[str], lengths: list[int]) -> Tokens:
    """A batch of verl's as Tokens (B, T). `batch` is padded; what the workers `sent` is nested (B, j), prompt and
    response long, each value one place before its token. `lengths` are those of the responses. Raises RuntimeError
    where they cannot be."""
    mask = batch["response_mask"].bool()
    width = mask.shape[1]
    if min(lengths) < 0 or max(lengths) != width or (mask & ~_within(lengths, width)).any():
        raise RuntimeError(
            "entropy-polarity: the tags response_len are not the lengths of the responses: whatever puts rollouts into "
            "TransferQueue has to write them, as verl's own agent loop does"
        )

    def model(name: str) -> Tensor:
        values, ends = sent[name].values(), sent[name].offsets()[1:].tolist()
        rows = [values[end - 1 - length : end - 1] for end, length in zip(ends, lengths, strict=True)]
        return pad_sequence(rows, batch_first=True)

    parts = [_parts(key) for key in keys]
    number = {prompt: i for i, prompt in enumerate(sorted({prompt for prompt, _, _ in parts}))}
    rank = {part: i for i, part in enumerate(sorted(parts))}
    return Tokens(
        mask=mask,
        advantages=batch["advantages"],
        logp=batch["old_log_probs"],
        old_logp=batch["old_log_probs"],
        entropy=model(ENTROPY),
        sensitivity=model(SENSITIVITY),
        importance=batch.get("rollout_is_weights"),
        reward=batch["rm_scores"].sum(1),
        group=torch.tensor([number[prompt] for prompt, _, _ in parts]),
        sample_id=torch.tensor([rank[part] for part in parts]),
    )


def nested(values: Tensor, lengths: list[int]) -> Tensor:
    """Padded values (B, T) as a nested (B, j) column of rows so long."""
    return torch.nested.as_nested_tensor([r[:n] for r, n in zip(values, lengths, strict=True)], layout=torch.jagged)


def _within(lengths: list[int], width: int) -> Tensor:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def _parts(key: str) -> tuple[str, int, int]:
    """verl's keys are {prompt}_{session}_{output}."""
    prompt, session, output = key.rsplit("_", 2)
    return prompt, int(session), int(output)
