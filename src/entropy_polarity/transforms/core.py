"""What a transform is, and how transforms are put together.

A transform is a pair (init, update): `init()` gives its state, a JSON-able dict, and
`update(tokens, state) -> (tokens, state, metrics)` rewrites the advantages of a *whole* rollout batch (all
ranks) and moves the state on, so that no result depends on how the batch is split for training.

Some transforms rewrite each token from its own columns and the state alone. Their update has two halves: `local(tokens,
state)` rewrites, and gives the same advantages on any part of the batch, so that a trainer can apply it micro-batch by
micro-batch with the statistics of the forward pass it makes anyway; `advance(tokens, state)` moves the state on, once,
when the whole batch was seen.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_polarity.controllers import Metrics, State
from entropy_polarity.tokens import PER_RESPONSE, Tokens, is_finite

# Known when a rollout is rewarded, before any forward pass over it.
REWARD_COLUMNS = frozenset(PER_RESPONSE)


class LossOverrides(NamedTuple):
    """What a method fixes of the trainer's loss; None leaves the trainer's own setting.

    clip_low, clip_high   the PPO clip of the importance ratio, [1 - clip_low, 1 + clip_high]
    average               "token": the mean over all model tokens of the rollout
    """

    clip_low: float | None = None
    clip_high: float | None = None
    average: Literal["token"] | None = None

    def merge(self, other: "LossOverrides") -> "LossOverrides":
        """What both fix. Raises ValueError where they fix one setting to different values.

        >>> LossOverrides(0.2, 0.28).merge(LossOverrides(average="token"))
        LossOverrides(clip_low=0.2, clip_high=0.28, average='token')
        """
        mine, theirs = ({k: v for k, v in x._asdict().items() if v is not None} for x in (self, other))
        for name in mine:
            if theirs.get(name, mine[name]) != mine[name]:
                raise ValueError(f"one sets {name} to {mine[name]!r}, another to {theirs[name]!r}")
        return LossOverrides(**mine | theirs)


class Transform(NamedTuple):
    """`needs` names the columns of Tokens that `update` reads beside `advantages`, `response` and `position`.

    replaces_advantages   advantages are made anew from the rewards, whatever they were before
    entropy_gradient   the loss needs H with its gradient
    several_updates    with a single update on each rollout the method does nothing
    exact_every        on every so many rollouts, from the first, `update` reads exact_sensitivity too; 0: never
    """

    init: Callable[[], State]
    update: Callable[[Tokens, State], tuple[Tokens, State, Metrics]]
    local: Callable[[Tokens, State], Tokens] | None = None
    advance: Callable[[Tokens, State], tuple[State, Metrics]] | None = None
    needs: frozenset[str] = frozenset()
    loss: LossOverrides = LossOverrides()
    replaces_advantages: bool = False
    entropy_gradient: bool = False
    several_updates: bool = False
    exact_every: int = 0

    @property
    def decides_from(self) -> Literal["each token", "rewards", "whole batch"]:
        """From what: each token's own columns, in the training pass; the rollout's rewards; all its tokens, which takes
        one pass without gradient."""
        if self.local is not None:
            return "each token"
        return "rewards" if self.needs <= REWARD_COLUMNS else "whole batch"


def _stays(tokens: Tokens, state: State) -> tuple[State, Metrics]:
    return state, {}


def token_by_token(
    local: Callable[[Tokens, State], Tokens],
    *needs: str,
    init: Callable[[], State] = dict,
    advance: Callable[[Tokens, State], tuple[State, Metrics]] = _stays,
    entropy_gradient: bool = False,
) -> Transform:
    """The transform whose `local` needs nothing but each token's own columns, and whose state moves by `advance`."""

    def update(tokens: Tokens, state: State) -> tuple[Tokens, State, Metrics]:
        return local(tokens, state), *advance(tokens, state)

    return Transform(init, update, local, advance, frozenset(needs), entropy_gradient=entropy_gradient)


def rewriting(rewrite: Callable[[Tokens], Tokens], *needs: str, loss: LossOverrides | None = None) -> Transform:
    """The transform without state that is one function of the whole batch."""
    return Transform(
        dict,
        lambda tokens, state: (rewrite(tokens), state, {}),
        needs=frozenset(needs),
        loss=loss or LossOverrides(),
    )


def reweighted(tokens: Tokens, weight: Float[Tensor, " N"]) -> Tokens:
    """A' = A times `weight`. A weight that is NaN or infinite leaves its token as it is."""
    return replace(tokens, advantages=torch.where(is_finite(weight), tokens.advantages * weight, tokens.advantages))


def identity() -> Transform:
    """Change nothing."""
    return token_by_token(lambda tokens, state: tokens)


def chain(*transforms: Transform) -> Transform:
    """Apply transforms one after the other; local if all of them are. An empty chain is the identity.

    Each sees what the one before left: its advantages, and only the tokens that it did not drop. Raises ValueError
    where two of them fix one setting of the loss to different values, and where one that makes advantages anew would
    undo what stands before it.
    """
    if any(transform.replaces_advantages for transform in transforms[1:]):
        raise ValueError("one that makes advantages anew from the rewards undoes what stands before it: put it first")
    loss = LossOverrides()
    for transform in transforms:
        loss = loss.merge(transform.loss)

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

    all_local = all(t.local for t in transforms)
    return Transform(
        init,
        update,
        local if all_local else None,
        (lambda tokens, state: update(tokens, state)[1:]) if all_local else None,
        needs=frozenset().union(*(t.needs for t in transforms)),
        loss=loss,
        replaces_advantages=any(t.replaces_advantages for t in transforms),
        entropy_gradient=any(t.entropy_gradient for t in transforms),
        several_updates=any(t.several_updates for t in transforms),
        exact_every=math.gcd(*(t.exact_every for t in transforms)),  # often enough for each
    )
