"""The parts that commands share: flags that are written alike, help that reads alike, and JSON on standard output."""

import inspect
import json
import re
import sys
from collections.abc import Callable
from typing import Annotated, Any

from tyro.conf import FlagCreatePairsOff, UseAppendAction, arg

from entropy_polarity.runs.recipe import Recipe

Json = Annotated[
    FlagCreatePairsOff[bool],
    arg(name="json", help="print one JSON document on standard output, nothing else"),
]
Overrides = Annotated[UseAppendAction[tuple[str, ...]], arg(name="set", metavar="KEY=VALUE")]


def readable(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with help that says the default once, where there is one, and breaks lines nowhere but at the edge.

    tyro would add (default: None) to "(default: runs/...)", and keep the line breaks of the docstring.
    """
    # Of our docstrings: a name four spaces in, its text in deeper lines.
    told_of = re.compile(r"^    (\w+): (.*?)(?=\n    \w|\Z)", re.DOTALL | re.MULTILINE)
    texts = dict(told_of.findall(inspect.getdoc(command) or ""))
    for name, parameter in inspect.signature(command).parameters.items():
        told: dict[str, Any] = {"help": " ".join(texts[name].split())} if name in texts else {}
        if parameter.default in (None, ()) or parameter.default is False or "(default: " in told.get("help", ""):
            told["help_behavior_hint"] = "(repeatable)" if parameter.annotation == Overrides else ""
        if parameter.kind is parameter.POSITIONAL_ONLY:
            told["metavar"] = name.upper() if parameter.default is parameter.empty else f"[{name.upper()}]"
        command.__annotations__[name] = Annotated[parameter.annotation, arg(**told)]
    return command


def note(line: str) -> None:
    """Print a decision that was made for the user, on standard error."""
    print(f"papo: {line}", file=sys.stderr)


def check_early(recipe: Recipe) -> None:
    """Raise ValueError or FileNotFoundError for what can be said of a recipe without the seconds that torch and TRL
    take to load: names and settings of its method and its task, and the folder of its model."""
    from entropy_polarity.methods import check_method
    from entropy_polarity.policy import resolve_model
    from entropy_polarity.tasks import check_task

    check_method(recipe.method["name"], {key: value for key, value in recipe.method.items() if key != "name"})
    check_task(**recipe.task)
    resolve_model(recipe.policy.model)


def print_json(document: Any) -> None:
    from entropy_polarity.support.json_files import without_nan

    # JSON escapes all that could move a cursor, but for DEL.
    print(json.dumps(without_nan(document), indent=2, allow_nan=False).replace("\x7f", "\\u007f"))


def refuse(owner: str, **flags: Any) -> None:
    """Raise ValueError for flags that would have no effect."""
    given = [f"--{name.replace('_', '-')}" for name, value in flags.items() if value not in (None, (), False)]
    if given:
        raise ValueError(f"{', '.join(given)} cannot be given with {owner}")
