"""Exact polarity: what each token does to the mean entropy through the parameters that all tokens share.

A policy-gradient step on token t with advantage A moves the parameters by η w A ∇_θ log π(a_t) (η, w and A as in
polarity.py), and with them every state, not only the one it was sampled at. With g = ∇_θ of the mean entropy over N
states,

    T*_t = <g, ∇_θ log π_θ(a_t)> = d/dε log π_{θ+εg}(a_t) at ε = 0,      P*_t = w A_t T*_t

is its exact first-order effect on that mean, per unit of step size. One backward makes g, and one pair of forward
passes at θ ± εg makes T* of all tokens at once. Where no parameter is shared, T* = T / N: T is about one state, T*
about the mean of N. Source: ours.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from entropy_polarity.kernels import token_stats
from entropy_polarity.support.modes import evaluating
from entropy_polarity.tokens import TokenStats

Parameters = dict[str, Tensor]

# Logits and activations of the sequences that go through the model together.
CHUNK_BYTES = 2**28


class Sequences(NamedTuple):
    """Whole sequences, prompts included. `mask` is True at the tokens that the policy sampled, which the first of a
    sequence never is; `attention_mask` is 0 at padding (None: there is none)."""

    input_ids: Int[Tensor, "B S"]
    mask: Bool[Tensor, "B S"]
    attention_mask: Int[Tensor, "B S"] | None = None


class ExactSensitivity(NamedTuple):
    """`sensitivity` is T* (B, S), 0 where nothing was sampled; `entropy` the mean entropy in nats, `gradient_norm` |g|.
    `error` is what was estimated for T*, as a share of its norm; None where it was not."""

    sensitivity: Float[Tensor, "B S"]
    entropy: float
    gradient_norm: float
    error: float | None


def exact_sensitivity(
    model: nn.Module,
    sequences: Sequences,
    *,
    states: Sequences | None = None,
    gradient: tuple[float, Parameters] | None = None,
    temperature: float = 1.0,
    metric: Callable[[Parameters], Parameters] | None = None,
    derivative: str = "auto",
    step: float = 1e-3,
    estimate_error: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> ExactSensitivity:
    """T*_t = <g, ∇ log π(a_t)> of every sampled token of `sequences`, g = ∇ of the mean entropy over `states`.

    `states` are the same sequences by default; where `entropy_gradient` of them is known already, `gradient` is what it
    gave. `model` is a causal language model as Hugging Face builds them,
    unwrapped; parameters that require a gradient count, so with LoRA the adapters alone. T* is in nats of the mean
    entropy per unit of step size. `metric` maps g, by parameter names, to M g: T* is then the effect of a step along
    M ∇ log π, for a symmetric M that does not depend on the token, as an optimiser's preconditioner one step earlier.
    `derivative`:

    "forward" is forward-mode differentiation: exact to rounding, but only where every operation of the model has it.
    "difference" takes (log π at θ + εg - log π at θ - εg) / 2ε with ε = `step` |θ| / |g|; with `estimate_error` once
    more at ε/2, which tells the error: 4/3 |T*(ε) - T*(ε/2)|. It takes about the same time and less memory, and can be
    tens of per cent off in float32 where H is sharp, as on small batches. "auto" is "forward", and "difference", with a
    warning, where the model does not allow it or an error is asked for. All run without dropout and autocast, in memory
    for θ, g and the activations of `chunk_bytes`. The parameters are put back to the bit; gradients and the random
    state are not touched.

    Raises ValueError for masks that are empty, do not fit, or hold padding or a first token; for a model without
    trainable parameters, or with all of them zero; for a metric with other names; with "difference" for 16-bit
    parameters or logits, whose grid is coarser than the step; and whatever `token_stats` refuses.
    Source: ours.
    """
    _check(model, sequences, derivative, step, estimate_error)
    if gradient is None:
        states = sequences if states is None else states
        gradient = entropy_gradient(model, states, temperature=temperature, chunk_bytes=chunk_bytes)
    entropy, g = gradient
    direction = g if metric is None else metric(g)
    if direction.keys() != g.keys():
        odd = ", ".join(sorted(direction.keys() ^ g.keys())[:3])
        raise ValueError(f"exact_sensitivity: the metric must give back the names it was given; these differ: {odd}")
    length = _norm(direction)
    if not math.isfinite(length):
        raise ValueError("exact_sensitivity: the gradient of the entropy, or what the metric made of it, is not finite")
    where, error = (model, sequences, direction, temperature, chunk_bytes), None
    with untouched(model):
        if length == 0:  # nothing would move
            sensitivity = torch.zeros_like(sequences.mask, dtype=torch.float32)
        elif derivative == "forward" or (derivative == "auto" and not estimate_error and _has_forward_mode(*where)):
            sensitivity = _forward_mode(*where)
        else:
            size = step * _norm(_trainable(model)) / length
            sensitivity = _difference(size, *where)
            if estimate_error:
                change = (sensitivity - _difference(size / 2, *where)).norm()
                error = (4 / 3 * change / sensitivity.norm().clamp(min=torch.finfo(change.dtype).tiny)).item()
    return ExactSensitivity(sensitivity, entropy, _norm(g), error)


def entropy_gradient(
    model: nn.Module, states: Sequences, *, temperature: float = 1.0, chunk_bytes: int = CHUNK_BYTES
) -> tuple[float, Parameters]:
    """The mean entropy at the sampled tokens of `states`, in nats, and g: its gradient in every trainable parameter.

    g is summed in float32 or more, whatever the parameters are. Everything else as in `exact_sensitivity`.
    """
    _check_sequences(states)
    if torch.is_inference_mode_enabled():
        raise ValueError("exact_sensitivity needs gradients, and inference_mode forbids them; use no_grad around it")
    parameters, count = _trainable(model), states.mask.sum()
    gradient = {name: torch.zeros_like(p, dtype=wide(p.dtype)) for name, p in parameters.items()}
    total = 0.0
    with untouched(model), torch.enable_grad():
        for rows in _chunks(model, states, chunk_bytes):
            logits, tokens, mask = _predictions(model, model, states, rows)
            stats = token_stats(logits, tokens, temperature=temperature, mask=mask, entropy_grad=True)
            share = stats.entropy.sum() / count
            parts = torch.autograd.grad(share, [*parameters.values()], allow_unused=True)
            for sums, part in zip(gradient.values(), parts, strict=True):
                if part is not None:
                    sums += part
            total += share.item()
    return total, gradient


def sequence_stats(
    model: nn.Module, sequences: Sequences, *, temperature: float = 1.0, chunk_bytes: int = CHUNK_BYTES
) -> TokenStats:
    """The statistics of every sampled token under `model` as it is, (B, S), 0 where nothing was sampled; no gradient.

    Everything else as in `exact_sensitivity`.
    """
    _check_sequences(sequences)
    with untouched(model):
        return _statistics(model, sequences, temperature, chunk_bytes)


def _statistics(
    model: nn.Module, sequences: Sequences, temperature: float, chunk_bytes: int, *, fine: bool = False
) -> TokenStats:
    """`sequence_stats`, and with `fine` a ValueError for logits that are too coarse for a difference."""
    parts = []
    with torch.no_grad():
        for rows in _chunks(model, sequences, chunk_bytes):
            logits, tokens, mask = _predictions(model, model, sequences, rows)
            if fine:
                _refuse_coarse("logits", {logits.dtype})
            parts.append(token_stats(logits, tokens, temperature=temperature, mask=mask))
    return TokenStats(*(_aligned(torch.cat(columns)) for columns in zip(*parts, strict=True)))


def _difference(
    size: float, model: nn.Module, sequences: Sequences, direction: Parameters, temperature: float, chunk_bytes: int
) -> Float[Tensor, "B S"]:
    """The central difference of log π along `direction`, with steps of `size` of it."""
    _refuse_coarse("parameters", {p.dtype for p in model.parameters() if p.is_floating_point()})
    if size == 0:
        raise ValueError(
            "exact_sensitivity: all trainable parameters are 0, and the step is a share of their norm; use "
            "derivative='forward'"
        )
    ends = []
    for signed in (size, -size):
        with _shifted(model, direction, signed):
            ends.append(_statistics(model, sequences, temperature, chunk_bytes, fine=True).logp)
    return (ends[0] - ends[1]) / (2 * size)


def _forward_mode(
    model: nn.Module, sequences: Sequences, direction: Parameters, temperature: float, chunk_bytes: int
) -> Float[Tensor, "B S"]:
    """The derivative of log π along `direction`, carried through the model beside its values."""
    parameters, parts = {name: p.detach() for name, p in _trainable(model).items()}, []
    tangent = {name: direction[name].to(p.dtype) for name, p in parameters.items()}
    for rows in _chunks(model, sequences, chunk_bytes):

        def logp(moved: Parameters, rows: slice = rows) -> Tensor:
            logits, tokens, mask = _predictions(
                model, lambda **inputs: torch.func.functional_call(model, moved, kwargs=inputs), sequences, rows
            )
            tempered = logits.to(wide(logits.dtype)) / temperature
            chosen = tempered.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
            return torch.where(mask, chosen, 0.0)

        with sdpa_kernel(SDPBackend.MATH):  # the others have no forward mode
            parts.append(torch.func.jvp(logp, (parameters,), (tangent,))[1].detach())
    return _aligned(torch.cat(parts))


def _has_forward_mode(model: nn.Module, sequences: Sequences, direction: Parameters, *rest: Any) -> bool:
    """Whether every operation of the model has a forward mode, tried on one token; a warning says so where not."""
    row, place = sequences.mask.nonzero()[0].tolist()
    first = Sequences(*(None if x is None else x[row : row + 1, : place + 1] for x in sequences))  # type: ignore[arg-type]
    try:
        _forward_mode(model, first, direction, *rest)
    except (NotImplementedError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        if not any(word in reason for word in ("forward AD", "forward mode", "forward-mode", "jvp")):
            raise
        warnings.warn(f"exact_sensitivity takes a difference, which is less exact: {reason}", stacklevel=4)
        return False
    return True


def _predictions(
    model: nn.Module, call: Callable[..., Any], batch: Sequences, rows: slice
) -> tuple[Float[Tensor, "b s V"], Int[Tensor, "b s"], Bool[Tensor, "b s"]]:
    """Logits of every token but the first, the tokens, and which of them were sampled."""
    inputs = {"input_ids": batch.input_ids[rows], "use_cache": False}
    if batch.attention_mask is not None:
        inputs["attention_mask"] = attention = batch.attention_mask[rows]
        whole: Any = model
        base = whole.get_base_model() if hasattr(model, "get_base_model") else model
        if "position_ids" in inspect.signature(base.forward).parameters:  # padding on the left is no position
            inputs["position_ids"] = (attention.cumsum(1) - 1).clamp(min=0)
    logits = call(**inputs).logits
    return logits[:, :-1], batch.input_ids[rows, 1:], batch.mask[rows, 1:]


def _aligned(values: Float[Tensor, "B _"]) -> Float[Tensor, "B S"]:
    """One value a token of the sequences, their first included."""
    return nn.functional.pad(values, (1, 0))


def _chunks(model: Any, batch: Sequences, chunk_bytes: int) -> list[slice]:
    """Rows that go through the model together: their logits and, by and large, activations are `chunk_bytes`."""
    config = model.config.get_text_config()
    width = config.vocab_size + 16 * config.num_hidden_layers * config.hidden_size
    rows = max(1, chunk_bytes // (batch.input_ids.shape[1] * width * next(model.parameters()).element_size()))
    return [slice(start, start + rows) for start in range(0, len(batch.input_ids), rows)]


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not parameters:
        raise ValueError("exact_sensitivity: no parameter of the model requires a gradient; nothing could move")
    return parameters


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums over parameters of that type are kept in: float32 or more."""
    return torch.promote_types(dtype, torch.float32)


