"""Transforms: pure functions that rewrite the advantages of a rollout batch.

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
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_polarity.phase import Controller, Metrics, Observation, State
from entropy_polarity.polarity import branch_flows, polarity, predicted_entropy_change
from entropy_polarity.tokens import Tokens, masked_mean


class Transform(NamedTuple):
    init: Callable[[], State]
    update: Callable[[Tokens, State], tuple[Tokens, State, Metrics]]
    local: Callable[[Tokens, State], Tokens] | None = None


def identity() -> Transform:
    """Change nothing: GRPO."""
    return Transform(dict, lambda tokens, state: (tokens, state, {}), local=lambda tokens, state: tokens)


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

    return Transform(init, update, local if all(t.local for t in transforms) else None)


def token_polarity(tokens: Tokens) -> Float[Tensor, "B T"]:
    """P = w A T of every token of a batch."""
    return polarity(tokens.advantages, tokens.known("sensitivity"), tokens.importance)


def observe(tokens: Tokens) -> Observation:
    """What a controller sees of a batch: mean entropy and the two branch flows.

    Tokens whose entropy is not finite are left out; with none left the entropy is NaN, not 0.
    """
    positive, negative = branch_flows(token_polarity(tokens), tokens.mask)
    entropy = tokens.known("entropy")
    usable = tokens.mask & entropy.isfinite()
    mean = masked_mean(entropy, usable).item() if usable.any() else math.nan
    return Observation(mean, positive.item(), negative.item())


def polarity_weight(tokens: Tokens, lam: float, soft_sign: float = 0.0) -> Float[Tensor, "B T"]:
    """PAPO's weight 1 + λ s of every token, strictly positive for |λ| < 1.

    s = sign(P), or with `soft_sign` δ > 0 the smooth s = P / (|P| + δ), so that rounding noise near P = 0 does
    not flip a weight. A token whose P is NaN or infinite has s = 0.
    """
    p = token_polarity(tokens)
    p = torch.where(p.isfinite(), p, 0.0)
    s = p.sign() if soft_sign == 0 else p / (p.abs() + soft_sign)
    return 1 + lam * s


def polarity_weights(controller: Controller, soft_sign: float = 0.0, conserve: bool = False) -> Transform:
    """PAPO: A' = A (1 + λ_k s), λ_k steered by `controller`, one λ for all updates on rollout k.

    With `conserve` A' is rescaled so that Σ|A'| = Σ|A|: pressure is moved, none is added. That needs the whole
    batch, so the transform is then not local. Source: arXiv 2605.11775 (the idea), ours (the rule).
    """
    if not soft_sign >= 0:
        raise ValueError(f"soft_sign is {soft_sign}; expected a width >= 0 in nats (0 for the hard sign)")

    def local(tokens: Tokens, state: State) -> Tokens:
        return _reweight(tokens, state["lambda"])

    def _reweight(tokens: Tokens, lam: float) -> Tokens:
        advantages = tokens.advantages * polarity_weight(tokens, lam, soft_sign)
        if conserve:
            before = masked_mean(tokens.advantages.abs(), tokens.mask)
            after = masked_mean(advantages.abs(), tokens.mask)
            advantages = advantages * torch.where(after > 0, before / after, 1.0)
        return replace(tokens, advantages=advantages)

    def init() -> State:
        return {"lambda": controller.start, "controller": controller.init()}

    def update(tokens: Tokens, state: State) -> tuple[Tokens, State, Metrics]:
        following, inner, metrics = controller.update(observe(tokens), state["controller"])
        lam = state["lambda"] if controller.causal else following
        state = {"lambda": following, "controller": inner}
        return _reweight(tokens, lam), state, {"polarity/lambda": lam, **metrics}

    return Transform(init, update, local if controller.causal and not conserve else None)


def monitored(inner: Transform) -> Transform:
    """`inner` with every polarity metric of the batch measured around it; the advantages are its own."""

    def init() -> State:
        return {"entropy": None, "inner": inner.init()}

    def update(tokens: Tokens, state: State) -> tuple[Tokens, State, Metrics]:
        p, observed = token_polarity(tokens), observe(tokens)
        rewritten, inner_state, inner_metrics = inner.update(tokens, state["inner"])
        metrics = {
            "polarity/lambda": 0.0,
            "polarity/entropy": observed.entropy,
            "polarity/positive_flow": observed.positive_flow,
            "polarity/negative_flow": observed.negative_flow,
            "polarity/positive_fraction": masked_mean((p > 0).to(p.dtype), tokens.mask).item(),
            "polarity/predicted_entropy_change": predicted_entropy_change(
                token_polarity(rewritten), tokens.mask
            ).item(),
            "polarity/nonfinite_tokens": float((~p.isfinite() & tokens.mask).sum()),
        }
        if state["entropy"] is not None:
            metrics["polarity/realised_entropy_change"] = observed.entropy - state["entropy"]
        entropy = observed.entropy if math.isfinite(observed.entropy) else state["entropy"]
        return rewritten, {"entropy": entropy, "inner": inner_state}, metrics | inner_metrics

    def local(tokens: Tokens, state: State) -> Tokens:
        assert inner.local is not None
        return inner.local(tokens, state["inner"])

    return Transform(init, update, local if inner.local else None)
