"""Methods that select tokens over the whole batch: those that may teach, or those that are held back."""

import math
from dataclasses import replace
from typing import Literal

from jaxtyping import Bool, Int
from torch import Tensor

from entropy_polarity.controllers import Metrics, State
from entropy_polarity.support.errors import check_range
from entropy_polarity.tokens import Tokens, is_finite
from entropy_polarity.transforms.batch import (
    covariance_terms,
    largest,
    mean_and_deviation,
    quantile,
    sampled_contribution,
    token_keys,
)
from entropy_polarity.transforms.core import LossOverrides, Transform, reweighted, rewriting

Denominator = Literal["kept", "all"]


def keeping(tokens: Tokens, kept: Bool[Tensor, " N"], denominator: Denominator = "all") -> Tokens:
    """Tokens outside `kept` get advantage 0. A loss that is a mean over tokens stays one over "all", or becomes one
    over the "kept": then those weigh more, and every other term of the loss is left as it is."""
    scale = len(kept) / max(1, int(kept.sum())) if denominator == "kept" else 1.0
    return reweighted(tokens, kept.to(tokens.advantages.dtype) * scale)


def top_entropy(fraction: float = 0.2, denominator: Denominator = "kept") -> Transform:
    """80/20: only tokens with H at or above the batch's (1 - `fraction`)-quantile keep their advantage.

    The loss is averaged over the "kept" tokens, as the authors do, or over "all", as TRL does: about a factor of
    1 / `fraction` in the size of the gradient. Source: arXiv 2506.01939.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"top_entropy: fraction is {fraction}; expected a value above 0, at most 1")

    def rewrite(tokens: Tokens) -> Tokens:
        entropy = tokens.require("entropy")
        return keeping(tokens, entropy >= quantile(entropy, 1 - fraction), denominator)

    return rewriting(rewrite, "entropy")


def clip_cov(
    fraction: float = 2e-4, low: float = 1.0, high: float = 5.0, clip: float = 1.0, seed: int = 0
) -> Transform:
    """Clip-Cov: a few tokens drawn at random from those whose advantage and log-prob go together get no gradient.

        c = (A - mean A) (log p - mean log p)       max(1, ⌊fraction N⌋) tokens of {low < c < high, not PPO-clipped}

    The PPO clip is [1 - clip, 1 + clip]. The draw is a hash of seed, rollout, sample and position; the authors' code
    draws in every micro-batch anew. Source: arXiv 2505.22617; verl's own default for the clip is 0.2.
    """
    check_range("clip_cov", "fraction", fraction, 0, 1)
    check_range("clip_cov", "clip", clip)
    check_range("clip_cov", "low", low, -math.inf, high)

    def update(tokens: Tokens, state: State) -> tuple[Tokens, State, Metrics]:
        chosen = clip_cov_choice(tokens, token_keys(tokens, seed, state["rollout"]), fraction, low, high, clip)
        return keeping(tokens, ~chosen), {"rollout": state["rollout"] + 1}, {}

    needs = frozenset({"logp", "old_logp", "sample_id"})
    return Transform(lambda: {"rollout": 0}, update, needs=needs, loss=LossOverrides(clip, clip))


def clip_cov_choice(
    tokens: Tokens, keys: Int[Tensor, " N"], fraction: float, low: float, high: float, clip: float
) -> Bool[Tensor, " N"]:
    """The tokens that Clip-Cov silences: of the eligible ones those with the smallest keys."""
    c, advantages = covariance_terms(tokens), tokens.advantages
    ratio = (tokens.require("logp") - tokens.require("old_logp")).exp()
    clipped = ((advantages > 0) & (ratio > 1 + clip)) | ((advantages < 0) & (ratio < 1 - clip))
    return largest(-keys, (c > low) & (c < high) & ~clipped, _count(tokens, fraction), tokens)


def kl_cov(fraction: float = 2e-3, coefficient: float = 1.0) -> Transform:
    """KL-Cov: the tokens whose advantage and log-prob go together most are held where they were sampled.

        c = (A - mean A) (log p - mean log p)       the max(1, ⌊fraction N⌋) largest get the loss -r A + β |log r|

    No PPO clip. The authors' fraction is 2·10⁻³ for 7B, 2·10⁻⁴ for 32B. At the first update on a rollout r = 1 and the
    penalty has no gradient, so with a single update it does nothing.
    Source: arXiv 2505.22617.
    """

    check_range("kl_cov", "fraction", fraction, 0, 1)
    check_range("kl_cov", "coefficient", coefficient)

    def rewrite(tokens: Tokens) -> Tokens:
        c = covariance_terms(tokens)
        chosen = largest(c, is_finite(c), _count(tokens, fraction), tokens)
        return replace(tokens, ratio_penalty=coefficient * chosen.to(tokens.advantages.dtype))

    loss = LossOverrides(float("inf"), float("inf"))
    return rewriting(rewrite, "logp", loss=loss)._replace(several_updates=True)


def clip_b(deviations: float = 2.5, denominator: Denominator = "kept") -> Transform:
    """Clip_B: of the tokens with A < 0, those with S_a - mean S < -`deviations` sd(S) get no gradient.

    S_a = p_a (log p_a + H), mean and sd over all model tokens.
    Source: arXiv 2602.03392.
    """

    check_range("clip_b", "deviations", deviations)

    def rewrite(tokens: Tokens) -> Tokens:
        contribution = sampled_contribution(tokens)
        mean, deviation = mean_and_deviation(contribution)
        clipped = (tokens.advantages < 0) & (contribution - mean < -deviations * deviation)
        return keeping(tokens, ~clipped, denominator)

    return rewriting(rewrite, "logp", "entropy")


def clip_v(deviations: float = 8.5, fraction: float = 1e-4, denominator: Denominator = "kept") -> Transform:
    """Clip_V: of the tokens with A < 0, those with T > `deviations` sd(T) get no gradient, the largest T first.

    At most max(1, ⌊fraction N⌋) tokens; T the sensitivity, its sd (about its mean) over all model tokens.
    Source: arXiv 2602.03392.
    """

    check_range("clip_v", "fraction", fraction, 0, 1)
    check_range("clip_v", "deviations", deviations)

    def rewrite(tokens: Tokens) -> Tokens:
        sensitivity = tokens.require("sensitivity")
        _, deviation = mean_and_deviation(sensitivity)
        extreme = (tokens.advantages < 0) & (sensitivity > deviations * deviation)
        return keeping(tokens, ~largest(sensitivity, extreme, _count(tokens, fraction), tokens), denominator)

    return rewriting(rewrite, "sensitivity")


def _count(tokens: Tokens, fraction: float) -> int:
    return max(1, int(fraction * len(tokens.response)))
