"""A setting of the loss that a method fixes has one owner: the method."""

from collections.abc import Mapping
from typing import Any


def to_set(
    method: str, wanted: Mapping[str, Any], given: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """What of `wanted` (setting to value, None for what is not fixed) has to be set in a trainer's configuration, which
    has `given`. Raises ValueError where the user asked for something else than the trainer's default and the method's.
    """
    fixed = {name: value for name, value in wanted.items() if value is not None}
    for name, value in fixed.items():
        if given[name] not in (defaults[name], value):
            raise ValueError(
                f"{name}={given[name]!r} was given, but method {method!r} sets it to {value!r}: leave {name} out, or "
                "use the settings of the method"
            )
    return fixed
