"""One wording for one mistake: a name that is not known, a setting of the wrong type."""

import inspect
import math
import types
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin


def unknown_name(kind: str, given: Any, known: Iterable[str]) -> ValueError:
    """A ValueError that names what was given, the nearest known name and all known names.

    >>> str(unknown_name("method", "pappo", ["grpo", "papo"]))
    "unknown method 'pappo': did you mean 'papo'? Known: grpo, papo"
    """
    names = sorted(known)
    near = get_close_matches(str(given), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    # A list nobody can read helps nobody: TRL's configuration alone has over two hundred fields.
    listed = f"Known: {', '.join(names) or 'none'}" if len(names) <= 30 else f"{len(names)} names are known"
    return ValueError(f"unknown {kind} {given!r}: {hint}{listed}")


def check_settings(owner: str, build: Callable[..., Any], settings: Mapping[str, Any], *also: str) -> None:
    """Raise ValueError for a setting that `build` does not take, or of another type than it is annotated with.

    `also` are names known elsewhere, for the suggestion. Callers keep a `**settings` of `build` out of this.
    """
    # Not get_type_hints: what a builder returns may be written as the name of something that is not loaded yet.
    hints = {name: parameter.annotation for name, parameter in inspect.signature(build).parameters.items()}
    for name, value in settings.items():
        if name not in hints:
            raise unknown_name(f"setting of {owner}", name, [*hints, *also])
        if not _fits(value, hint := hints[name]):
            wanted = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            raise ValueError(f"setting {name!r} of {owner} is {value!r}; expected {wanted}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"setting {name!r} of {owner} is {value!r}; expected a finite number")


def check_range(owner: str, name: str, value: float, low: float = 0.0, high: float = math.inf, why: str = "") -> None:
    """Raise ValueError unless low <= value <= high; NaN is outside every range.

    >>> check_range("clip_cov", "fraction", 1.5, 0, 1)
    Traceback (most recent call last):
    ...
    ValueError: clip_cov: fraction is 1.5; expected a value from 0 to 1
    """
    if not low <= value <= high:
        wanted = f"a value from {low:g} to {high:g}" if high < math.inf else f"at least {low:g}"
        raise ValueError(f"{owner}: {name} is {value}; expected {wanted}{why}")


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if hint is float:
        return type(value) in (int, float)
    if origin is tuple:  # TOML has lists
        return isinstance(value, tuple | list)
    if origin is not None:
        return isinstance(value, origin)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return isinstance(value, str | hint)
    return type(value) is hint or (hint is types.NoneType and value is None)
