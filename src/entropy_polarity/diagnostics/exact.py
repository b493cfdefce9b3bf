"""Exact polarity: what each token does to the mean entropy through the parameters that all tokens share. Experimental.

A policy-gradient step on token t with advantage A moves the parameters by η w A ∇_θ log π(a_t) (η, w and A as in
maths.py), and with them every state, not only its own. With g = ∇_θ of the mean entropy over N states,

    T*_t = <g, ∇_θ log π_θ(a_t)> = d/dε log π_{θ+εg}(a_t) at ε = 0,      P*_t = w A_t T*_t

is its exact first-order effect on that mean, per unit of step size. One backward makes g, and one pass in forward
mode (or a pair at θ ± εg) T* of all tokens. Where no parameter is shared, T* = T / N: T is about one state, T* about
the mean of N. Its settings and results may still change. Source: ours.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from entropy_polarity.diagnostics.entropy import (
    CHUNK_BYTES,
    Parameters,
    Sequences,
    check_sequences,
    chunks,
    entropy_gradient,
    in_eval_mode,
    predictions,
    sequence_stats,
    trainable_parameters,
)
from entropy_polarity.kernels.state import accumulation_dtype


class ExactSensitivity(NamedTuple):
    """The result of `exact_sensitivity`.

    sensitivity     T* (B, S), 0 where nothing was sampled
    entropy         the mean entropy, in nats
    gradient_norm   |g|
    error           the estimated error of T* as a share of its norm; None where no estimate was asked for
    """

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
    """Experimental: T*_t = <g, ∇ log π(a_t)> of every sampled token, g = ∇ of the mean entropy over `states`.

    The tokens are those of `sequences`, and so are the `states` by default; `gradient` is their `entropy_gradient`, if
    it is known already. `model` is a causal language model as Hugging Face builds them, unwrapped; the parameters that
    require a gradient count, so with LoRA the adapters alone. T* is in nats of the mean entropy per unit of step size.
    `metric` maps g, by parameter names, to M g: T* is then the effect of a step along M ∇ log π, for a symmetric M that
    does not depend on the token, such as an optimiser's preconditioner of the step before. `derivative` is one of

    "forward"     forward-mode differentiation, exact to rounding, where every operation of the model has it;
    "difference"  (log π at θ + εg - log π at θ - εg) / 2ε with ε = `step` |θ| / |g|; with `estimate_error` once more
                  at ε/2, for the error 4/3 |T*(ε) - T*(ε/2)|. It takes about the same time and less memory, but in
                  float32 it can be tens of per cent off where H is sharp, as on small batches;
    "auto"        "forward", but "difference" where an error is asked for or, with a warning, where the model has no
                  forward mode.

    All run without dropout and autocast, in memory for θ, g and the activations of `chunk_bytes`. The parameters are
    put back to the bit; gradients and the random state are not touched.

    Raises ValueError where `entropy_gradient` does; for a metric with other names; and with "difference" for parameters
    that are all zero, and for 16-bit parameters or logits, whose grid is coarser than the step. Source: ours.
    """
    _check(sequences, derivative, step, estimate_error)
    if gradient is None:
        gradient = entropy_gradient(model, states or sequences, temperature=temperature, chunk_bytes=chunk_bytes)
    entropy, g = gradient
    direction = g if metric is None else metric(g)
    if direction.keys() != g.keys():
        odd = ", ".join(sorted(direction.keys() ^ g.keys())[:3])
        raise ValueError(f"exact_sensitivity: the metric must give back the names it was given; these differ: {odd}")
    length = _norm(direction)
    if not math.isfinite(length):
        raise ValueError("exact_sensitivity: the gradient of the entropy, or what the metric made of it, is not finite")
    where, error = (model, sequences, direction, temperature, chunk_bytes), None
    with in_eval_mode(model):
        if length == 0:  # nothing would move
            sensitivity = torch.zeros_like(sequences.mask, dtype=torch.float32)
        elif derivative == "forward" or (derivative == "auto" and not estimate_error and _has_forward_mode(*where)):
            sensitivity = _forward_mode(*where)
        else:
            size = step * _norm(trainable_parameters(model)) / length
            sensitivity = _difference(size, *where)
            if estimate_error:
                change = (sensitivity - _difference(size / 2, *where)).norm()
                error = (4 / 3 * change / sensitivity.norm().clamp(min=torch.finfo(change.dtype).tiny)).item()
    return ExactSensitivity(sensitivity, entropy, _norm(g), error)


def _difference(
    size: float, model: nn.Module, sequences: Sequences, direction: Parameters, temperature: float, chunk_bytes: int
) -> Float[Tensor, "B S"]:
    """The central difference of log π between θ ± `size` · `direction`."""
    _refuse_coarse("parameters", *(p for p in model.parameters() if p.is_floating_point()))
    if size == 0:
        raise ValueError(
            "exact_sensitivity: all trainable parameters are 0, and the step is a share of their norm; use "
            "derivative='forward'"
        )
    where: Any = {"temperature": temperature, "chunk_bytes": chunk_bytes}
    ends = []
    for signed in (size, -size):
        with _shifted(model, direction, signed):
            ends.append(sequence_stats(model, sequences, check_logits=partial(_refuse_coarse, "logits"), **where).logp)
    return (ends[0] - ends[1]) / (2 * size)


def _forward_mode(
    model: nn.Module, sequences: Sequences, direction: Parameters, temperature: float, chunk_bytes: int
) -> Float[Tensor, "B S"]:
    """The derivative of log π along `direction`, carried through the model beside its values."""
    parameters, parts = {name: p.detach() for name, p in trainable_parameters(model).items()}, []
    tangent = {name: direction[name].to(p.dtype) for name, p in parameters.items()}
    for chunk in chunks(model, sequences, chunk_bytes):

        def logp(moved: Parameters, chunk: Sequences = chunk) -> Tensor:
            logits, tokens, mask = predictions(
                model, lambda **inputs: torch.func.functional_call(model, moved, kwargs=inputs), chunk
            )
            tempered = logits.to(accumulation_dtype(logits.dtype)) / temperature
            chosen = tempered.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
            return torch.where(mask, chosen, 0.0)

        with sdpa_kernel(SDPBackend.MATH):  # the others have no forward mode
            parts.append(torch.func.jvp(logp, (parameters,), (tangent,))[1].detach())
    return nn.functional.pad(torch.cat(parts), (1, 0))  # 0 at the first tokens, which nothing predicts


def _has_forward_mode(model: nn.Module, sequences: Sequences, direction: Parameters, *rest: Any) -> bool:
    """Whether every operation of the model has a forward mode, tried on one token; a warning tells which has not."""
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


def _norm(parameters: dict[str, Any]) -> float:
    """The norm of all parameters as one vector."""
    norms = (
        torch.linalg.vector_norm(p.detach(), dtype=accumulation_dtype(p.dtype)).item() for p in parameters.values()
    )
    return math.sqrt(sum(norm**2 for norm in norms))


@contextmanager
def _shifted(model: nn.Module, direction: Parameters, size: float) -> Iterator[None]:
    """The model at θ + size · direction, then at θ again to the bit: subtracting would round."""
    parameters = trainable_parameters(model)
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


def _check(sequences: Sequences, derivative: str, step: float, estimate_error: bool) -> None:
    check_sequences(sequences)
    if derivative not in ("auto", "forward", "difference"):
        raise ValueError(f"exact_sensitivity: derivative is {derivative!r}; expected 'auto', 'forward' or 'difference'")
    if derivative == "forward" and estimate_error:
        raise ValueError("exact_sensitivity: estimate_error is about the step of 'difference'; 'forward' has none")
    if not step > 0:
        raise ValueError(f"exact_sensitivity: step is {step}; expected a positive share of the parameters' norm")


def _refuse_coarse(what: str, *tensors: Tensor) -> None:
    coarse = sorted({str(tensor.dtype) for tensor in tensors if tensor.element_size() < 4})
    if coarse:
        raise ValueError(
            f"exact_sensitivity: {what} are {', '.join(coarse)}, too coarse for a small step; use a float32 copy of "
            "the model, or derivative='forward'"
        )
