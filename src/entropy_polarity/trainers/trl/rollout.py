"""What lives as long as one rollout batch, from its generation to the last update on it, or one micro-batch of it."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_polarity.controllers import Metrics, State
from entropy_polarity.tokens import Tokens


class Statistics(NamedTuple):
    """Padded columns of a forward pass, (B, T) each, without gradient."""

    logp: Tensor
    entropy: Tensor
    sensitivity: Tensor | None = None


@dataclass(repr=False, eq=False)
class Rollout:
    """One rollout batch of this process, in the order of generation.

    rewards     (B,), NaN where nothing could judge
    statistics  of the pass that TRL makes for old log-probs while it generates, where it makes one and a method asks
    inputs      TRL's batch, with TRL's own advantages (B,); empty while it is generated
    tokens      its N model tokens with TRL's own advantages and, from the end of the first pass over them on, their
                statistics and w. Every token has been seen once. Where a rollout is split over several updates, later
                micro-batches were seen by a policy already updated on earlier ones
    after       what the method made of them, with the w of its advantages; those that it left, where it dropped some
                (`index`)
    following   the method's state for the next rollout
    seen, made  the micro-batches of the first pass, before and after a method that decides there, until its end
    decision    (tokens, what the method made of them, its metrics) of all processes; held until it is measured, at the
                end of the first pass
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
    decision: tuple[Tokens, Tokens, Metrics] = field(init=False)
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
    """A micro-batch in the loss: the model, the copy of the batch that TRL reads, and the tokens of its loss, which are
    there once the forward pass was made."""

    model: Any
    inputs: dict[str, Any]
    tokens: Tokens = field(init=False)