def _norm(parameters: dict[str, Any]) -> float:
    """Of all parameters as one vector."""
    norms = (torch.linalg.vector_norm(p.detach(), dtype=wide(p.dtype)).item() for p in parameters.values())
    return math.sqrt(sum(norm**2 for norm in norms))


@contextmanager
def _shifted(model: nn.Module, direction: Parameters, size: float) -> Iterator[None]:
    """θ + size · direction, and θ again, to the bit: subtracting would round."""
    parameters = _trainable(model)
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data.add_(direction[name], alpha=size)
        torch.clear_autocast_cache()  # a model may enter autocast itself
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data.copy_(kept[name])
        torch.clear_autocast_cache()


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Without dropout and without autocast."""
    with evaluating(model), torch.autocast(next(model.parameters()).device.type, enabled=False):
        yield


def _check(model: nn.Module, sequences: Sequences, derivative: str, step: float, estimate_error: bool) -> None:
    _check_sequences(sequences)
    if derivative not in ("auto", "forward", "difference"):
        raise ValueError(f"exact_sensitivity: derivative is {derivative!r}; expected 'auto', 'forward' or 'difference'")
    if derivative == "forward" and estimate_error:
        raise ValueError("exact_sensitivity: estimate_error is about the step of 'difference'; 'forward' has none")
    if not step > 0:
        raise ValueError(f"exact_sensitivity: step is {step}; expected a positive share of the parameters' norm")


def _check_sequences(batch: Sequences) -> None:
    shapes = [tuple(x.shape) for x in batch if x is not None]
    if len(set(shapes)) > 1 or batch.input_ids.dim() != 2:
        raise ValueError(f"Sequences have shapes {', '.join(map(str, shapes))}; expected one (B, S) for all")
    if batch.mask.dtype != torch.bool or not batch.mask.any() or batch.mask[:, 0].any():
        raise ValueError(
            "Sequences: the mask must be boolean, True at one token or more and never at the first of a sequence, "
            "which nothing predicts"
        )
    if batch.attention_mask is not None and (batch.mask & (batch.attention_mask == 0)).any():
        raise ValueError("Sequences: the mask is True where attention_mask is 0; padding was not sampled")


def _refuse_coarse(what: str, dtypes: set[torch.dtype]) -> None:
    coarse = sorted(str(dtype) for dtype in dtypes if dtype.itemsize < 4)
    if coarse:
        raise ValueError(
            f"exact_sensitivity: {what} are {', '.join(coarse)}, too coarse for a small step; use a float32 copy of "
            "the model, or derivative='forward'"
        )
