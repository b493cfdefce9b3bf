"""Measure and control the entropy of a language model under reinforcement fine-tuning, token by token.

The names below are loaded on first use, so that parts that need no torch stay light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from entropy_polarity.diagnostics.exact import Sequences, exact_sensitivity
    from entropy_polarity.kernels import linear_token_loss, linear_token_stats, token_stats
    from entropy_polarity.maths import branch_flows, polarity, predicted_entropy_change
    from entropy_polarity.methods import METHODS, make_transform
    from entropy_polarity.tokens import Tokens, TokenStats
    from entropy_polarity.transforms import Monitor, Transform, chain

__version__ = "0.2.0"

_HOME = {
    "token_stats": "kernels",
    "linear_token_stats": "kernels",
    "linear_token_loss": "kernels",
    "branch_flows": "maths",
    "predicted_entropy_change": "maths",
    "polarity": "maths",
    "exact_sensitivity": "diagnostics.exact",
    "Sequences": "diagnostics.exact",
    "Tokens": "tokens",
    "TokenStats": "tokens",
    "Monitor": "transforms",
    "Transform": "transforms",
    "chain": "transforms",
    "METHODS": "methods",
    "make_transform": "methods",
}

__all__ = [
    "METHODS",
    "Monitor",
    "Sequences",
    "TokenStats",
    "Tokens",
    "Transform",
    "branch_flows",
    "chain",
    "exact_sensitivity",
    "linear_token_loss",
    "linear_token_stats",
    "make_transform",
    "polarity",
    "predicted_entropy_change",
    "token_stats",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'entropy_polarity' has no attribute {name!r}")
    return getattr(import_module(f"entropy_polarity.{_HOME[name]}"), name)
