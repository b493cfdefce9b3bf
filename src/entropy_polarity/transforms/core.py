"""What a transform is, and how transforms are put together.

A transform is a pair (init, update): `init()` gives its state, a JSON-able dict, and
`update(tokens, state) -> (tokens, state, metrics)` rewrites the advantages of a *whole* rollout batch (all
ranks) and moves the state on, so that no result depends on how the batch is split for training.

Some transforms rewrite each token from its own facts and the state alone. They also offer `local(tokens, state)`,
the rewriting without the move: it gives the same advantages on any part of the batch, so a trainer can apply it
micro-batch by micro-batch with the statistics of the forward pass it makes anyway.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_polarity.controllers import Metrics, State
from entropy_polarity.tokens import Tokens, is_finite

# Known when a rollout is rewarded, before any forward pass over it.
REWARD_FACTS = frozenset({"reward", "group", "sample_id"})


class LossOverrides(NamedTuple):
    """What a method fixes of the trainer's loss; None leaves the trainer's own setting.

    clip_low, clip_high   the PPO clip of the importance ratio, [1 - clip_low, 1 + clip_high]
    average               "token": the mean over all model tokens of the rollout
    """

    clip_low: float | None = None
    clip_high: float | None = None
    average: Literal["token"] | None = None

    def merge(self, other: "LossOverrides") -> "LossOverrides":
        """Both; where both fix a setting, this one."""
        return self._replace(**{name: value for name, value in other._asdict().items() if getattr(self, name) is None})


class Transform(NamedTuple):
    """`needs` names the fields of Tokens that `update` reads beside mask and advantages, and two facts that are no
    fields: "entropy_grad", H with gradient in the loss; "reuse", several updates on a rollout. On every
    `exact_every`-th rollout, counted from the first, `update` reads the field exact_sensitivity too; 0: never."""

    init: Callable[[], State]
    update: Callable[[Tokens, State], tuple[Tokens, State, Metrics]]
    local: Callable[[Tokens, State], Tokens] | None = None
    needs: frozenset[str] = frozenset()
    loss: LossOverrides = LossOverrides()
    exact_every: int = 0

    @property
    def decides_from(self) -> Literal["each token", "rewards", "whole batch"]:
        """From what: each token's own facts, in the training pass; the rollout's rewards; all its tokens, which takes
        one pass without gradient."""
        if self.local is not None:
            return "each token"
        return "rewards" if self.needs <= REWARD_FACTS else "whole batch"


def rewriting(
    rewrite: Callable[[Tokens], Tokens], *needs: str, local: bool = False, loss: LossOverrides | None = None
) -> Transform:
    """The transform without state that is one function of the tokens; `local` if each token's own facts suffice."""
    return Transform(
        dict,
        lambda tokens, state: (rewrite(tokens), state, {}),
        (lambda tokens, state: rewrite(tokens)) if local else None,
        frozenset(needs),
        loss or LossOverrides(),
    )


def reweighted(tokens: Tokens, weight: Float[Tensor, "B T"]) -> Tokens:
    """A' = A times `weight` on model tokens. A weight that is NaN or infinite leaves its token as it is."""
    usable = tokens.mask & is_finite(weight)
    return replace(tokens, advantages=torch.where(usable, tokens.advantages * weight, tokens.advantages))


def identity() -> Transform:
    """Change nothing."""
    return rewriting(lambda tokens: tokens, local=True)


def chain(*transforms: Transform) -> Transform:
    """Apply transforms one after the other; local if all of them are. An empty chain is the identity."""

    def init() -> State:
        return {str(i): transform.init() for i, transform in enumerate(transforms)}

    def update(tokens: Tokens, state: State) -> tuple[Tokens, State, Metrics]:
        states, metrics = {}, {}
        for key, transform in zip(state, transforms, strict=True):
            tokens, states[key], more = transform.update(tokens, state[key])
            metrics |= more
        return tokens, states, metrics

    def local(tokens: Tokens, state: State) -> Tokens:
        for key, transform in zip(state, transforms, strict=True):
            assert transform.local is not None
            tokens = transform.local(tokens, state[key])
        return tokens

    needs: frozenset[str] = frozenset().union(*(t.needs for t in transforms))
    loss = LossOverrides()
    for transform in transforms:
        loss = transform.loss.merge(loss)
    exact_every = math.gcd(*(t.exact_every for t in transforms))  # often enough for each
    return Transform(init, update, local if all(t.local for t in transforms) else None, needs, loss, exact_every)
