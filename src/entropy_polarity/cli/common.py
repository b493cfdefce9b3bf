"""What commands share: flags that are written alike, and JSON on standard output."""

import json
from typing import Annotated, Any

from tyro.conf import FlagCreatePairsOff, UseAppendAction, arg

Json = Annotated[
    FlagCreatePairsOff[bool],
    arg(name="json", help="print one JSON document on standard output, nothing else"),
]
Overrides = Annotated[UseAppendAction[tuple[str, ...]], arg(name="set", metavar="KEY=VALUE")]


def print_json(document: Any) -> None:
    from entropy_polarity.experiments.results import without_nan

    # JSON escapes all that could move a cursor, but for DEL.
    print(json.dumps(without_nan(document), indent=2, allow_nan=False).replace("\x7f", "\\u007f"))


def refuse(owner: str, **flags: Any) -> None:
    """Raise ValueError for flags that would have no effect."""
    given = [f"--{name.replace('_', '-')}" for name, value in flags.items() if value not in (None, (), False)]
    if given:
        raise ValueError(f"{', '.join(given)} cannot be given with {owner}")
