"""Chances of success, estimated from n samples of each problem: pass@k and maj@k."""

from collections.abc import Sequence
from functools import lru_cache
from math import comb

import numpy as np
from jaxtyping import Float, Int


def pass_at_k(successes: Int[np.ndarray, "*P"], samples: int, k: int) -> Float[np.ndarray, "*P"]:
    """The unbiased estimate of the chance that one of k samples is right, for each problem.

        pass@k = 1 - C(n - c, k) / C(n, k)        n samples, c of them right

    computed as a product, so that no binomial overflows. Raises ValueError unless 1 <= k <= samples and
    0 <= c <= n. Source: Chen et al., arXiv 2107.03374.

    >>> pass_at_k(np.array([0, 1, 4]), samples=4, k=2)
    array([0. , 0.5, 1. ])
    """
    successes = np.asarray(successes)
    if not 1 <= k <= samples:
        raise ValueError(f"pass_at_k: k is {k}; expected a number from 1 to the {samples} samples")
    if successes.size and (successes.min() < 0 or successes.max() > samples):
        raise ValueError(f"pass_at_k: successes must lie in [0, {samples}], got {successes.min()}..{successes.max()}")
    # C(n-c, k) / C(n, k) = Π_{i<k} (n - c - i) / (n - i)
    factors = [np.clip(samples - successes - i, 0, None) / (samples - i) for i in range(k)]
    return 1.0 - np.prod(factors, axis=0)


def maj_at_k(answers: Sequence[str | None], right: Sequence[bool], k: int) -> float:
    """The chance that the most frequent final answer among k of the n samples of a problem is right.

    Over all subsets S of k samples, each as likely as the others, and W(S) the answers that are the most frequent in S:

        maj@k = E_S [ 1/|W(S)| · Σ_{a ∈ W(S)} r_a ]        r_a = share of the samples with the answer a that are right

    so a tie is split evenly, and r_a is 0 or 1 wherever equal answers have equal verdicts. A sample whose answer is
    None takes a place in S and never wins; where all are None the value is 0. The expectation is exact for every k.
    Raises ValueError unless 1 <= k <= n, with one verdict per answer. Source of the vote: Wang et al., arXiv 2203.11171
    (self-consistency); the way to the exact expectation over subsets is ours.

    >>> maj_at_k(["7", "7", "9"], [True, True, False], k=3)
    1.0
    >>> round(maj_at_k(["7", "7", "9", None], [True, True, False, False], k=3), 6)
    0.75
    """
    if len(answers) != len(right) or not 1 <= k <= len(answers):
        raise ValueError(
            f"maj_at_k: k is {k}, with {len(answers)} answers and {len(right)} verdicts; expected one verdict per "
            "answer, and k from 1 to their number"
        )
    groups: dict[str, list[bool]] = {}
    for answer, verdict in zip(answers, right, strict=True):
        if answer is not None:
            groups.setdefault(answer, []).append(verdict)
    counted = sorted((len(verdicts), sum(verdicts) / len(verdicts)) for verdicts in groups.values())
    return _majority(tuple(counted), len(answers), k)


@lru_cache(maxsize=4096)
def _majority(groups: tuple[tuple[int, float], ...], samples: int, k: int) -> float:
    """`maj_at_k` of groups (count, share right); samples in no group have no answer.

    Let every sample be in S with chance p = k/n on its own: given |S| = k, all subsets are equally likely. For each
    height j of the winners, ways[s, t] is the chance that s samples are taken and t answers have j of them, none more,
    and worth[s, t] the same weighted by the sum of r_a over those t. Then

        maj@k = Σ_j Σ_{t >= 1} worth_j[k, t] / t  /  P(|S| = k)
    """
    without = samples - sum(count for count, _ in groups)
    total = 0.0
    for height in range(1, min(k, max((count for count, _ in groups), default=0)) + 1):
        ways = np.zeros((k + 1, k // height + 1))
        taken = _binomial(without, k, samples)[: k + 1]
        ways[: len(taken), 0] = taken
        worth = np.zeros_like(ways)
        for count, share in groups:
            ways, worth = _with_group(ways, worth, _binomial(count, k, samples), height, share)
        total += float((worth[k, 1:] / np.arange(1, k // height + 1)).sum())
    return min(1.0, total / float(_binomial(samples, k, samples)[k]))


def _with_group(
    ways: Float[np.ndarray, "K T"],
    worth: Float[np.ndarray, "K T"],
    chances: Float[np.ndarray, " C"],
    height: int,
    share: float,
) -> tuple[Float[np.ndarray, "K T"], Float[np.ndarray, "K T"]]:
    """Both tables with one more answer, which is taken i times with the chance `chances[i]`."""
    size = len(ways)
    new_ways, new_worth = np.zeros_like(ways), np.zeros_like(worth)
    for i in range(min(height, len(chances))):
        new_ways[i:] += chances[i] * ways[: size - i]
        new_worth[i:] += chances[i] * worth[: size - i]
    if height < len(chances):
        before, wins = slice(size - height), chances[height]
        new_ways[height:, 1:] += wins * ways[before, :-1]
        new_worth[height:, 1:] += wins * (worth[before, :-1] + share * ways[before, :-1])
    return new_ways, new_worth


@lru_cache(maxsize=4096)
def _binomial(count: int, k: int, samples: int) -> Float[np.ndarray, " C"]:
    """The chances of 0 to `count` successes in that many trials, each with chance k/samples."""
    # In whole numbers, divided last: C(2000, 1000) is no float.
    rest = samples - k
    return np.array([comb(count, i) * k**i * rest ** (count - i) / samples**count for i in range(count + 1)])
