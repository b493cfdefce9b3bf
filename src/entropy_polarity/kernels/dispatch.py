"""What an engine does with tiles of logits, and which engine runs where."""

import functools
import importlib.util
import os
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_polarity.kernels.state import Head

VARIABLE = "PAPO_KERNEL"
IMPLEMENTATIONS = ("chunked", "triton")


class Engine(ABC):
    """Folds tiles of logits (n, W) into the states of their rows, and turns them into gradients.

    In every method `tokens` (n,) are the sampled ids of the whole vocabulary, `start` is the vocabulary's index of the
    tile's first column, `state` is (6, n) and `columns` (7, n) receives the fields of TokenStats (see `state`).
    """

    name: str
    strided_batches = False  # whether `statistics` and `gradient` take logits (B, T, V) with any strides

    @abstractmethod
    def product_tile(self, rows: int, columns: int, itemsize: int, tile_bytes: int | None) -> tuple[int, int]:
        """Rows and columns of the tiles in which logits are made from hidden states."""

    @abstractmethod
    def statistics(
        self, logits: Tensor, tokens: Tensor, mask: Tensor | None, head: Head, state: Tensor, columns: Tensor
    ) -> None:
        """Fill `state` and `columns` from whole rows of logits; `columns` is 0 where the mask is False."""

    @abstractmethod
    def fold(
        self,
        tile: Tensor,
        tokens: Tensor,
        start: int,
        head: Head,
        state: Tensor,
        columns: Tensor | None,
        keep: bool,
    ) -> None:
        """Merge a tile into `state`, the tiles of a row in order; with the last one `columns` is filled.

        The tile may be overwritten unless told to `keep` it.
        """

    @abstractmethod
    def gradient(
        self,
        tile: Tensor,
        tokens: Tensor,
        mask: Tensor | None,
        start: int,
        head: Head,
        maximum: Tensor,
        coefficients: Tensor,
        out: Tensor,
    ) -> None:
        """The gradient along a tile (`state.gradient_coefficients`) in `out`, which may be the tile; 0 where masked."""


def spans(length: int, step: int, start: int = 0) -> list[slice]:
    """Slices of `step` that cover start to length."""
    return [slice(i, min(i + step, length)) for i in range(start, length, step)]


class Choice(NamedTuple):
    """An implementation, by name, and why it is the one."""

    name: str
    why: str


def choose(device: torch.device, dtype: torch.dtype, implementation: str | None = None) -> Choice:
    """Which implementation serves tensors of this device and type.

    `implementation`, or else the environment variable PAPO_KERNEL, forces "chunked" or "triton"; "auto"
    and nothing choose. Raises ValueError for an unknown name, and for one that cannot serve these tensors.
    """
    forced, by = implementation, f"implementation={implementation!r}"
    if forced is None:
        forced, by = os.environ.get(VARIABLE) or None, f"{VARIABLE}={os.environ.get(VARIABLE)}"
    if forced is not None and forced != "auto":
        if forced not in IMPLEMENTATIONS:
            raise ValueError(f"{by}: unknown; expected auto, {', '.join(IMPLEMENTATIONS)}")
        if forced == "triton":
            reason = why_not_triton(device, dtype)
            if reason is not None:
                raise ValueError(f"{by} cannot be had: {reason}")
        return Choice(forced, by)
    if device.type != "cuda":
        return Choice("chunked", f"the tensors are on {device.type}; Triton's kernels run on CUDA")
    reason = why_not_triton(device, dtype)
    if reason is not None:
        return Choice("chunked", reason)
    return Choice("triton", f"CUDA tensors of {dtype}")


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton engine cannot serve tensors of this device and type, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if dtype == torch.float64:
        return "Triton's kernels accumulate in float32, float64 needs chunked"
    if device.type != "cuda" and not _interpreted():
        return f"the tensors are on {device.type} (TRITON_INTERPRET=1 runs the kernels there, slowly, for tests)"
    return None


def _interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


@functools.cache
def engine(name: str, device: str) -> Engine:
    """The engine of an implementation on a type of device."""
    if name == "triton":
        from entropy_polarity.kernels.triton import Triton

        return Triton()
    from entropy_polarity.kernels.chunked import Chunked
    from entropy_polarity.kernels.cpu import Cpu

    return Cpu() if device == "cpu" else Chunked()
