"""Estimates and differences with their intervals, as text and as bars: a dash, and no bar, for what is not known."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from entropy_polarity.support.brackets import interval


def between(bounds: Sequence[float] | None, form: str = "+.3f") -> str:
    """The bounds (low, high) in brackets; None where they are not known."""
    low, high = bounds or (None, None)
    return interval(low, high, form)


def estimated(estimate: Mapping[str, Any], form: str = ".3f", joint: str = " ") -> str:
    """The value of an estimate and its interval."""
    return f"{estimate['value']:{form}}{joint}{interval(estimate['low'], estimate['high'], form)}"


def bars(estimates: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """plotly's error bars, from "value", "low" and "high" of each."""
    known = [e if e["low"] is not None else {"value": 0.0, "low": 0.0, "high": 0.0} for e in estimates]
    return {
        "array": [e["high"] - e["value"] for e in known],
        "arrayminus": [e["value"] - e["low"] for e in known],
        "thickness": 1,
    }
