"""Terms beside the policy's own loss: what is paid for entropy, and for moving away from where a token was sampled."""

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_polarity.controllers import Metrics, State
from entropy_polarity.support.errors import check_range
from entropy_polarity.tokens import Tokens
from entropy_polarity.transforms.batch import mean_entropy
from entropy_polarity.transforms.core import Transform, token_by_token


def loss_terms(tokens: Tokens) -> Float[Tensor, " N"] | None:
    """-β H + κ |log r| of every token, to be averaged as the trainer averages its own loss; None without such terms.

    β is `entropy_bonus`, κ is `ratio_penalty`; H and log r = log p - log p_old must carry their gradients.
    """
    terms = []
    if tokens.entropy_bonus is not None:
        terms.append(-tokens.entropy_bonus * tokens.require("entropy"))
    if tokens.ratio_penalty is not None:
        terms.append(tokens.ratio_penalty * (tokens.require("logp") - tokens.require("old_logp")).abs())
    return torch.stack(terms).sum(0) if terms else None


def _with_bonus(tokens: Tokens, coefficient: float) -> Tokens:
    """The tokens with that β, added to the one that they may have from another method of a chain."""
    bonus = torch.full_like(tokens.advantages, coefficient)
    return replace(tokens, entropy_bonus=bonus if tokens.entropy_bonus is None else tokens.entropy_bonus + bonus)


def entropy_bonus(coefficient: float) -> Transform:
    """The entropy bonus: L - β mean H, H with gradient, averaged as the trainer averages its own loss.

    `coefficient` β has no default: none fits every model and task.
    """

    return token_by_token(
        lambda tokens, state: _with_bonus(tokens, coefficient),
        advance=lambda tokens, state: (state, {"polarity/entropy_coefficient": coefficient}),
        entropy_gradient=True,
    )


def adaptive_coefficient(target: float = 0.2, step: float = 1e-4, maximum: float = 5e-3) -> Transform:
    """The adaptive entropy coefficient: L - c_k 1{H_{k-1} < `target`} mean H, moved once a rollout.

        c_{k+1} = clip(c_k ± `step`, 0, `maximum`), + while H_k < `target` (nats), from c_0 = 0

    The bonus acts on rollout k by what rollout k - 1 showed, so no extra pass is needed. TRL's own
    `use_adaptive_entropy` moves once an optimiser step, and its defaults are 50 to 200 times larger.
    Source: Skywork-OR1, arXiv 2505.22312.
    """
    check_range("adaptive_coefficient", "target", target)
    if not (step > 0 and maximum >= 0):
        raise ValueError(f"adaptive_coefficient: step={step}, maximum={maximum}; expected step > 0 and maximum >= 0")

    def applied(state: State) -> float:
        return state["coefficient"] if state["low"] else 0.0

    def local(tokens: Tokens, state: State) -> Tokens:
        return _with_bonus(tokens, applied(state))

    def advance(tokens: Tokens, state: State) -> tuple[State, Metrics]:
        entropy, _ = mean_entropy(tokens)
        following = state
        if not math.isnan(entropy):
            low = entropy < target
            moved = state["coefficient"] + (step if low else -step)
            following = {"coefficient": min(maximum, max(0.0, moved)), "low": low}
        return following, {"polarity/entropy_coefficient": applied(state)}

    def init() -> State:
        return {"coefficient": 0.0, "low": False}

    return token_by_token(local, "entropy", init=init, advance=advance, entropy_gradient=True)
