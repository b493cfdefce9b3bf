"""Exact polarity: what each token does to the mean entropy through the parameters that all tokens share.

A policy-gradient step on token t with advantage A moves the parameters by η A ∇_θ log π(a_t), and with them every
state, not only the one it was sampled at. With g = ∇_θ of the mean entropy over a batch of states,

    T*_t = <g, ∇_θ log π_θ(a_t)> = d/dε log π_{θ+εg}(a_t) at ε = 0,      P*_t = w A_t T*_t

is its exact first-order effect on that mean, per unit of step size. One backward makes g, and one pair of forward
passes at θ ± εg makes T* of all tokens at once. With M g in the place of g, M the metric of an optimiser, T* is the
effect of the step that this optimiser makes of the gradient. Source: ours.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from entropy_polarity.kernels import token_stats

Parameters = dict[str, Tensor]

# Logits of the sequences that go through the model together.
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
    temperature: float = 1.0,
    metric: Callable[[Parameters], Parameters] | None = None,
    derivative: Literal["difference", "forward"] = "difference",
    step: float = 1e-3,
    estimate_error: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> ExactSensitivity:
    """T* of every sampled token of `sequences`: its effect on the mean entropy over `states` (default: the same).

    `model` is a causal language model as Hugging Face builds them; parameters that require a gradient count, so with
    LoRA the adapters alone. `metric` maps g, by parameter names, to M g. T* is in nats per unit of step size.

    "difference" takes (log π at θ + εg - log π at θ - εg) / 2ε with ε = `step` |θ| / |g|; with `estimate_error` once
    more at ε/2, which tells the error: 4/3 |T*(ε) - T*(ε/2)|. "forward" is forward-mode differentiation: no step, about
    the same time, more memory, and only where every operation of the model has it. The parameters are put back to the
    bit; gradients and the random state are not touched, dropout is off.

    Raises ValueError for masks that are empty, do not fit or hold a first token, for a model without trainable
    parameters, and for 16-bit parameters with "difference": their grid is coarser than the step.
    """
    states = sequences if states is None else states
    _check(model, sequences, states, derivative, step)
    with _evaluating(model):
        entropy, gradient = entropy_gradient(model, states, temperature=temperature, chunk_bytes=chunk_bytes)
        direction = gradient if metric is None else metric(gradient)
        error = None
        if derivative == "forward":
            sensitivity = _forward_mode(model, sequences, direction, temperature, chunk_bytes)
        else:
            scale = _norm(_trainable(model)) / max(_norm(direction), torch.finfo(torch.float64).tiny)
            ends = (model, sequences, direction, temperature, chunk_bytes)
            sensitivity = _difference(step * scale, *ends)
            if estimate_error:
                change = (sensitivity - _difference(step * scale / 2, *ends)).norm()
                error = (4 / 3 * change / sensitivity.norm().clamp(min=torch.finfo(change.dtype).tiny)).item()
    return ExactSensitivity(sensitivity, entropy, _norm(gradient), error)


def entropy_gradient(
    model: nn.Module, states: Sequences, *, temperature: float = 1.0, chunk_bytes: int = CHUNK_BYTES
) -> tuple[float, Parameters]:
    """The mean entropy at the sampled tokens of `states`, in nats, and g: its gradient in every trainable parameter."""
    parameters, count = _trainable(model), states.mask.sum()
    gradient = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    total = 0.0
    for rows in _chunks(model, states, chunk_bytes):
        logits, tokens, mask = _predictions(model, states, rows)
        share = token_stats(logits, tokens, temperature=temperature, mask=mask, entropy_grad=True).entropy.sum() / count
        parts = torch.autograd.grad(share, [*parameters.values()], allow_unused=True)
        for sums, part in zip(gradient.values(), parts, strict=True):
            if part is not None:
                sums += part
        total += share.item()
    return total, gradient


def _difference(
    size: float, model: nn.Module, sequences: Sequences, direction: Parameters, temperature: float, chunk_bytes: int
) -> Tensor:
    """The central difference of log π along `direction`, with steps of `size` of it."""
    ends = []
    for signed in (size, -size):
        parts = []
        with _shifted(model, direction, signed), torch.no_grad():
            for rows in _chunks(model, sequences, chunk_bytes):
                logits, tokens, mask = _predictions(model, sequences, rows)
                parts.append(token_stats(logits, tokens, temperature=temperature, mask=mask).logp)
        ends.append(torch.cat(parts))
    return _aligned((ends[0] - ends[1]) / (2 * size))


def _forward_mode(
    model: nn.Module, sequences: Sequences, direction: Parameters, temperature: float, chunk_bytes: int
) -> Tensor:
    """The derivative of log π along `direction`, carried through the model beside its values."""
    parameters, parts = {name: p.detach() for name, p in _trainable(model).items()}, []
    for rows in _chunks(model, sequences, chunk_bytes):

        def logp(moved: Parameters, rows: slice = rows) -> Tensor:
            logits, tokens, mask = _predictions(
                lambda **inputs: torch.func.functional_call(model, moved, kwargs=inputs), sequences, rows
            )
            wide = logits if logits.dtype == torch.float64 else logits.float()
            chosen = (wide / temperature).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
            return torch.where(mask, chosen, 0.0)

        with sdpa_kernel(SDPBackend.MATH):  # the others have no forward mode
            parts.append(torch.func.jvp(logp, (parameters,), (direction,))[1].detach())
    return _aligned(torch.cat(parts))


def _predictions(model: Callable[..., Any], batch: Sequences, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of every token but the first, the tokens, and which of them were sampled."""
    attention = None if batch.attention_mask is None else batch.attention_mask[rows]
    logits = model(input_ids=batch.input_ids[rows], attention_mask=attention, use_cache=False).logits
    return logits[:, :-1], batch.input_ids[rows, 1:], batch.mask[rows, 1:]


