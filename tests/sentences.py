"""Sentences of the documents whose numbers are those of result files, for the tests of pages."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


@cache
def page(name: str) -> str:
    """The text of a page, its white space collapsed."""
    return " ".join((ROOT / "docs" / name).read_text(encoding="utf-8").split())


@cache
def document(name: str) -> dict[str, Any]:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))


def numbers(path: str) -> tuple[float, ...]:
    """The numbers at "FILE/key/key": of an estimate, a mean or a difference its value; with "[" at the end its interval
    as well (of a difference that of Student's t), with "±" the standard deviation."""
    name, *keys = path.rstrip("[±").split("/")
    value: Any = document(name)
    for key in keys:
        value = value[int(key) if isinstance(value, list) else key]
    if not isinstance(value, dict):
        return tuple(value) if isinstance(value, list) else (value,)
    central = next(value[key] for key in ("value", "mean", "difference") if key in value)
    if path.endswith("±"):
        return central, value["sd"]
    if path.endswith("["):
        return (central, *value["t"]) if "t" in value else (central, value["low"], value["high"])
    return (central,)


def written(template: str, *values: float) -> str:
    """The template with its slots filled in order: {} with two decimals, {%} in hundredths, {:FORMAT} in a format, and
    {|:FORMAT} without the sign.

    >>> written("{} {%} % {:+.3f} {|:.1f}", 0.257, 0.5, 0.1, -2)
    '0.26 50 % +0.100 2.0'
    """
    slots = re.findall(r"\{[^}]*\}", template)
    assert len(slots) == len(values), f"{len(slots)} slots, {len(values)} numbers: {template}"
    for slot, value in zip(slots, values, strict=True):
        if slot == "{%}":
            text = f"{100 * value:.0f}"
        else:
            text = format(abs(value) if slot.startswith("{|") else value, slot.strip("{}|").lstrip(":") or ".2f")
        template = template.replace(slot, text, 1)
    return template


def check(name: str, template: str, *paths: str) -> None:
    """The page has the sentence with the numbers of the files."""
    sentence = written(template, *(number for path in paths for number in numbers(path)))
    assert sentence in page(name), f"docs/{name} does not say: {sentence}"
