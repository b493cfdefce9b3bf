"""The audit of an update: what theory and forecast say of the mean entropy, against what the step does to it.

An optimiser step moves the parameters by δ, with G the gradient that it was given (clipped, where a trainer clips).
These are accounts of what δ does to the mean entropy over N states; each leaves out less than the one before:

    local            Σ_t c_t T_t             every state on its own; c_t is w A_t times the token's share of the loss
    shared           -<g, G>                 all tokens move the same parameters
    preconditioned   -η <g, M G>             at the learning rate and in the metric of the optimiser, without momentum
    exact            <g, δ>                  the step that was made
    realised         H(θ + δ) - H(θ)         to all orders
    forecast         <ḡ, δ>                  the step that was made, ḡ from a few sequences of each update (forecast.py)

g is the gradient of that mean at θ. The first two are per unit of step size, the others in nats. Where no parameter is
shared, and each of the N states was visited once, η / N times the local sum is the change of the mean; of a state that
was visited m times each term counts m times (a step on it moves all m of its places in the mean). Source: ours; the
local formula is the paper's polarity (arXiv 2605.11775) as maths.py has it.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from entropy_polarity.diagnostics.entropy import (
    CHUNK_BYTES,
    Parameters,
    Sequences,
    entropy_gradient,
    sequence_stats,
    trainable_parameters,
)
from entropy_polarity.diagnostics.exact import exact_sensitivity
from entropy_polarity.diagnostics.forecast import Forecaster, inner_product, parameter_change

LEVELS = ("local", "shared", "preconditioned", "exact")


@dataclass(frozen=True)
class Account:
    """The accounts of one update, as above, on one set of states, whose mean `entropy` before it is in nats;
    `preconditioned` is None for an optimiser whose metric is not known here, `forecast` None without a forecaster."""

    entropy: float
    local: float
    shared: float
    preconditioned: float | None
    exact: float
    forecast: float | None
    realised: float


class TokenAccount(NamedTuple):
    """The sampled tokens of an update, one value per token: `pressure` is c, `change` the realised change of the
    entropy of the token's state, in nats, and `state` a number that tokens after the same text share; the rest is as in
    TokenStats and `exact_sensitivity`, before the update."""

    p: Float[Tensor, " N"]
    entropy: Float[Tensor, " N"]
    sensitivity: Float[Tensor, " N"]
    correction: Float[Tensor, " N"]
    exact_sensitivity: Float[Tensor, " N"]
    pressure: Float[Tensor, " N"]
    change: Float[Tensor, " N"]
    state: Int[Tensor, " N"]


@dataclass
class Audit:
    """The result of `audited`: accounts by set of states, and the tokens; filled in when its block is left. `momentum`
    is the share of the last step's direction in this one's; None for an optimiser that is not known here."""

    accounts: dict[str, Account] = field(default_factory=dict)
    tokens: TokenAccount | None = None
    momentum: float | None = None


@contextmanager
def audited(
    model: nn.Module,
    optimizer: Any,
    sequences: Sequences,
    pressure: Float[Tensor, "B S"],
    *,
    held_out: Sequences | None = None,
    forecaster: Forecaster | None = None,
    temperature: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Iterator[Audit]:
    """Audit the optimiser step inside the block; gradients must be there before it and still be there after it.

        with audited(model, optimizer, sequences, pressure) as audit:
            optimizer.step()
        audit.accounts["batch"].exact, audit.accounts["batch"].realised

    `sequences` are those that the gradients were taken over, and `pressure` (B, S) is the factor c_t on ∇ log π of each
    sampled token in the objective, 0 elsewhere. There is an account for "batch", the states of `sequences`, and for
    "held_out", those of `held_out` if given. A `forecaster`, which should see every update of a run, adds its forecast,
    the same to both. The audit costs one backward for each set of states and the forecaster's, four forward passes over
    `sequences`, one over `held_out`, and memory for g and two copies of θ. Parameters, gradients, modes and the random
    state are left to the bit. Raises ValueError where `exact_sensitivity` does, and for pressure of another shape.
    """
    if pressure.shape != sequences.mask.shape:
        raise ValueError(
            f"audited: the pressure has shape {tuple(pressure.shape)}, the sequences {tuple(sequences.mask.shape)}; "
            "expected one number per token"
        )
    where = {"temperature": temperature, "chunk_bytes": chunk_bytes}
    states = {"batch": sequences} if held_out is None else {"batch": sequences, "held_out": held_out}
    before = sequence_stats(model, sequences, **where)
    gradients = {name: entropy_gradient(model, chosen, **where) for name, chosen in states.items()}
    exact = exact_sensitivity(model, sequences, gradient=gradients["batch"], **where).sensitivity
    known = _known(optimizer)
    audit = Audit(momentum=None if known is None else _momentum(known.param_groups[0]))
    forecasting = nullcontext() if forecaster is None else forecaster.forecasting(model, sequences, **where)
    with forecasting as forecast, parameter_change(model) as step:
        yield audit
    down = {name: _descent(parameter) for name, parameter in trainable_parameters(model).items()}
    metric = None if known is None else _without_momentum(known, model)
    after = sequence_stats(model, sequences, **where)
    local = (pressure * before.sensitivity).sum().item()
    for name, (entropy, g) in gradients.items():
        now = after if name == "batch" else sequence_stats(model, states[name], **where)
        audit.accounts[name] = Account(
            entropy=entropy,
            local=local,
            shared=inner_product(g, down),
            preconditioned=None if metric is None else inner_product(g, metric),
            exact=inner_product(g, step),
            forecast=None if forecast is None else forecast.change,
            realised=(now.entropy.double().sum() / states[name].mask.sum()).item() - entropy,
        )
    change = after.entropy - before.entropy
    rest = before.entropy, before.sensitivity, before.correction, exact, pressure, change, _states(sequences)
    audit.tokens = TokenAccount(*(column[sequences.mask].cpu() for column in (before.logp.exp(), *rest)))


def _states(sequences: Sequences) -> Int[Tensor, "B S"]:
    """A hash of the text before each token; padding does not count as text."""
    real = torch.ones_like(sequences.input_ids) if sequences.attention_mask is None else sequences.attention_mask
    state, states = torch.zeros_like(sequences.input_ids[:, 0]), []
    for token, there in zip(sequences.input_ids.unbind(1), real.unbind(1), strict=True):
        states.append(state)
        state = torch.where(there.bool(), (state ^ (token + 1)) * 0x5851F42D4C957F2D, state)
        state = state ^ (state >> 29)
    return torch.stack(states, dim=1)


def _descent(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else -parameter.grad


def _known(optimizer: Any) -> Any:
    """The optimiser itself if it minimises and its metric is known here, else None."""
    plain = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    known = type(plain) in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
    return plain if known and not any(group.get("maximize") for group in plain.param_groups) else None


def _momentum(group: dict[str, Any]) -> float:
    return float(group["betas"][0] if "betas" in group else group["momentum"])


def _without_momentum(optimizer: Any, model: nn.Module) -> Parameters:
    """-η M G, the step that the optimiser would just have made without momentum and weight decay: SGD has M = 1, Adam
    and AdamW have M = 1 / (√v̂ + ε) with v̂ of this step."""
    steps = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                steps[parameter] = group["lr"] * _descent(parameter)
                if "betas" in group:
                    state = optimizer.state[parameter]
                    second = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
                    corrected = second / (1 - group["betas"][1] ** float(state["step"]))
                    steps[parameter] = steps[parameter] / (corrected.sqrt() + group["eps"])
    return {
        name: steps[parameter] if parameter in steps else torch.zeros_like(parameter)
        for name, parameter in trainable_parameters(model).items()
    }