def _aligned(values: Float[Tensor, "B S-1"]) -> Float[Tensor, "B S"]:
    """One value a token of the sequence, the first included."""
    return nn.functional.pad(values, (1, 0))


def _chunks(model: Any, batch: Sequences, chunk_bytes: int) -> list[slice]:
    width, parameter = model.config.get_text_config().vocab_size, next(model.parameters())
    rows = max(1, chunk_bytes // (batch.input_ids.shape[1] * width * parameter.element_size()))
    return [slice(start, start + rows) for start in range(0, len(batch.input_ids), rows)]


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _norm(parameters: dict[str, Any]) -> float:
    """Of all parameters as one vector, summed in float64."""
    return sum(parameter.detach().double().square().sum().item() for parameter in parameters.values()) ** 0.5


@contextmanager
def _shifted(model: nn.Module, direction: Parameters, size: float) -> Iterator[None]:
    """θ + size · direction, and θ again, to the bit: subtracting would round."""
    parameters = _trainable(model)
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data.add_(direction[name], alpha=size)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data.copy_(kept[name])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; every module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _check(model: nn.Module, sequences: Sequences, states: Sequences, derivative: str, step: float) -> None:
    for name, batch in (("sequences", sequences), ("states", states)):
        shapes = [tuple(x.shape) for x in batch if x is not None]
        if len(set(shapes)) > 1 or batch.input_ids.dim() != 2:
            raise ValueError(
                f"exact_sensitivity: the {name} have shapes {', '.join(map(str, shapes))}; expected one (B, S) for all"
            )
        if batch.mask.dtype != torch.bool or not batch.mask.any() or batch.mask[:, 0].any():
            raise ValueError(
                f"exact_sensitivity: the mask of the {name} must be boolean, True at one token or more and never at "
                "the first of a sequence, which nothing predicts"
            )
    if derivative not in ("difference", "forward"):
        raise ValueError(f"exact_sensitivity: derivative is {derivative!r}; expected 'difference' or 'forward'")
    if not step > 0:
        raise ValueError(f"exact_sensitivity: step is {step}; expected a positive share of the parameters' norm")
    parameters = _trainable(model)
    if not parameters:
        raise ValueError("exact_sensitivity: no parameter of the model requires a gradient; nothing could move")
    coarse = sorted({str(p.dtype) for p in parameters.values() if p.element_size() < 4})
    if coarse and derivative == "difference":
        raise ValueError(
            f"exact_sensitivity: parameters are {', '.join(coarse)}, too coarse for a small step; use a float32 copy, "
            "or derivative='forward'"
        )
