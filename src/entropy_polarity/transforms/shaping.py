"""Methods that scale or shift each token's advantage by what the policy thought of the token."""

import math
from dataclasses import replace
from typing import Literal

import torch

from entropy_polarity.controllers import Metrics, State
from entropy_polarity.support.errors import check_range
from entropy_polarity.tokens import Tokens, is_finite
from entropy_polarity.transforms.batch import (
    covariance_terms,
    entropy_sums,
    group_index,
    largest,
    mean_and_deviation,
    mean_entropy,
)
from entropy_polarity.transforms.core import Transform, reweighted, rewriting, token_by_token


def cw_grpo() -> Transform:
    """CW-GRPO: A w N / Σ w with w = exp(-c² / (2 sd(c)²)): tokens with extreme covariance c weigh less.

    c = (A - mean A) (log p - mean log p); the weights have mean 1 over the model tokens. No hyper-parameter.
    Source: arXiv 2605.11538, from a third-party summary.
    """

    def rewrite(tokens: Tokens) -> Tokens:
        c = covariance_terms(tokens)
        _, deviation = mean_and_deviation(c)
        weight = (-(c.square()) / (2 * deviation.square())).exp() if deviation > 0 else torch.ones_like(c)
        mean, _ = mean_and_deviation(weight)
        return reweighted(tokens, (weight / mean).to(tokens.advantages.dtype))

    return rewriting(rewrite, "logp")


def entropy_advantage(kappa: float, alpha: float = 0.4) -> Transform:
    """Entropy advantage: A + min(α H, |A| / κ): uncertain tokens are rewarded, and no sign is turned for κ > 1.

    α is 0.4 for GRPO, 0.1 for PPO. `kappa` has no default: the 2 we know is from a third-party summary.
    Source: arXiv 2506.14758.
    """
    check_range("entropy_advantage", "alpha", alpha)
    if not kappa > 1:
        raise ValueError(f"entropy_advantage: kappa is {kappa}; expected more than 1, or advantages change their sign")

    def local(tokens: Tokens, state: State) -> Tokens:
        advantages = tokens.advantages
        bonus = torch.minimum(alpha * tokens.require("entropy"), advantages.abs() / kappa)
        return replace(tokens, advantages=torch.where(is_finite(bonus), advantages + bonus, advantages))

    return token_by_token(local, "entropy")


def steer(shape: Literal["linear", "exponential"] = "linear", low: float = 0.8, high: float = 1.2) -> Transform:
    """STEER: tokens that move the entropy most, in either direction, weigh least.

        O = A r (1 - p) (log p + H)
        linear        from `high` at the batch's smallest |O| to `low` at its largest
        exponential   exp(-k |O|) with k = -log `low` / max(max |O|, 0.02): from 1 to `low`

    Magnitude without sign: the natural unsigned ablation of PAPO. The authors take smallest and largest of each
    micro-batch, we of the rollout batch. Source: arXiv 2510.10150 and its code.
    """
    if not 0 < low <= min(1, high):
        raise ValueError(f"steer: low={low} and high={high}; expected 0 < low <= 1 and low <= high")

    def rewrite(tokens: Tokens) -> Tokens:
        logp = tokens.require("logp")
        ratio = (logp - tokens.require("old_logp")).exp()
        surplus = (1 - logp.exp()) * (logp.clamp(min=torch.finfo(logp.dtype).min) + tokens.require("entropy"))
        size = (tokens.advantages * ratio * surplus).abs()
        known = size[is_finite(size)]
        if not len(known):
            return tokens
        if shape == "exponential":
            return reweighted(tokens, (math.log(low) * size / known.max().clamp(min=0.02)).exp())
        if known.max() == known.min():
            return tokens
        return reweighted(tokens, high - (high - low) * (size - known.min()) / (known.max() - known.min()))

    return rewriting(rewrite, "logp", "old_logp", "entropy")


