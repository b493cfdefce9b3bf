"""The metrics of a batch, measured around any method."""

import math
from dataclasses import replace

import torch

from entropy_polarity.controllers import Metrics, State
from entropy_polarity.maths import branch_flows, predicted_entropy_change
from entropy_polarity.tokens import Tokens, is_finite, masked_fraction
from entropy_polarity.transforms.batch import mean_entropy
from entropy_polarity.transforms.core import Transform
from entropy_polarity.transforms.weights import token_polarity


def measure(before: Tokens, after: Tokens, state: State) -> tuple[State, Metrics]:
    """Every polarity metric of a batch whose method made `after` of `before`; the state is the last entropy."""
    p = token_polarity(before)
    (entropy, _), (positive, negative) = mean_entropy(before), branch_flows(p, before.mask)
    changed = (after.advantages != before.advantages) | (before.mask & ~after.mask)
    for term in (after.entropy_bonus, after.ratio_penalty):
        if term is not None:
            changed = changed | (term != 0)
    metrics = {
        "polarity/lambda": 0.0,
        "polarity/entropy": entropy,
        "polarity/positive_flow": positive.item(),
        "polarity/negative_flow": negative.item(),
        "polarity/positive_fraction": masked_fraction(p > 0, before.mask),
        "polarity/changed_fraction": masked_fraction(changed, before.mask),
        "polarity/predicted_entropy_change": predicted_entropy_change(token_polarity(after), after.mask).item(),
        "polarity/nonfinite_tokens": float((~is_finite(p) & before.mask).count_nonzero()),
    }
    metrics |= by_turn(before, after)
    if state["entropy"] is not None:
        metrics["polarity/realised_entropy_change"] = entropy - state["entropy"]
    return {"entropy": entropy if math.isfinite(entropy) else state["entropy"]}, metrics


def by_turn(before: Tokens, after: Tokens) -> Metrics:
    """Entropy, branch flows and what was made of the advantages in each turn; nothing where no response has two.

        pressure of turn n = Σ |A'| / Σ |A|        over the tokens of all n-th turns, n from 1

    A turn is a run of model tokens: between two of them an environment speaks. λ is the same for all turns of a
    rollout; the pressure says which turns it reaches. It is 1 where a turn has no advantage.
    """
    begins = before.mask & ~torch.nn.functional.pad(before.mask, (1, 0))[:, :-1]
    turns = int(begins.count_nonzero(1).max()) if begins.numel() else 0
    if turns < 2:
        return {}
    p, turn = token_polarity(before), begins.cumsum(1).where(before.mask, 0)
    metrics: Metrics = {}
    for number in range(1, turns + 1):
        mask = turn == number
        (entropy, _), (positive, negative) = mean_entropy(replace(before, mask=mask)), branch_flows(p, mask)
        given, made = (t.advantages.abs()[mask & t.mask].sum().item() for t in (before, after))
        metrics |= {
            f"polarity/entropy_turn_{number}": entropy,
            f"polarity/positive_flow_turn_{number}": positive.item(),
            f"polarity/negative_flow_turn_{number}": negative.item(),
            f"polarity/pressure_turn_{number}": made / given if given else 1.0,
        }
    return metrics


def monitored(inner: Transform) -> Transform:
    """`inner` with the metrics of `measure` around it; the advantages are its own.

    Where `inner` decides from rewards alone there may be no statistics yet: then nothing is measured, and who makes
    them later calls `measure`.
    """

    def init() -> State:
        return {"entropy": None, "inner": inner.init()}

    def update(tokens: Tokens, state: State) -> tuple[Tokens, State, Metrics]:
        rewritten, inner_state, inner_metrics = inner.update(tokens, state["inner"])
        seen, metrics = {"entropy": state["entropy"]}, {}
        if tokens.sensitivity is not None:
            seen, metrics = measure(tokens, rewritten, seen)
        return rewritten, {**seen, "inner": inner_state}, metrics | inner_metrics

    def local(tokens: Tokens, state: State) -> Tokens:
        assert inner.local is not None
        return inner.local(tokens, state["inner"])

    return Transform(init, update, local if inner.local else None, inner.needs, inner.loss, inner.exact_every)
