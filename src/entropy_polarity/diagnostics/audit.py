"""The audit of an update: what was foretold of the mean entropy, and what came.

An optimiser step moves the parameters by δ, with G the gradient of the loss that it was given: clipped, where a trainer
clips. Accounts of what δ does to the mean entropy over N states, each of which leaves out less than the one
before:

    local            Σ_t c_t T_t             every state on its own; c_t is w A_t times the token's share of the loss
    shared           -<g, G>                 all tokens move the same parameters
    preconditioned   -η <g, M G>             at the learning rate and in the metric of the optimiser, without momentum
    exact            <g, δ>                  the step that was made
    realised         H(θ + δ) - H(θ)         to all orders

g is the gradient of that mean at θ. The first two are per unit of step size, the others in nats. Where no parameter is
shared, and each of the N states was visited once, η / N times the local sum is the change of the mean; of a state that
was visited m times each term counts m times (a step on it moves all m of its places in the mean).

And a forecast that is cheap enough for every update of a training:

    forecast         <ḡ, δ>                  the step that was made, ḡ from a few sequences an update: forecast.py

Source: ours; the local formula is the paper's polarity (arXiv 2605.11775) as polarity.py has it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from entropy_polarity.diagnostics.exact import (
    CHUNK_BYTES,
    Parameters,
    Sequences,
    entropy_gradient,
    exact_sensitivity,
    sequence_stats,
)
from entropy_polarity.diagnostics.forecast import Forecaster, followed, inner, moving

LEVELS = ("local", "shared", "preconditioned", "exact")


@dataclass(frozen=True)
class Account:
    """One update seen on one set of states: the levels above. `entropy` is their mean entropy before it, in nats;
    `preconditioned` is None for an optimiser that is not known here."""

    entropy: float
    local: float
    shared: float
    preconditioned: float | None
    exact: float
    forecast: float | None
    realised: float


class TokenAccount(NamedTuple):
    """The sampled tokens of an update, one row each; `pressure` is c, `change` what became of that state's entropy, and
    `state` a number that tokens after the same text share."""

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
    """What `audited` found, once its block is left: by set of states, and by token. `momentum` is the optimiser's: the
    share of the last step's direction in this one's; None for one that is not known here."""

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
    """Audit the optimiser step that is made inside the block; gradients must be there and still be there after it.

        with audited(model, optimizer, sequences, pressure) as audit:
            optimizer.step()
        audit.accounts["batch"].exact, audit.accounts["batch"].realised

    `sequences` are those that the gradients came from, and `pressure` (B, S) the factor c_t on ∇ log π of each sampled
    token in the objective, 0 elsewhere. Accounts are given for "batch", the states of `sequences`, and where `held_out`
    is given for "held_out". A `forecaster`, which is to see every update of a run, adds its forecast, the same to both.
    Costs one backward for each set of states and what the forecaster takes, four forward passes over `sequences`, one
    over `held_out`, and memory for g and two copies of θ. It changes nothing: parameters, gradients, modes and the
    random state are left to the bit. Raises ValueError where `exact_sensitivity` does, and for pressure of another
    shape.
    Source: ours.
    """
    if pressure.shape != sequences.mask.shape:
        raise ValueError(
            f"audited: the pressure has shape {tuple(pressure.shape)}, the sequences {tuple(sequences.mask.shape)}; "
            "expected one number a token"
        )
    where = {"temperature": temperature, "chunk_bytes": chunk_bytes}
    states = {"batch": sequences} if held_out is None else {"batch": sequences, "held_out": held_out}
    before = sequence_stats(model, sequences, **where)
    slopes = {name: entropy_gradient(model, chosen, **where) for name, chosen in states.items()}
    exact = exact_sensitivity(model, sequences, gradient=slopes["batch"], **where).sensitivity
    audit = Audit(momentum=_momentum(optimizer))
    told = nullcontext() if forecaster is None else forecaster.foretold(model, sequences, **where)
    with told as forecast, followed(model) as step:
        yield audit
    down = {name: _descent(parameter) for name, parameter in moving(model)}
    metric = _without_momentum(optimizer, model)
    after = sequence_stats(model, sequences, **where)
    local = (pressure * before.sensitivity).sum().item()
    for name, (entropy, g) in slopes.items():
        now = after if name == "batch" else sequence_stats(model, states[name], **where)
        audit.accounts[name] = Account(
            entropy=entropy,
            local=local,
            shared=inner(g, down),
            preconditioned=None if metric is None else inner(g, metric),
            exact=inner(g, step),
            forecast=None if forecast is None else forecast.change,
            realised=_mean(now.entropy, states[name]) - entropy,
        )
    change = after.entropy - before.entropy
    columns = (
        before.logp.exp(),
        before.entropy,
        before.sensitivity,
        before.correction,
        exact,
        pressure,
        change,
        _states(sequences),
    )
    audit.tokens = TokenAccount(*(column[sequences.mask].cpu() for column in columns))


def _states(sequences: Sequences) -> Int[Tensor, "B S"]:
    """A hash of the text before each token; padding is no text."""
    real = torch.ones_like(sequences.input_ids) if sequences.attention_mask is None else sequences.attention_mask
    state, states = torch.zeros_like(sequences.input_ids[:, 0]), []
    for token, there in zip(sequences.input_ids.unbind(1), real.unbind(1), strict=True):
        states.append(state)
        state = torch.where(there.bool(), (state ^ (token + 1)) * 0x5851F42D4C957F2D, state)
        state = state ^ (state >> 29)
    return torch.stack(states, dim=1)


def _descent(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else -parameter.grad


def _mean(entropy: Float[Tensor, "B S"], states: Sequences) -> float:
    return (entropy.double().sum() / states.mask.sum()).item()


def _momentum(optimizer: Any) -> float | None:
    plain = _known(optimizer)
    if plain is None:
        return None
    group = plain.param_groups[0]
    return float(group["betas"][0] if "betas" in group else group["momentum"])


def _known(optimizer: Any) -> Any:
    """The optimiser itself, None unless it is one of `_METRICS` that goes down."""
    plain = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    known = type(plain) in _METRICS and not any(group.get("maximize") for group in plain.param_groups)
    return plain if known else None


def _without_momentum(optimizer: Any, model: nn.Module) -> Parameters | None:
    """-η M G: the step that the optimiser just made, had it neither momentum nor weight decay. None if unknown.

    SGD: M = 1. Adam and AdamW: M = 1 / (√v̂ + ε), with v̂ of this step.
    """
    plain = _known(optimizer)
    if plain is None:
        return None
    rule, steps = _METRICS[type(plain)], {}
    for group in plain.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                steps[parameter] = rule(parameter, group, plain.state.get(parameter, {}))
    return {
        name: steps[parameter] if parameter in steps else torch.zeros_like(parameter)
        for name, parameter in moving(model)
    }


def _sgd(parameter: nn.Parameter, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    return -group["lr"] * _gradient(parameter)


def _adam(parameter: nn.Parameter, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    second = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    scale = (second / (1 - group["betas"][1] ** float(state["step"]))).sqrt() + group["eps"]
    return -group["lr"] * _gradient(parameter) / scale


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


_METRICS: dict[type, Callable[[nn.Parameter, dict[str, Any], dict[str, Any]], Tensor]] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
}
