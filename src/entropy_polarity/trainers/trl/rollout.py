"""What lives as long as one rollout batch: from its generation to the last update on it."""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_polarity.controllers import Metrics, State
from entropy_polarity.tokens import Tokens, concatenate
from entropy_polarity.trainers.trl.passes import Statistics


class Decision(NamedTuple):
    """What a method made of the tokens of all processes, and its own metrics."""

    before: Tokens
    after: Tokens
    metrics: Metrics


@dataclass(repr=False, eq=False)
class Rollout:
    """One rollout batch of this process, in the order of generation.

    rewards     (B,), NaN where nothing could judge
    statistics  of the pass that TRL makes for old log-probs while it generates, where it makes one and a method asks
    inputs      TRL's batch, with TRL's own advantages (B,); empty while it is generated
    tokens      its N model tokens with TRL's own advantages and, from the end of the first pass over them on, the
                statistics of the policy that sampled them
    after       what the method made of them; those that it left, where it dropped some (`index`)
    following   the method's state for the next rollout
    seen, made  the micro-batches of the first pass, before and after a method that decides there, until its end
    decision    of all processes; held until it is measured, at the end of the first pass
    metrics     of the batch of all processes: the monitor's and the method's own
    """

    rewards: Float[Tensor, " B"] = field(init=False)
    statistics: Statistics | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    tokens: Tokens = field(init=False)
    after: Tokens = field(init=False)
    following: State = field(init=False)
    seen: list[Tokens] = field(default_factory=list)
    made: list[Tokens] = field(default_factory=list)
    decision: Decision = field(init=False)
    metrics: Metrics = field(default_factory=dict)

    @property
    def weight(self) -> Float[Tensor, " N"]:
        """A' / A of each token: 1 where A is 0, and else 0 where the token was dropped."""
        given, made = self.tokens.advantages, self.after.advantages
        if self.after.index is not None:
            made = torch.zeros_like(given).index_copy(0, self.after.index, made)
        return torch.where(given == 0, 1.0, made / given)


@dataclass
class MicroBatch:
    """What goes through TRL's loss in place of the model, which it only hands on to the hook of the forward pass.

    `inputs` is the copy of the batch that TRL reads; `tokens` are those of its loss, once the pass was made.
    """

    model: Any
    inputs: dict[str, Any]
    tokens: Tokens | None = None


def in_order(parts: list[Tokens]) -> Tokens:
    """The tokens of all micro-batches of a rollout, in the order of generation."""
    tokens = concatenate(parts)
    return tokens.of_responses(tokens.require("sample_id").argsort())


def made_columns(tokens: Tokens) -> dict[str, Tensor]:
    """The columns that a method makes."""
    columns = {name: getattr(tokens, name) for name in ("advantages", "entropy_bonus", "ratio_penalty")}
    return {name: column for name, column in columns.items() if column is not None}


def as_decided(before: Tokens, after: Tokens) -> Tokens:
    """What became of the tokens `before` in the decision `after`, which was made on fewer of their columns."""
    if after.index is not None:
        kept = torch.zeros_like(before.response, dtype=torch.bool)
        before = before.select(kept.index_fill(0, after.index, True))
    return replace(before, **made_columns(after))
