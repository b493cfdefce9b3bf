"""The metrics of a rollout batch: what its update would do to the entropy, and what a method made of that."""

import math

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from entropy_polarity.controllers import Metrics
from entropy_polarity.maths import branch_flows, predicted_entropy_change
from entropy_polarity.tokens import Tokens, finite, is_finite, share_of
from entropy_polarity.transforms.batch import mean_entropy, segment_sums
from entropy_polarity.transforms.weights import token_polarity


class Monitor:
    """Measures each rollout batch once, beside whatever method decides on it.

    `entropy` is that of the last batch, None before the first, for the change from one batch to the next.
    """

    def __init__(self, entropy: float | None = None) -> None:
        self.entropy = entropy

    def measure(self, before: Tokens, after: Tokens) -> Metrics:
        """Every polarity metric of a batch, all ranks, whose method made `after` of `before`.

        Every token has been seen once. Where a rollout is split over several updates, later micro-batches were seen by
        a policy already updated on earlier ones. Where the method dropped tokens, `after` says in its `index` which it
        kept; the entropy and the flows are of all.
        """
        p = token_polarity(before)
        (entropy, _), (positive, negative) = mean_entropy(before), branch_flows(p)
        metrics = {
            "polarity/lambda": 0.0,  # of a method without a controller; the others say theirs
            "polarity/entropy": entropy,
            "polarity/positive_flow": positive.item(),
            "polarity/negative_flow": negative.item(),
            "polarity/positive_fraction": share_of(p > 0),
            "polarity/changed_fraction": share_of(_changed(before, after)),
            "polarity/predicted_entropy_change": predicted_entropy_change(token_polarity(after)).item(),
            "polarity/nonfinite_tokens": float((~is_finite(p)).count_nonzero()),
        }
        metrics |= by_turn(before, after)
        if self.entropy is not None:
            metrics["polarity/realised_entropy_change"] = entropy - self.entropy
        if math.isfinite(entropy):
            self.entropy = entropy
        return metrics


def _changed(before: Tokens, after: Tokens) -> Bool[Tensor, " N"]:
    """Where a token was dropped, got another advantage, or has a term in the loss."""
    changed = after.advantages != (before.advantages if after.index is None else before.advantages[after.index])
    for term in (after.entropy_bonus, after.ratio_penalty):
        if term is not None:
            changed = changed | (term != 0)
    if after.index is None:
        return changed
    return torch.ones_like(before.advantages, dtype=torch.bool).index_copy(0, after.index, changed)


def by_turn(before: Tokens, after: Tokens) -> Metrics:
    """Entropy, branch flows and what was made of the advantages in each turn; nothing where no response has two.

        pressure of turn n = Σ |A'| / Σ |A|        over the tokens of all n-th turns, n from 1

    A turn is a run of model tokens: between two of them an environment speaks. λ is the same for all turns of a
    rollout; the pressure says which turns it reaches. It is 1 where a turn has no advantage.
    """
    turn = turns_of(before)
    turns = int(turn.max()) + 1 if len(turn) else 0
    if turns < 2:
        return {}
    p, entropy = finite(token_polarity(before)), before.require("entropy")
    known = is_finite(entropy)

    def sums(values: Tensor, of: Tensor = turn) -> Tensor:
        return segment_sums(values, of, turns)

    count, given = sums(torch.ones_like(p)), sums(before.advantages.abs())
    made = sums(after.advantages.abs(), turn if after.index is None else turn[after.index])
    metrics = {
        "entropy": sums(torch.where(known, entropy, 0.0)) / sums(known),
        "positive_flow": sums(p.clamp(min=0)) / count,
        "negative_flow": sums((-p).clamp(min=0)) / count,
        "pressure": torch.where(given > 0, made / given, 1.0),
    }
    return {
        f"polarity/{name}_turn_{number + 1}": values[number].item()
        for number in range(turns)
        for name, values in metrics.items()
    }


def turns_of(tokens: Tokens) -> Int[Tensor, " N"]:
    """The number of each token's turn in its response, from 0."""
    response, position = tokens.response, tokens.position
    first, follows = (torch.zeros_like(response, dtype=torch.bool) for _ in range(2))
    first[:1], first[1:] = True, response[1:] != response[:-1]
    follows[1:] = position[1:] == position[:-1] + 1
    begins = first | ~follows
    if begins.equal(first):  # one turn each, as in most tasks
        return torch.zeros_like(response)
    turn = begins.cumsum(0)
    return turn - torch.where(first, turn, 0).cummax(0).values
