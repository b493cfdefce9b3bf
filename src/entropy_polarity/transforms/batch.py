"""Statistics over the model tokens of a whole rollout batch, in float64, and draws that no split or order changes."""

import math

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from entropy_polarity.tokens import Tokens, is_finite, mean

PART = 2**20  # values that are copied to float64 at a time: a copy of all would be the largest tensor of a batch


def precise(values: Tensor) -> Tensor:
    """The values in float64, where the device has it: Apple's has not."""
    return values.float() if values.device.type == "mps" else values.double()


def segment_sums(values: Shaped[Tensor, " N"], segment: Int[Tensor, " N"], count: int) -> Float[Tensor, " S"]:
    """The sum of the values of each of `count` segments, in float64; `segment` is the number of each value's."""
    sums = precise(values.new_zeros(count))
    for part, number in zip(values.split(PART), segment.split(PART), strict=True):
        sums.index_add_(0, number, precise(part))
    return sums


def mean_and_deviation(values: Float[Tensor, " N"]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (dividing by N) of the finite values; 0 for none."""
    values = precise(values[is_finite(values)])
    centre = mean(values)
    return centre, mean((values - centre).square()).sqrt()


def group_index(tokens: Tokens) -> tuple[Int[Tensor, " B"], int]:
    """Each response's group as a number from 0, and how many groups there are."""
    names, index = torch.unique(tokens.require("group"), return_inverse=True)
    return index, len(names)


def entropy_sums(tokens: Tokens, index: Int[Tensor, " B"], count: int) -> tuple[Tensor, Tensor]:
    """(S_g, N_g): the sum of the finite entropies of each group's tokens, and their number; `index` as of
    `group_index`."""
    entropy, response = tokens.require("entropy"), tokens.response
    usable = is_finite(entropy)
    if not usable.all():
        entropy, response = entropy[usable], response[usable]
    sums = segment_sums(entropy, response, len(index))
    counts = torch.bincount(response, minlength=len(index))
    return segment_sums(sums, index, count), segment_sums(counts, index, count)


def mean_entropy(tokens: Tokens) -> tuple[float, float]:
    """(H, σ): the mean entropy over the model tokens, and its standard error as a sample of prompts.

        H = Σ_g S_g / Σ_g N_g        σ² = G / (G - 1) Σ_g (S_g - H N_g)² / (Σ_g N_g)²

    S_g and N_g: sum of entropies and number of tokens of prompt g (of a response, where no groups are known). Tokens of
    one prompt are far from independent: counting tokens would call the error several times too small. σ is 0 for a
    single prompt. Source: the ratio estimator for cluster samples (Cochran 1977, chapter 6).
    """
    if tokens.group is None:
        index, count = torch.arange(tokens.responses, device=tokens.response.device), tokens.responses
    else:
        index, count = group_index(tokens)
    sums, counts = entropy_sums(tokens, index, count)
    if not counts.any():
        return math.nan, 0.0
    sums, counts = sums[counts > 0], counts[counts > 0]
    centre, groups = sums.sum() / counts.sum(), len(counts)
    if groups < 2:
        return centre.item(), 0.0
    scatter = (sums - centre * counts).square().sum() * groups / (groups - 1)
    return centre.item(), (scatter.sqrt() / counts.sum()).item()


def quantile(values: Float[Tensor, " N"], q: float) -> Tensor:
    """The q-quantile of the finite values, linear between neighbours; NaN for none.

    `torch.quantile` refuses more than 16 million values.
    """
    chosen = values[is_finite(values)].sort().values
    if not len(chosen):
        return values.new_tensor(torch.nan)
    place = round(q * (len(chosen) - 1), 9)  # 0.7 * 10 is a little more than 7
    below = int(place)
    above = min(below + 1, len(chosen) - 1)
    return torch.lerp(chosen[below], chosen[above], place - below)


def largest(scores: Tensor, eligible: Bool[Tensor, " N"], count: int, tokens: Tokens) -> Bool[Tensor, " N"]:
    """Where the `count` largest scores among the eligible tokens stand; all of those if there are no more. NaN is never
    chosen.

    Of equal scores those with the smaller `sample_id` come first, then those that stand first: completions that begin
    alike do tie.
    """
    places = (eligible & ~scores.isnan()).nonzero().flatten()
    if tokens.sample_id is not None:
        places = places[tokens.sample_id[tokens.response[places]].argsort(stable=True)]
    best = places[scores[places].argsort(descending=True, stable=True)[:count]]
    return torch.zeros_like(eligible).index_fill(0, best, True)


def token_keys(tokens: Tokens, seed: int, rollout: int) -> Int[Tensor, " N"]:
    """A pseudo-random integer per token, hashed from (seed, rollout, sample, position).

    To draw n tokens at random take the n smallest keys: the draw is the same however the batch is split or ordered.
    Source: the finaliser of splitmix64 (Steele, Lea and Flood 2014).
    """
    samples = tokens.require("sample_id").long()
    of_response = _mixed(_mixed(_mixed(torch.full_like(samples[:1], seed)) + rollout) + samples)
    return _mixed(of_response[tokens.response] + tokens.position)


def _mixed(x: Tensor) -> Tensor:
    def shifted(bits: int) -> Tensor:
        return x ^ ((x >> bits) & ((1 << (64 - bits)) - 1))  # >> keeps the sign: mask it out

    x = x.long() + -0x61C8864680B583EB
    x = shifted(30) * -0x40A7B892E31B1A47
    x = shifted(27) * -0x6B2FB644ECCEEE15
    return shifted(31)


def covariance_terms(tokens: Tokens) -> Float[Tensor, " N"]:
    """c = (A - mean A) (log p - mean log p) of each token; means over the model tokens. Source: arXiv 2505.22617."""
    advantages, logp = precise(tokens.advantages), precise(tokens.require("logp"))
    return (advantages - mean_and_deviation(advantages)[0]) * (logp - mean_and_deviation(logp)[0])


def sampled_contribution(tokens: Tokens) -> Float[Tensor, " N"]:
    """S_a = p_a (log p_a + H)."""
    logp = tokens.require("logp")
    return logp.exp() * (logp.clamp(min=torch.finfo(logp.dtype).min) + tokens.require("entropy"))