def stare(
    variant: Literal["O1", "C2"] = "O1",
    positive: float = 1.1,
    negative: float = 0.9,
    fraction: float = 0.1,
    below: float = 0.3,
    adaptive: bool = False,
) -> Transform:
    """STARE: surprising tokens are reinforced more, and punished less, while the entropy is low.

        O1   of the tokens with A > 0, the `fraction` with the largest -log p is multiplied by W = `positive`
        C2   besides, of the tokens with A < 0 the `fraction` with the largest -log p by M = `negative`

    Only while the batch's mean H is under `below` (nats). With `adaptive` both are states, which move once a rollout,
    before they are used: W ← clip(W + 0.01 s, 1, 1.5), M ← clip(M - 0.01 s, 0.5, 1), s = sign(`below` - H). The share
    is rounded up. For 14B and 32B models the authors use 1.05 and 0.95. Source: arXiv 2606.19236 and its code, which
    takes the share in every micro-batch.
    """
    if not (positive > 0 and negative > 0 and 0 < fraction <= 1):
        raise ValueError(
            f"stare: positive={positive}, negative={negative}, fraction={fraction}; expected positive weights and a "
            "share above 0, at most 1"
        )

    if adaptive:  # where W and M may go
        check_range("stare", "positive", positive, 1, 1.5)
        check_range("stare", "negative", negative, 0.5, 1)

    def update(tokens: Tokens, state: State) -> tuple[Tokens, State, Metrics]:
        entropy, _ = mean_entropy(tokens)
        if adaptive and not math.isnan(entropy):
            step = 0.01 * ((entropy < below) - (entropy > below))
            state = {
                "positive": min(1.5, max(1.0, state["positive"] + step)),
                "negative": min(1.0, max(0.5, state["negative"] - step)),
            }
        if not entropy < below:
            return tokens, state, {"polarity/stare_weight": 1.0}
        weight = torch.ones_like(tokens.advantages)
        for sign, factor in ((1, state["positive"]), (-1, state["negative"]))[: 1 if variant == "O1" else 2]:
            candidates = tokens.advantages * sign > 0
            count = math.ceil(fraction * int(candidates.sum()) - 1e-9)
            weight = torch.where(largest(-tokens.require("logp"), candidates, count, tokens), factor, weight)
        return reweighted(tokens, weight), state, {"polarity/stare_weight": state["positive"]}

    def init() -> State:
        return {"positive": positive, "negative": negative}

    return Transform(init, update, needs=frozenset({"logp", "entropy"}))


def entropic(probability: float, target: float = 0.1, integral_gain: float = 0.01) -> Transform:
    """EntroPIC: a proportional-integral controller adds a |A| to the advantage of tokens with p >= `probability`.

        e_k = H_k - `target` (nats)        a = clip(e_k + `integral_gain` Σ_{j<=k} e_j, -1, 1)

    H above the target reinforces likely tokens, which sharpens the policy; below, it punishes them. `probability` has
    no default: the authors' threshold is not known to us. Source: arXiv 2511.15248.
    """
    check_range("entropic", "probability", probability, 0, 1)
    check_range("entropic", "integral_gain", integral_gain)

    def update(tokens: Tokens, state: State) -> tuple[Tokens, State, Metrics]:
        entropy, _ = mean_entropy(tokens)
        error = 0.0 if math.isnan(entropy) else entropy - target
        total = state["error_sum"] + error
        a = max(-1.0, min(1.0, error + integral_gain * total))
        likely = tokens.require("logp").exp() >= probability
        weight = torch.where(likely, 1 + a * tokens.advantages.sign(), 1.0)  # A + a |A| = A (1 + a sign A)
        return reweighted(tokens, weight), {"error_sum": total}, {"polarity/entropic_strength": a}

    return Transform(lambda: {"error_sum": 0.0}, update, needs=frozenset({"logp", "entropy"}))


def gepo(width: float, rate: float, low: float = 0.5, high: float = 0.2) -> Transform:
    """GEPO: A x `low` if A > 0 and its group's mean H is low, A x `high` if A < 0 and it is high.

    Low is under the moving average of (mean - `width` sd), high above that of (mean + `width` sd), both over the
    batch's group entropies; `rate` is what a new batch weighs in the averages, and a batch is judged after it was
    counted. `width` and `rate` have no defaults: they are not known to us. Source: arXiv 2607.16850, from a
    third-party summary.
    """
    check_range("gepo", "low", low)
    check_range("gepo", "high", high)
    if not (width >= 0 and 0 < rate <= 1):
        raise ValueError(f"gepo: width={width} and rate={rate}; expected width >= 0 and a rate above 0, at most 1")

    def update(tokens: Tokens, state: State) -> tuple[Tokens, State, Metrics]:
        index, groups = group_index(tokens)
        sums, counts = entropy_sums(tokens, index, groups)
        means = sums / counts.clamp(min=1)
        if not (counts > 0).any():
            return tokens, state, {}
        mean, deviation = mean_and_deviation(means[counts > 0])
        bounds = {"low": (mean - width * deviation).item(), "high": (mean + width * deviation).item()}
        averages = {
            name: new if state[name] is None else state[name] + rate * (new - state[name])
            for name, new in bounds.items()
        }
        of_token, advantages = means[index][tokens.response], tokens.advantages
        weight = torch.where((advantages > 0) & (of_token < averages["low"]), low, 1.0)
        weight = torch.where((advantages < 0) & (of_token > averages["high"]), high, weight)
        return reweighted(tokens, weight.to(advantages.dtype)), averages, {}

    return Transform(lambda: {"low": None, "high": None}, update, needs=frozenset({"entropy", "group"}))
