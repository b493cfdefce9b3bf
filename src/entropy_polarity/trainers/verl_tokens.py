"""verl's columns, nested (B, j) tensors, as Tokens, and back."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from entropy_polarity.tokens import Tokens
from entropy_polarity.trainers.verl_engine import ENTROPY, SENSITIVITY

READ = ("uid", "response_mask", "rm_scores", "advantages", "old_log_probs", "rollout_is_weights", ENTROPY, SENSITIVITY)


def tokens_of(data: Any, keys: list[str]) -> Tokens:
    """A batch of verl's as Tokens (B, T). What the model computed at a token stands one place before it, for prompt and
    response; everything else is as long as the response."""
    lengths = data["response_mask"].offsets().diff()
    held = inside(lengths, int(lengths.max()))
    ends = data[SENSITIVITY].offsets()[1:]
    of_response = torch.zeros(len(data[SENSITIVITY].values()) + 1, dtype=torch.int8)
    of_response[ends - lengths - 1] += 1  # from one place before the response's first token,
    of_response[ends - 1] -= 1  # to before its last
    of_response = of_response[:-1].cumsum(0, dtype=torch.int8).nonzero()[:, 0]

    def padded(values: Tensor) -> Tensor:
        return torch.zeros(held.shape, dtype=values.dtype).masked_scatter_(held, values)

    def response(name: str) -> Tensor:
        return padded(data[name].values())

    def model(name: str) -> Tensor:
        return padded(data[name].values()[of_response])

    prompts = [str(uid) for uid in list(data["uid"])]
    number = {prompt: i for i, prompt in enumerate(sorted(set(prompts)))}
    order = {key: rank for rank, key in enumerate(sorted(keys, key=_by_parts))}
    logp = response("old_log_probs")
    tokens = Tokens(
        mask=response("response_mask").bool(),
        advantages=response("advantages"),
        logp=logp,
        old_logp=logp,
        entropy=model(ENTROPY),
        sensitivity=model(SENSITIVITY),
        reward=response("rm_scores").sum(1),
        group=torch.tensor([number[prompt] for prompt in prompts]),
        sample_id=torch.tensor([order[key] for key in keys]),
    )
    if "rollout_is_weights" in data:
        tokens = replace(tokens, importance=response("rollout_is_weights"))
    return tokens


def column_of(data: Any, name: str, new: Tensor, real: Tensor) -> Tensor:
    """The values (b, T) of the rows `real` as a nested column; the other rows keep theirs, or have 0."""
    mask = data["response_mask"]
    lengths = mask.offsets().diff()
    old = data[name].values() if name in data else torch.zeros(mask.values().shape, dtype=new.dtype)
    values = new.to(old.dtype)[inside(lengths[real], new.shape[1])]
    if not real.all():
        values = old.masked_scatter(real.repeat_interleave(lengths), values)
    return torch.nested.nested_tensor_from_jagged(values, mask.offsets())


def inside(lengths: Tensor, width: int) -> Tensor:
    """Where a padded (B, T) holds a response."""
    return torch.arange(width) < lengths[:, None]


def _by_parts(key: str) -> tuple[str, int, int]:
    """Keys are {prompt}_{session}_{output}."""
    prompt, session, output = key.rsplit("_", 2)
    return prompt, int(session), int(output)
