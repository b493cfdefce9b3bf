"""Which engine serves tensors of a device and type; the environment variable PAPO_KERNEL forces one."""

import functools
import importlib.util
import os
from typing import NamedTuple

import torch

from entropy_polarity.kernels.engine import Engine

VARIABLE = "PAPO_KERNEL"
IMPLEMENTATIONS = ("chunked", "triton")


class Choice(NamedTuple):
    """The name of an implementation, and why it was chosen."""

    name: str
    why: str


def choose(device: torch.device, dtype: torch.dtype, implementation: str | None = None) -> Choice:
    """Which implementation serves tensors of this device and type, and why.

    `implementation`, or else the environment variable PAPO_KERNEL, forces "chunked" or "triton"; "auto" and None leave
    the choice to the device and type. Raises ValueError for an unknown name, and for one that cannot serve these
    tensors.
    """
    forced, by = implementation, f"implementation={implementation!r}"
    if forced is None:
        forced, by = os.environ.get(VARIABLE) or "auto", f"{VARIABLE}={os.environ.get(VARIABLE)}"
    if forced not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"{by}: unknown; expected auto, {', '.join(IMPLEMENTATIONS)}")
    if forced == "chunked":
        return Choice(forced, by)
    if forced == "auto" and device.type != "cuda":
        return Choice("chunked", f"the tensors are on {device.type}; Triton's kernels run on CUDA")
    reason = why_not_triton(device, dtype)
    if forced == "auto":
        return Choice("triton", f"CUDA tensors of {dtype}") if reason is None else Choice("chunked", reason)
    if reason is not None:
        raise ValueError(f"{by} cannot serve these tensors: {reason}")
    return Choice(forced, by)


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton engine cannot serve tensors of this device and type, or None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if dtype == torch.float64:
        return "Triton's kernels accumulate in float32, float64 needs chunked"
    if device.type != "cuda":
        from triton import knobs

        if not knobs.runtime.interpret:
            return f"the tensors are on {device.type} (TRITON_INTERPRET=1 runs the kernels there, slowly, for tests)"
    return None


def engine_for(device: torch.device, dtype: torch.dtype, implementation: str | None = None) -> Engine:
    return engine_named(choose(device, dtype, implementation).name, device.type)


@functools.cache
def engine_named(name: str, device: str) -> Engine:
    """The engine of an implementation on a type of device."""
    if name == "triton":
        from entropy_polarity.kernels.triton import Triton

        return Triton()
    from entropy_polarity.kernels.chunked import Chunked
    from entropy_polarity.kernels.cpu import Cpu

    return Cpu() if device == "cpu" else Chunked()
