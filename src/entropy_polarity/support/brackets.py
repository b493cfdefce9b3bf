"""An interval as text."""

import math


def interval(low: float | None, high: float | None, form: str = ".3f") -> str:
    """The bounds in brackets, or a dash where too little was seen to say.

    >>> interval(0.25, 0.5), interval(None, None), interval(math.nan, math.nan)
    ('[0.250, 0.500]', '[-]', '[-]')
    """
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return "[-]"
    return f"[{low:{form}}, {high:{form}}]"
