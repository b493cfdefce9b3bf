"""Rollout batches with every column a method may ask for: random ones of a real softmax, and literal ones."""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache

import torch
from torch import Tensor

from entropy_polarity.controllers import Metrics, State
from entropy_polarity.kernels import token_stats
from entropy_polarity.maths import surviving_ratio
from entropy_polarity.tokens import Tokens
from entropy_polarity.transforms import Monitor, Transform

TOKEN_COLUMNS = ("logp", "old_logp", "entropy", "sensitivity", "importance")
PLACES = ("response", "position", "index")
OUTPUTS = ("advantages", "entropy_bonus", "ratio_penalty")


@cache
def sampled_batch(seed: int, scale: float = 2.0, groups: int = 4, size: int = 4, width: int = 6) -> Tokens:
    """Prompts x completions of a softmax over 12 words, rewarded 0 or 1, no group with equal rewards.

    A larger `scale` of the logits makes a lower entropy: 2 about 1.4 nats, 6 about 0.5. Do not write to it.
    """
    random = torch.Generator().manual_seed(seed)
    rows = groups * size
    logits = scale * torch.randn(rows, width, 12, generator=random)
    words = torch.multinomial(logits.flatten(0, 1).softmax(-1), 1, generator=random).view(rows, width)
    stats = token_stats(logits, words)
    old_logp = stats.logp + 0.3 * torch.randn(rows, width, generator=random)
    mask = torch.rand(rows, width, generator=random) < 0.8
    mask[:, 0] = True
    right = torch.rand(groups, size, generator=random).argsort(1) < torch.randint(
        1, size, (groups, 1), generator=random
    )
    reward = right.float()
    advantage = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)
    advantages = advantage.flatten()[:, None].repeat(1, width)
    return Tokens.pack(
        mask,
        advantages,
        logp=stats.logp,
        old_logp=old_logp,
        entropy=stats.entropy,
        sensitivity=stats.sensitivity,
        importance=surviving_ratio((stats.logp - old_logp).exp(), advantages, (0.2, 0.2)),
        reward=reward.flatten(),
        group=torch.arange(rows) // size,
        sample_id=torch.arange(rows),
    )


def literal(mask: list[list[int]] | None = None, **columns: list) -> Tokens:
    """The batch of these numbers, a list of rows for each column; all are model tokens unless `mask` says otherwise."""
    tensors = {name: torch.tensor(column) for name, column in columns.items()}
    advantages = tensors.pop("advantages")
    given = torch.tensor(mask).bool() if mask else torch.ones_like(advantages, dtype=torch.bool)
    return Tokens.pack(given, advantages, **tensors)


def in_double(tokens: Tokens) -> Tokens:
    return with_columns(tokens, lambda name, column: column.double() if column.is_floating_point() else column)


def with_columns(tokens: Tokens, change: Callable[[str, Tensor], Tensor]) -> Tokens:
    """Every column that is there, but for where the tokens stand, replaced by change(name, column)."""
    columns = {f.name: getattr(tokens, f.name) for f in fields(tokens) if f.name not in PLACES}
    return replace(tokens, **{name: change(name, x) for name, x in columns.items() if x is not None})


def rows(tokens: Tokens, *numbers: int) -> Tokens:
    """Only these responses."""
    return tokens.of_responses(torch.tensor(numbers, dtype=torch.long))


def split(tokens: Tokens, parts: int) -> list[Tokens]:
    """Micro-batches of as many responses each."""
    return [tokens.of_responses(part) for part in torch.arange(tokens.responses).chunk(parts)]


def run(
    transform: Transform, *rollouts: Tokens, state: State | None = None, monitor: Monitor | None = None
) -> tuple[Tokens, State, Metrics]:
    """What the last of these rollouts becomes; the state is written to JSON and read again after each. With a monitor
    the metrics are its own, too."""
    state = transform.init() if state is None else state
    result = None
    for tokens in rollouts:
        result, state, metrics = transform.update(tokens, state)
        if monitor is not None:
            metrics = monitor.measure(tokens, result) | metrics
        state = json.loads(json.dumps(state, allow_nan=False))
    assert result is not None
    return result, state, metrics


def outputs(tokens: Tokens) -> dict[str, Tensor]:
    """What a method may write, and the tokens that it kept."""
    columns = {name: getattr(tokens, name) for name in (*PLACES[:2], *OUTPUTS)}
    return {name: x for name, x in columns.items() if x is not None}


def by_row(tokens: Tokens, column: Tensor) -> list[list[float]]:
    """One list of numbers per response."""
    return [column[tokens.response == row].tolist() for row in range(tokens.responses)]
