"""Statistics over the model tokens of a whole rollout batch, in float64, and draws that no split or order changes."""

import math

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from entropy_polarity.tokens import Tokens, is_finite, masked_mean


def precise(values: Tensor) -> Tensor:
    """The values in float64, where the device has it: Apple's has not."""
    return values.float() if values.device.type == "mps" else values.double()


def group_sums(values: Shaped[Tensor, " B"], index: Int[Tensor, " B"]) -> Float[Tensor, " P"]:
    """The sum of one value a response over each group; `index` as of `group_index`."""
    values = precise(values)
    groups = int(index.max()) + 1 if len(index) else 0
    return values.new_zeros(groups).index_add(0, index, values)


def mean_and_deviation(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (dividing by N) of the finite values where `mask` is True; 0 for none."""
    mask = mask & is_finite(values)
    values = precise(values)
    mean = masked_mean(values, mask)
    return mean, masked_mean((values - mean).square(), mask).sqrt()


def entropy_sums(tokens: Tokens, index: Int[Tensor, " B"]) -> tuple[Float[Tensor, " P"], Float[Tensor, " P"]]:
    """(S_g, N_g): the sum of the finite entropies of each group's model tokens, and their number."""
    entropy = tokens.require("entropy")
    usable = tokens.mask & is_finite(entropy)
    # In parts: a copy of all of it in float64 would be the largest tensor of a batch.
    sums = torch.cat([precise(rows).sum(1) for rows in torch.where(usable, entropy, 0.0).split(64)])
    return group_sums(sums, index), group_sums(usable.count_nonzero(1), index)


def mean_entropy(tokens: Tokens) -> tuple[float, float]:
    """(H, σ): the mean entropy over the model tokens, and its standard error as a sample of prompts.

        H = Σ_g S_g / Σ_g N_g        σ² = G / (G - 1) Σ_g (S_g - H N_g)² / (Σ_g N_g)²

    S_g and N_g: sum of entropies and number of tokens of prompt g (of a response, where no groups are known). Tokens of
    one prompt are far from independent: counting tokens would call the error several times too small. σ is 0 for a
    single prompt. Source: the ratio estimator for cluster samples (Cochran 1977, chapter 6).
    """
    rows = torch.arange(len(tokens.mask), device=tokens.mask.device)
    _, group = torch.unique(rows if tokens.group is None else tokens.group, return_inverse=True)
    sums, counts = entropy_sums(tokens, group)
    if not counts.any():
        return math.nan, 0.0
    sums, counts = sums[counts > 0], counts[counts > 0]
    mean, groups = sums.sum() / counts.sum(), len(counts)
    if groups < 2:
        return mean.item(), 0.0
    scatter = (sums - mean * counts).square().sum() * groups / (groups - 1)
    return mean.item(), (scatter.sqrt() / counts.sum()).item()


def quantile(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], q: float) -> Tensor:
    """The q-quantile of the finite values where `mask` is True, linear between neighbours; NaN for none.

    `torch.quantile` refuses more than 16 million values.
    """
    chosen = values[mask & is_finite(values)].sort().values
    if not len(chosen):
        return values.new_tensor(torch.nan)
    place = round(q * (len(chosen) - 1), 9)  # 0.7 * 10 is a little more than 7
    below = int(place)
    above = min(below + 1, len(chosen) - 1)
    return torch.lerp(chosen[below], chosen[above], place - below)


def largest(
    scores: Tensor, mask: Bool[Tensor, "B T"], count: int, sample_id: Int[Tensor, " B"] | None = None
) -> Bool[Tensor, "B T"]:
    """Where the `count` largest scores among `mask` stand; all of `mask` if there are no more. NaN is never chosen.

    Of equal scores those with the smaller `sample_id` come first, then those that stand first: completions that begin
    alike do tie.
    """
    rows = torch.arange(len(scores), device=scores.device) if sample_id is None else sample_id.argsort(stable=True)
    ordered = scores[rows].flatten()
    eligible = (mask[rows] & ~scores[rows].isnan()).flatten().nonzero().flatten()
    best = eligible[ordered[eligible].argsort(descending=True, stable=True)[:count]]
    picked = torch.zeros_like(mask).flatten()
    picked[best] = True
    return torch.zeros_like(mask).index_copy(0, rows, picked.view_as(mask))


def token_keys(sample_id: Int[Tensor, " B"], width: int, seed: int, rollout: int) -> Int[Tensor, "B T"]:
    """A pseudo-random integer a token, hashed from (seed, rollout, sample, position).

    To draw n tokens at random take the n smallest keys: the draw is the same however the batch is split or ordered.
    Source: the finaliser of splitmix64 (Steele, Lea and Flood 2014).
    """
    position = torch.arange(width, device=sample_id.device)
    key = _mixed(_mixed(_mixed(torch.full_like(position[:1], seed)) + rollout) + sample_id.long())[:, None] + position
    return _mixed(key)


def _mixed(x: Tensor) -> Tensor:
    def shifted(bits: int) -> Tensor:
        return x ^ ((x >> bits) & ((1 << (64 - bits)) - 1))  # >> keeps the sign: mask it out

    x = x.long() + -0x61C8864680B583EB
    x = shifted(30) * -0x40A7B892E31B1A47
    x = shifted(27) * -0x6B2FB644ECCEEE15
    return shifted(31)


def covariance_terms(tokens: Tokens) -> Float[Tensor, "B T"]:
    """c = (A - mean A) (log p - mean log p) of each token; means over the model tokens. Source: arXiv 2505.22617."""
    advantages, logp = precise(tokens.advantages), precise(tokens.require("logp"))
    mean_advantage, _ = mean_and_deviation(advantages, tokens.mask)
    mean_logp, _ = mean_and_deviation(logp, tokens.mask)
    return (advantages - mean_advantage) * (logp - mean_logp)


def sampled_contribution(tokens: Tokens) -> Float[Tensor, "B T"]:
    """S_a = p_a (log p_a + H)."""
    logp = tokens.require("logp")
    return logp.exp() * (logp.clamp(min=torch.finfo(logp.dtype).min) + tokens.require("entropy"))


def group_index(tokens: Tokens) -> tuple[Int[Tensor, " B"], int]:
    """Each response's group as a number from 0, and how many groups there are."""
    names, index = torch.unique(tokens.require("group"), return_inverse=True)
    return index, len(names)
