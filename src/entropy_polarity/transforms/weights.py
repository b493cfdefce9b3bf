"""PAPO: weights that move pressure between the tokens that expand entropy and those that contract it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_polarity.controllers import Controller, Metrics, Observation, State
from entropy_polarity.maths import branch_flows, polarity
from entropy_polarity.tokens import Tokens, finite, mean
from entropy_polarity.transforms.batch import largest, mean_entropy, precise, token_keys
from entropy_polarity.transforms.core import Transform, reweighted, rewriting, token_by_token


def token_polarity(tokens: Tokens) -> Float[Tensor, " N"]:
    """P = w A T of every token of a batch."""
    return polarity(tokens.advantages, tokens.require("sensitivity"), tokens.importance)


def polarity_sign(tokens: Tokens, soft_sign: float = 0.0) -> Float[Tensor, " N"]:
    """s = sign(P), or with `soft_sign` δ > 0 the smooth s = P / (|P| + δ), so that rounding noise near P = 0 does not
    flip a weight. A token whose P is NaN or infinite has s = 0.
    """
    return _sign(finite(token_polarity(tokens)), soft_sign)


def _sign(p: Tensor, soft_sign: float) -> Tensor:
    return p.sign() if soft_sign == 0 else p / (p.abs() + soft_sign)


def observe(tokens: Tokens, soft_sign: float = 0.0, conserve: bool = False) -> Observation:
    """What a controller sees of a batch: mean entropy, branch flows, and what a unit of λ would do.

    Without `conserve` λ changes the total pressure, and nothing takes it back: the tilt is 0. Tokens whose entropy is
    not finite are left out; with none left the entropy is NaN, not 0.
    """
    p = finite(token_polarity(tokens))
    s = _sign(p, soft_sign)
    positive, negative = branch_flows(p)
    tilt = 0.0
    if conserve:
        size = finite(tokens.advantages).abs()
        pressure = mean(size)
        tilt = (mean(size * s) / pressure).item() if pressure > 0 else 0.0
    entropy, error = mean_entropy(tokens)
    return Observation(entropy, positive.item(), negative.item(), mean(p * s).item(), tilt, error)


def polarity_weights(controller: Controller, soft_sign: float = 0.0, conserve: bool = False) -> Transform:
    """PAPO: A' = A (1 + λ_k s), λ_k steered by `controller`, one λ for all updates on rollout k.

    s as in `polarity_sign`; the weights are strictly positive, |λ| < 1. With `conserve` A' is rescaled so that
    Σ|A'| = Σ|A|: pressure is moved, none is added. That needs the whole batch, so the transform is then not local.
    Source: arXiv 2605.11775 (the idea), ours (the rule).
    """
    if not soft_sign >= 0:
        raise ValueError(f"soft_sign is {soft_sign}; expected a width >= 0 in nats (0 for the hard sign)")

    def reweigh(tokens: Tokens, lam: float) -> Tokens:
        weight = 1 + lam * polarity_sign(tokens, soft_sign)
        if conserve:
            before, after = mean(tokens.advantages.abs()), mean((tokens.advantages * weight).abs())
            weight = weight * torch.where(after > 0, before / after, 1.0)
        return reweighted(tokens, weight)

    needs = ("sensitivity", "entropy")

    def init() -> State:
        return {"lambda": controller.start, "controller": controller.init()}

    def advance(tokens: Tokens, state: State) -> tuple[State, Metrics]:
        following, inner, metrics = controller.update(observe(tokens, soft_sign, conserve), state["controller"])
        used = state["lambda"] if controller.causal else following
        return {"lambda": following, "controller": inner}, {"polarity/lambda": used, **metrics}

    if controller.causal and not conserve:
        return token_by_token(
            lambda tokens, state: reweigh(tokens, state["lambda"]), *needs, init=init, advance=advance
        )

    def update(tokens: Tokens, state: State) -> tuple[Tokens, State, Metrics]:
        following, metrics = advance(tokens, state)
        return reweigh(tokens, metrics["polarity/lambda"]), following, metrics

    return Transform(init, update, needs=frozenset(needs))


def with_sensitivity(
    inner: Transform, sensitivity: Callable[[Tokens, int], Tensor], *needs: str, exact_every: int = 0
) -> Transform:
    """`inner`, but with `sensitivity(tokens, rollout)` in place of T wherever it looks at T. Needs the whole batch."""

    def init() -> State:
        return {"rollout": 0, "inner": inner.init()}

    def update(tokens: Tokens, state: State) -> tuple[Tokens, State, Metrics]:
        seen = replace(tokens, sensitivity=sensitivity(tokens, state["rollout"]))
        rewritten, following, metrics = inner.update(seen, state["inner"])
        rewritten = replace(rewritten, sensitivity=tokens.sensitivity)
        return rewritten, {"rollout": state["rollout"] + 1, "inner": following}, metrics

    return inner._replace(
        init=init, update=update, local=None, advance=None, needs=inner.needs.union(needs), exact_every=exact_every
    )


def exact_where_known(tokens: Tokens, rollout: int) -> Float[Tensor, " N"]:
    """N T* on the rollouts for which it was made, T on the others."""
    return tokens.require("sensitivity") if tokens.exact_sensitivity is None else tokens.exact_sensitivity


def shuffled_signs(tokens: Tokens, rollout: int) -> Float[Tensor, " N"]:
    """±T, so that the signs of P are dealt out anew among the tokens that have one; every |P| stays where it is.

    The deal is a hash of rollout, sample and position: positions in the order of one key get the signs in that of
    another.
    """
    sign = polarity_sign(tokens)
    place = sign.nonzero().flatten()
    taking, giving = (place[token_keys(tokens, seed, rollout)[place].argsort()] for seed in (0, 1))
    turned = torch.ones_like(sign).index_copy(0, taking, sign[giving] * sign[taking])
    return tokens.require("sensitivity") * turned


def papo_positive_only() -> Transform:
    """Ablation: only tokens that expand entropy keep their advantage. Source: ours."""
    return _one_branch(+1)


def papo_negative_only() -> Transform:
    """Ablation: only tokens that contract entropy keep their advantage. Source: ours."""
    return _one_branch(-1)


def _one_branch(sign: int) -> Transform:
    return token_by_token(
        lambda tokens, state: reweighted(tokens, (polarity_sign(tokens) == sign).to(tokens.advantages.dtype)),
        "sensitivity",
    )


def papo_random_half(size_of: Literal["positive", "negative"] = "negative", seed: int = 0) -> Transform:
    """Ablation: as many tokens as one branch has keep their advantage, drawn at random from both.

    `size_of` says which branch: the "positive" one expands entropy, the "negative" one contracts it. The draw is a hash
    of seed, rollout, sample and position. Source: ours.
    """
    sign = +1 if size_of == "positive" else -1

    def update(tokens: Tokens, state: State) -> tuple[Tokens, State, Metrics]:
        s = polarity_sign(tokens)
        kept = largest(-token_keys(tokens, seed, state["rollout"]), s != 0, int((s == sign).sum()), tokens)
        return reweighted(tokens, kept.to(tokens.advantages.dtype)), {"rollout": state["rollout"] + 1}, {}

    return Transform(lambda: {"rollout": 0}, update, needs=frozenset({"sensitivity", "sample_id"}))


def token_flow(tokens: Tokens) -> Float[Tensor, " N"]:
    """OPEFO's estimate d = -w A (1 - p_a)² (log p_a + H) of the entropy change that each token brings.

    A = (0.2, -0.8) on the two tokens of p = (0.8, 0.2) gives Σ p d = -0.115340, a textbook's printed check of the
    paper's Eq. 6. P = w A T gives -0.070978 there, the exact first order: d takes no account of what the step does to
    the other tokens.
    Source: arXiv 2605.11491, from third-party summaries; the factor w, 1 in their on-policy setting, is ours.
    """
    logp = tokens.require("logp")
    weight = tokens.advantages if tokens.importance is None else tokens.importance * tokens.advantages
    return -weight * logp.expm1().square() * (logp + tokens.require("entropy"))


def _balanced(flow: Callable[[Tokens], Tensor], *needs: str) -> Transform:
    """A (1 + λ) where the flow is > 0 and A (1 - λ) where it is < 0, with the λ that leaves no net flow."""

    def rewrite(tokens: Tokens) -> Tokens:
        flows = finite(flow(tokens))
        positive, negative = branch_flows(precise(flows))
        if min(positive, negative) <= 0:
            return tokens
        lam = ((negative - positive) / (negative + positive)).to(tokens.advantages.dtype)
        return reweighted(tokens, 1 + lam * flows.sign())

    return rewriting(rewrite, *needs)


def opefo() -> Transform:
    """OPEFO: A (1 + λ) where d > 0 and A (1 - λ) where d < 0, with λ = (D- - D+) / (D- + D+).

    d as in `token_flow`, D+ and D- the sums of its positive and negative parts; their net is then zero. With one branch
    empty nothing is changed, since its rule would silence the other. No hyper-parameter.
    Unresolved: a summary says that λ stays within 0.00025 to 0.00175 on its own; on 60 rollouts of plain GRPO this one
    is 0.36 in the median and reaches 0.60 (benchmarks/results/opefo.json). What the paper's λ is we do not know.
    Source: arXiv 2605.11491, from third-party summaries.
    """
    return _balanced(token_flow, "logp", "entropy")


def opefo_polarity() -> Transform:
    """OPEFO's rule with the polarity P = w A T, the exact first order, in place of its d. Source: ours."""
    return _balanced(token_polarity, "sensitivity")
