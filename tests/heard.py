"""Training under watch: what an environment or a tool said must be in no statistic and get no gradient."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropy_polarity.trainers.trl import PolarityTrainer, Rollout


class Watched(NamedTuple):
    rollouts: list[Rollout]
    batches: list[dict[str, Any]]
    gradients: list[Tensor]


def written(rollout: Rollout) -> Tensor:
    """(B, T): the tokens that were packed, the policy's own."""
    own = torch.ones_like(rollout.tokens.response, dtype=torch.bool)
    return rollout.tokens.unpack(own, tuple(rollout.inputs["completion_ids"].shape))


def train_watched(trainer: PolarityTrainer) -> Watched:
    """Train, with the statistics of what the policy did not write made NaN before any method sees them."""
    watched = Watched([], [], [])

    def poisoned(inputs, *statistics, make=trainer._tokens):
        own = inputs["completion_mask"].bool() & inputs["tool_mask"].bool()
        return make(inputs, *(None if x is None else torch.where(own, x, torch.nan) for x in statistics))

    def watch_states(module, inputs, output):
        if output.requires_grad:
            output.register_hook(watched.gradients.append)

    trainer._tokens = poisoned
    trainer.on_rollout = watched.rollouts.append
    trainer.on_loss = lambda inputs, tokens: watched.batches.append(inputs)
    trainer.model.model.norm.register_forward_hook(watch_states)
    trainer.train()
    return watched


def assert_only_the_policy_is_learnt(trainer: PolarityTrainer, watched: Watched) -> None:
    rollout = watched.rollouts[0]
    tokens = rollout.tokens
    assert torch.equal(written(rollout), rollout.inputs["completion_mask"].bool() & rollout.inputs["tool_mask"].bool())
    for values in (rollout.weight, tokens.require("entropy"), tokens.require("sensitivity")):
        assert values.isfinite().all()
    for inputs, gradient in zip(watched.batches, watched.gradients, strict=True):
        # The state before a token is what foretells it; the last prompt token foretells the first.
        first = inputs["prompt_ids"].size(1) - 1
        foretelling = gradient[:, first : first + inputs["completion_ids"].size(1)]
        learnt = inputs["completion_mask"].bool() & inputs["tool_mask"].bool()
        assert not foretelling[~learnt].any()
        assert foretelling[learnt].any()
    logged = {name: value for row in trainer.state.log_history for name, value in row.items()}
    assert "polarity/entropy" in logged
    assert [name for name, value in logged.items() if value != value] == []
