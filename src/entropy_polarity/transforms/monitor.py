"""The metrics of a rollout batch: what its update would do to the entropy, and what a method made of that."""

import math

import torch
from jaxtyping import Int
from torch import Tensor

from entropy_polarity.controllers import Metrics
from entropy_polarity.maths import branch_flows
from entropy_polarity.tokens import Tokens, finite, is_finite
from entropy_polarity.transforms.batch import cached_parts, mean_entropy, response_ends, segment_sums, totals
from entropy_polarity.transforms.weights import token_polarity


class Monitor:
    """Measures each rollout batch once, beside whatever method decides on it.

    `entropy` is that of the last batch, None before the first, for the change from one batch to the next.
    """

    def __init__(self, entropy: float | None = None) -> None:
        self.entropy = entropy

    def measure(self, before: Tokens, after: Tokens) -> Metrics:
        """Every polarity metric of a batch, all ranks, whose method made `after` of `before`.

        Both have the statistics of the policy that sampled them. Where the method dropped tokens, `after` says in its
        `index` which it kept; the entropy and the flows are of all.
        """
        entropy, _ = mean_entropy(before)
        positive, negative, expanding, broken = totals(_flows, before)
        made_positive, made_negative, *_ = totals(_flows, after)
        count, left = max(1, len(before.response)), max(1, len(after.response))
        metrics = {
            "polarity/lambda": 0.0,
            "polarity/entropy": entropy,
            "polarity/positive_flow": positive / count,
            "polarity/negative_flow": negative / count,
            "polarity/positive_fraction": expanding / count,
            "polarity/changed_fraction": _changed(before, after) / count,
            "polarity/predicted_entropy_change": (made_positive - made_negative) / left,
            "polarity/nonfinite_tokens": broken,
        }
        metrics |= by_turn(before, after)
        if self.entropy is not None:
            metrics["polarity/realised_entropy_change"] = entropy - self.entropy
        if math.isfinite(entropy):
            self.entropy = entropy
        return metrics


def _flows(tokens: Tokens) -> tuple[Tensor, ...]:
    """N D+, N D-, and how many tokens expand entropy, and how many have no finite P."""
    p = token_polarity(tokens)
    positive, negative = branch_flows(p)
    return positive * len(p), negative * len(p), (p > 0).count_nonzero(), (~is_finite(p)).count_nonzero()


def _changed(before: Tokens, after: Tokens) -> int:
    """How many tokens were dropped, got another advantage, or have a term in the loss."""
    given = before.advantages if after.index is None else before.advantages[after.index]
    parts = list(cached_parts(after))
    changed = len(before.response) - len(after.response)
    for part, was in zip(parts, given.split(max(1, len(parts[0].response))), strict=True):
        other = part.advantages != was
        for term in (part.entropy_bonus, part.ratio_penalty):
            if term is not None:
                other |= term != 0
        changed += int(other.count_nonzero())
    return changed


def by_turn(before: Tokens, after: Tokens) -> Metrics:
    """Entropy, branch flows and what was made of the advantages in each turn; nothing where no response has two.

        pressure of turn n = Σ |A'| / Σ |A|        over the tokens of all n-th turns, n from 1

    A turn is a run of model tokens: between two of them an environment speaks. λ is the same for all turns of a
    rollout; the pressure says which turns it reaches. It is 1 where a turn has no advantage.
    """
    if not _has_turns(before):
        return {}
    turn = turns_of(before)
    turns = int(turn.max()) + 1 if len(turn) else 0
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


def _has_turns(tokens: Tokens) -> bool:
    """Whether a response has several: then it is longer than its tokens are many."""
    begins, ends = response_ends(tokens)
    begins, ends = begins[ends > begins], ends[ends > begins]
    return bool((tokens.position[ends - 1] - tokens.position[begins] >= ends - begins).any())


def turns_of(tokens: Tokens) -> Int[Tensor, " N"]:
    """The number of each token's turn in its response, from 0."""
    response, position = tokens.response, tokens.position
    first = torch.ones_like(response, dtype=torch.bool)
    first[1:] = response[1:] != response[:-1]
    begins = first.clone()
    begins[1:] |= position[1:] != position[:-1] + 1
    turn = begins.cumsum(0)
    return turn - torch.where(first, turn, 0).cummax(0).values
