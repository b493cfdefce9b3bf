"""What a method fixes in a trainer's loss, and the columns of its loss terms."""

from collections.abc import Mapping
from typing import Any

# Columns of Tokens with a method's terms of the loss, and how they are called in a framework's batch.
TERMS = {"entropy_bonus": "polarity_entropy_bonus", "ratio_penalty": "polarity_ratio_penalty"}


def fixed_settings(
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
