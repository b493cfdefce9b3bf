"""Methods that decide from rewards alone: what a response's advantage is, and which groups count."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_polarity.controllers import State
from entropy_polarity.support.errors import check_range
from entropy_polarity.tokens import Tokens
from entropy_polarity.transforms.batch import group_index, precise, segment_sums
from entropy_polarity.transforms.core import LossOverrides, Transform, rewriting, token_by_token

# Keeps the division finite in a group whose rewards are all equal; TRL's value.
EPSILON = 1e-4


def group_statistics(tokens: Tokens, rewards: Float[Tensor, " B"]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (dividing by G - 1, as TRL does) of each response's group; 0 deviation for G = 1.

    A reward that is NaN, of a completion that nothing could judge, is in neither.
    """
    index, groups = group_index(tokens)
    rewards, judged = precise(rewards), ~rewards.isnan()
    size = segment_sums(judged, index, groups)
    mean = (segment_sums(rewards.nan_to_num(), index, groups) / size.clamp(min=1))[index]
    scatter = segment_sums((rewards - mean).square().nan_to_num(), index, groups)
    return mean, (scatter / (size - 1).clamp(min=1)).sqrt()[index]


def with_advantages(tokens: Tokens, advantages: Float[Tensor, " B"]) -> Tokens:
    """The same tokens, each with its response's new advantage; 0 where that is NaN, where there is no reward."""
    of_response = advantages.nan_to_num().to(tokens.advantages.dtype)
    return replace(tokens, advantages=of_response[tokens.response])


def dapo(
    clip_low: float = 0.2, clip_high: float = 0.28, overlong_cache: int = 0, max_length: int | None = None
) -> Transform:
    """DAPO: clip-higher, a token-mean loss, groups with equal rewards dropped, and a soft penalty on length.

    Dropped groups leave the loss's denominator and the statistics of whatever is chained after; metrics of the batch
    before the method still count them. The paper samples others in their place, which is not done here. With
    `overlong_cache` c > 0 a response of n model tokens gets R + clip((L - c - n) / c, -1, 0) with L = `max_length`,
    after which advantages are made anew: (R - mean R) / (std R + 10⁻⁴) within the group. The paper's c and L (4096,
    20480) fit its own length limit: give yours. Which groups are equal is judged before the penalty.
    Source: arXiv 2503.14476.
    """
    check_range("dapo", "clip_low", clip_low)
    check_range("dapo", "clip_high", clip_high)
    if max_length is not None and not overlong_cache:
        raise ValueError(f"dapo: max_length={max_length} does nothing without overlong_cache; give both or neither")
    if overlong_cache and (max_length is None or not 0 < overlong_cache <= max_length):
        raise ValueError(
            f"dapo: overlong_cache={overlong_cache} with max_length={max_length}; expected max_length, the limit of a "
            "completion in tokens, and a cache from 1 to it"
        )

    def rewrite(tokens: Tokens) -> Tokens:
        rewards = tokens.require("reward")
        index, groups = group_index(tokens)
        judged, worst = ~rewards.isnan(), torch.full((groups,), -torch.inf, dtype=rewards.dtype, device=rewards.device)
        highest = worst.scatter_reduce(0, index, torch.where(judged, rewards, -torch.inf), "amax")
        lowest = -worst.scatter_reduce(0, index, torch.where(judged, -rewards, -torch.inf), "amax")
        if overlong_cache:
            assert max_length is not None
            length = torch.bincount(tokens.response, minlength=len(rewards))
            penalty = ((max_length - overlong_cache - length) / overlong_cache).clamp(-1, 0)
            shaped = rewards + penalty
            mean, deviation = group_statistics(tokens, shaped)
            tokens = with_advantages(tokens, (shaped - mean) / (deviation + EPSILON))
        return tokens.select((highest > lowest)[index][tokens.response])

    loss = LossOverrides(clip_low, clip_high, average="token")
    return rewriting(rewrite, "reward", "group", loss=loss)._replace(replaces_advantages=overlong_cache > 0)


def qae(quantile: float = 0.4) -> Transform:
    """QAE: the baseline is a quantile of the group's rewards instead of their mean, A = (R - Q_K) / (std R + 10⁻⁴).

    Q_K is linear between neighbouring rewards. With rewards 0 and 1 and a success rate p it is 0 where p < 1 - K, so
    that only successes teach, and 1 where p > 1 - K, so that only failures do, but for one step between.
    Source: arXiv 2509.22611, from third-party summaries; that the scale is GRPO's is an assumption.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"qae: quantile is {quantile}; expected a value between 0 and 1")

    def rewrite(tokens: Tokens) -> Tokens:
        rewards = tokens.require("reward")
        _, deviation = group_statistics(tokens, rewards)
        index, groups = group_index(tokens)
        baseline = precise(rewards).new_zeros(groups)
        for group in range(groups):
            baseline[group] = precise(rewards[index == group]).nanquantile(quantile)
        return with_advantages(tokens, (rewards - baseline[index]) / (deviation + EPSILON))

    return rewriting(rewrite, "reward", "group")._replace(replaces_advantages=True)


def w_reinforce(right: float = 0.1, wrong: float = 1.0) -> Transform:
    """W-REINFORCE: A = `right` on a completion with positive reward and -`wrong` on any other; no group, no baseline.

    Source: arXiv 2506.01347.
    """

    def local(tokens: Tokens, state: State) -> Tokens:
        rewards = tokens.require("reward")
        return with_advantages(tokens, torch.where(rewards > 0, right, -wrong) + 0 * rewards)  # NaN stays NaN

    check_range("w_reinforce", "right", right)
    check_range("w_reinforce", "wrong", wrong)
    return token_by_token(local, "reward")._replace(replaces_advantages=True)


def nsr() -> Transform:
    """NSR: negative samples only, A = -1 on wrong completions; right ones are dropped, from the denominator too.

    Source: arXiv 2506.01347.
    """
    return _only(right=False)


def psr() -> Transform:
    """PSR: positive samples only, A = 1 on right completions; wrong ones are dropped, from the denominator too.

    Source: arXiv 2506.01347.
    """
    return _only(right=True)


def _only(right: bool) -> Transform:
    def rewrite(tokens: Tokens) -> Tokens:
        rewards = tokens.require("reward")
        chosen = rewards > 0 if right else rewards <= 0
        tokens = with_advantages(tokens, torch.where(chosen, 1.0 if right else -1.0, 0.0))
        return tokens.select(chosen[tokens.response])

    return rewriting(rewrite, "reward", loss=LossOverrides(average="token"))._replace(replaces_advantages=True)
