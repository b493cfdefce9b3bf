"""The audit of an update: what was foretold of the mean entropy, and what came.

An optimiser step moves the parameters by δ, with G the gradient of the loss that it was given. Accounts of what δ does
to the mean entropy over some states, each of which leaves out less than the one before:

    local            Σ_t c_t T_t             every state on its own; c_t is w A_t times the token's share of the loss
    shared           -<g, G>                 all tokens move the same parameters
    preconditioned   -η <g, M G>             at the learning rate and in the metric of the optimiser, without momentum
    exact            <g, δ>                  the step that was made
    realised         H(θ + δ) - H(θ)         to all orders

g is the gradient of that mean at θ. The first two are per unit of step size, the others in nats. And a forecast that is
cheap enough for every update of a training:

    sampled          <ĝ, δ>                  the step that was made, ĝ from a few of the sequences trained on

Source: ours; the local formula is the paper's polarity (arXiv 2605.11775) as polarity.py has it.
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from entropy_polarity.exact import (
    CHUNK_BYTES,
    Parameters,
    Sequences,
    entropy_gradient,
    exact_sensitivity,
    sequence_stats,
)

LEVELS = ("local", "shared", "preconditioned", "exact")
# Of the sequences trained on, those that a forecast looks at.
SHARE = 1 / 16


@dataclass(frozen=True)
class Account:
    """One update seen on one set of states: the levels above. `entropy` is their mean entropy before it, in nats;
    `parts` splits `exact` by part of the model; `preconditioned` is None for an optimiser that is not known here."""

    entropy: float
    local: float
    shared: float
    preconditioned: float | None
    exact: float
    sampled: float
    realised: float
    parts: dict[str, float]


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


@dataclass
class Forecast:
    """What `foretold` found, once its block is left: the forecast change of the mean entropy, in nats."""

    change: float = math.nan


@contextmanager
def foretold(
    model: nn.Module,
    sequences: Sequences,
    *,
    share: float = SHARE,
    temperature: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Iterator[Forecast]:
    """Forecast what the optimiser step inside the block does to the mean entropy: <ĝ, δ>, before anything is generated.

        with foretold(model, sequences) as forecast:
            optimizer.step()
        forecast.change

    ĝ is the gradient of the mean entropy over a `share` of `sequences`, evenly spaced; δ is the change of the
    parameters, whatever momentum, clipping or weight decay did. To first order in δ, up to the sampling error of ĝ.
    Costs one backward over that share and memory for θ and ĝ. Changes nothing. Raises ValueError where
    `exact_sensitivity` does, and for a share that is not in (0, 1].
    Source: ours.
    """
    _, g = entropy_gradient(model, spaced(sequences, share), temperature=temperature, chunk_bytes=chunk_bytes)
    forecast = Forecast()
    with _followed(model) as step:
        yield forecast
    forecast.change = _inner(g, step)


def spaced(sequences: Sequences, share: float) -> Sequences:
    """About that share of those sequences in which something was sampled, evenly spaced; at least one."""
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; expected a part of the sequences, above 0 and at most 1")
    rows = sequences.mask.any(1).nonzero().flatten()[:: round(1 / share)]
    return Sequences(*(None if column is None else column[rows] for column in sequences))  # type: ignore[arg-type]


@contextmanager
def audited(
    model: nn.Module,
    optimizer: Any,
    sequences: Sequences,
    pressure: Float[Tensor, "B S"],
    *,
    held_out: Sequences | None = None,
    share: float = SHARE,
    temperature: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Iterator[Audit]:
    """Audit the optimiser step that is made inside the block; gradients must be there and still be there after it.

        with audited(model, optimizer, sequences, pressure) as audit:
            optimizer.step()
        audit.accounts["batch"].exact, audit.accounts["batch"].realised

    `sequences` are those that the gradients came from, and `pressure` (B, S) the factor c_t on ∇ log π of each sampled
    token in the objective, 0 elsewhere. Accounts are given for "batch", the states of `sequences`, and where `held_out`
    is given for "held_out"; `sampled` in both is `foretold` of a `share` of `sequences`. Costs one backward for each
    set of states and one for the share, four forward passes over `sequences`, one over `held_out`, and memory for g and
    two copies of θ. It changes nothing: parameters, gradients, modes and the random state are left to the bit. Raises
    ValueError where `exact_sensitivity` does, and for pressure of another shape.
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
    with foretold(model, sequences, share=share, **where) as forecast, _followed(model) as step:
        yield audit
    down = {name: _descent(parameter) for name, parameter in _moving(model)}
    metric = _without_momentum(optimizer, model)
    after = sequence_stats(model, sequences, **where)
    local = (pressure * before.sensitivity).sum().item()
    for name, (entropy, g) in slopes.items():
        now = after if name == "batch" else sequence_stats(model, states[name], **where)
        audit.accounts[name] = Account(
            entropy=entropy,
            local=local,
            shared=_inner(g, down),
            preconditioned=None if metric is None else _inner(g, metric),
            exact=_inner(g, step),
            sampled=forecast.change,
            realised=_mean(now.entropy, states[name]) - entropy,
            parts=_by_part(g, step),
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


@contextmanager
def _followed(model: nn.Module) -> Iterator[Parameters]:
    """The change of the parameters inside the block, known once it is left."""
    start = {name: parameter.detach().clone() for name, parameter in _moving(model)}
    step: Parameters = {}
    yield step
    step |= {name: parameter.detach() - start[name] for name, parameter in _moving(model)}


def _moving(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _descent(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else -parameter.grad


def _mean(entropy: Float[Tensor, "B S"], states: Sequences) -> float:
    return (entropy.double().sum() / states.mask.sum()).item()


def _inner(a: Parameters, b: Parameters) -> float:
    return sum(_dot(a[name], b[name]) for name in a)


def _by_part(a: Parameters, b: Parameters) -> dict[str, float]:
    """The inner product, split by layer, embedding, norm and head: by the name up to its first number."""
    parts: dict[str, float] = {}
    for name in a:
        layer = re.match(r".*?\.\d+(?=\.)", name)
        part = layer[0] if layer else name.rsplit(".", 1)[0]
        parts[part] = parts.get(part, 0.0) + _dot(a[name], b[name])
    return parts


def _dot(a: Tensor, b: Tensor) -> float:
    return (a.double() * b.double()).sum().item()


def _momentum(optimizer: Any) -> float | None:
    plain = _plain(optimizer)
    if type(plain) not in _METRICS:
        return None
    group = plain.param_groups[0]
    return float(group["betas"][0] if "betas" in group else group["momentum"])


def _plain(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it


def _without_momentum(optimizer: Any, model: nn.Module) -> Parameters | None:
    """-η M G: the step that the optimiser just made, had it neither momentum nor weight decay. None if unknown.

    SGD: M = 1. Adam and AdamW: M = 1 / (√v̂ + ε), with v̂ of this step.
    """
    plain = _plain(optimizer)
    rule = _METRICS.get(type(plain))
    if rule is None:
        return None
    steps = {}
    for group in plain.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                steps[parameter] = rule(parameter, group, plain.state[parameter])
    return {
        name: steps[parameter] if parameter in steps else torch.zeros_like(parameter)
        for name, parameter in _moving(model)
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
