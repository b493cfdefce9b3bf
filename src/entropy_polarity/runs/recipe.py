"""Recipes: a documented setting of everything a run needs, as a TOML file that comes with the package or a path.

title, cost, expected    what the run is, what it takes, what was measured
seed                     of prompts, sampling and training
[task]                   name, and the task's own settings
[policy]                 model: "embedded", or a folder with a Hugging Face causal language model
[method]                 name, and the method's own settings; or method = ["dapo", "papo"], a chain
[trainer]                any argument of TRL's GRPOConfig
[evaluation]             problems, samples, seed: held-out evaluation before and after
[record]                 completions: how many sampled completions of each rollout are kept
"""

import copy
import tomllib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

from entropy_polarity.methods import chain_name, given_beside
from entropy_polarity.support.errors import unknown_name
from entropy_polarity.support.text import valid

DEFAULT_RECIPE = "countdown"
_LEAST = {"seed": 0, "evaluation.problems": 1, "evaluation.samples": 1, "evaluation.seed": 0, "record.completions": 0}


@dataclass(frozen=True)
class Policy:
    model: str = "embedded"


@dataclass(frozen=True)
class HeldOut:
    problems: int = 200
    samples: int = 16
    seed: int = 0  # which problems, and of their sampling; the recipe's own seed leaves both as they are


@dataclass(frozen=True)
class Recorded:
    completions: int = 4


@dataclass(frozen=True)
class Recipe:
    title: str = ""
    cost: str = ""
    expected: str = ""
    seed: int = 0
    task: dict[str, Any] = field(default_factory=lambda: {"name": "countdown"})
    policy: Policy = Policy()
    method: dict[str, Any] = field(default_factory=lambda: {"name": "papo"})
    trainer: dict[str, Any] = field(default_factory=dict)
    evaluation: HeldOut = HeldOut()
    record: Recorded = Recorded()

    def __post_init__(self) -> None:
        values = flattened(self.to_dict())
        for key, low in _LEAST.items():
            if values[key] < low:
                raise ValueError(f"recipe key {key!r} is {values[key]}; expected at least {low}")
        if text := next(_no_text(self.to_dict()), None):
            raise ValueError(f"recipe value {text!r} is no text that a file can hold (it has half a character, or NUL)")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _no_text(value: Any) -> Iterator[str]:
    """The texts in it that are none: an argument of the command line can have bytes that the locale does not know."""
    if isinstance(value, dict | list | tuple):
        parts = chain.from_iterable(value.items()) if isinstance(value, dict) else value
        yield from chain.from_iterable(map(_no_text, parts))
    elif isinstance(value, str) and valid(value) != value:
        yield value


_SECTIONS = {"policy": Policy, "evaluation": HeldOut, "record": Recorded}


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    folder = files("entropy_polarity") / "recipes"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


def load_recipe(
    name_or_path: str,
    overrides: Sequence[str] = (),
    method: str | None = None,
    say: Callable[[str], None] = warnings.warn,
) -> Recipe:
    """The recipe of that name or at that path, with `overrides` like "trainer.learning_rate=1e-4" applied.

    Overrides like "method.gain=3" are settings beside the method's name, by the rules of `methods.given_beside`, which
    gets `say`; one like 'method={name="papo", level=0.3}' is all that the method is told. With `method` the recipe is
    about that one: only the same name keeps the settings of the recipe. What it says of its cost and its result holds
    for nothing else, nor does its title for another task or model.

    Raises ValueError for an unknown name, a file that is not TOML, a key that is not known (naming the nearest known
    one) or a value of the wrong type, and FileNotFoundError for a path where there is no file.
    """
    document = read_recipe(name_or_path)
    written = copy.deepcopy(document)
    given: dict[str, Any] = {} if method is None else {"name": method}
    for override in overrides:
        section, dot, _ = override.partition("=")[0].partition(".")
        if section.strip() != "method":
            apply_override(document, override)
        elif dot:
            apply_override(given, override.partition(".")[2])
        else:
            apply_override(document, override)
            given = {}
    for tables in (document, written):
        told = tables.get("method")
        if isinstance(told, list):  # the methods of a chain
            told = {"name": told}
        if isinstance(told, dict) and "name" in told:
            tables["method"] = told | {"name": chain_name(told["name"])}
    own = document.get("method", Recipe().method)
    if given and isinstance(own, dict):
        document["method"] = given_beside(own, given, say)
    return _recipe(_what_holds(document, written))


def _what_holds(document: dict[str, Any], written: dict[str, Any]) -> dict[str, Any]:
    """`document` without the words of the recipe as `written` that do not fit it any more."""
    stale = set() if document == written else {"cost", "expected"}
    if any(document.get(table) != written.get(table) for table in ("task", "policy")):
        stale.add("title")
    return {key: value for key, value in document.items() if key not in stale or value != written.get(key)}


def read_recipe(name_or_path: str) -> dict[str, Any]:
    """The tables of the recipe of that name or at that path, as they stand in the file. Raises as `load_recipe`."""
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.parent != Path("."):
        if not path.is_file():
            raise FileNotFoundError(f"no recipe at {path}: give a .toml file, or one of {', '.join(recipe_names())}")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"recipe {path} is not UTF-8 ({error.reason} at byte {error.start})") from None
    elif name_or_path in recipe_names():
        text = (files("entropy_polarity") / "recipes" / f"{name_or_path}.toml").read_text(encoding="utf-8")
    else:
        raise unknown_name("recipe", name_or_path, recipe_names())
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"recipe {name_or_path} is not valid TOML: {error}") from None
    except RecursionError:
        raise ValueError(f"recipe {name_or_path} is nested too deeply to be one") from None


def apply_override(document: dict[str, Any], override: str) -> None:
    """Set one dotted key of `document` from text like "trainer.learning_rate=1e-4"; the value is TOML or a word."""
    key, equals, value = override.partition("=")
    if not equals:
        raise ValueError(f"override {override!r} has no '=': write it like trainer.learning_rate=1e-4")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value  # a bare word is a string
    except RecursionError:
        raise ValueError(f"override {key!r} is nested too deeply to be a value") from None
    *sections, last = key.strip().split(".")
    for section in sections:
        document = document.setdefault(section, {})
        if not isinstance(document, dict):
            raise ValueError(f"override {override!r}: {section!r} is a value, not a table of keys")
    document[last] = parsed


def flattened(table: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested tables by dotted key; a table without keys has none.

    >>> flattened({"seed": 0, "method": {"name": "papo", "gain": 3}})
    {'seed': 0, 'method.name': 'papo', 'method.gain': 3}
    """
    if not isinstance(table, Mapping):
        return {prefix.removesuffix("."): table}
    return {k: v for key, value in table.items() for k, v in flattened(value, f"{prefix}{key}.").items()}


def _recipe(document: dict[str, Any]) -> Recipe:
    given = {key: section for key, section in _SECTIONS.items() if key in document}
    tables = {key: typed_table(section, document[key], f"{key}.") for key, section in given.items()}
    recipe = typed_table(Recipe, document | tables)
    for table in ("task", "method"):
        if "name" not in getattr(recipe, table):
            raise ValueError(f"recipe table [{table}] has no name")
    return recipe


def typed_table(kind: type, values: Any, prefix: str = "", file: str = "recipe") -> Any:
    """An instance of the dataclass `kind`; unknown keys and values of another type than the default's are refused."""
    if not isinstance(values, dict):
        raise ValueError(f"{file} key {prefix.rstrip('.')!r} is {values!r}; expected a table [{prefix.rstrip('.')}]")
    defaults = {f.name: getattr(kind(), f.name) for f in fields(kind)}
    for key, value in values.items():
        if key not in defaults:
            raise unknown_name(f"{file} key", f"{prefix}{key}", [f"{prefix}{name}" for name in defaults])
        expected = type(defaults[key])
        if type(value) is not expected:
            what = f"a table [{key}]" if expected is dict else f"a value of type {expected.__name__}"
            raise ValueError(f"{file} key {prefix + key!r} is {value!r}; expected {what}")
    return kind(**values)


def with_flags(
    recipe: Recipe, *, max_steps: int | None = None, seed: int | None = None, model: str | None = None
) -> Recipe:
    """The recipe with the values that the command line gave, without the words that no longer hold."""
    if max_steps is not None:
        recipe = replace(recipe, trainer=recipe.trainer | {"max_steps": max_steps}, cost="", expected="")
    if seed is not None:
        recipe = replace(recipe, seed=seed)
    if model is not None:
        recipe = replace(recipe, policy=replace(recipe.policy, model=model), title="", cost="", expected="")
    return recipe


def fitting(chosen: Recipe, written: Recipe) -> Recipe:
    """`chosen` with an evaluation of at most 100 problems x 4 samples where it has another task or model than the
    recipe as it is `written`, and still the evaluation that was made to that one's measure."""
    same = (chosen.task["name"], chosen.policy) == (written.task["name"], written.policy)
    if same or chosen.evaluation != written.evaluation:
        return chosen
    made = written.evaluation
    return replace(chosen, evaluation=replace(made, problems=min(100, made.problems), samples=min(4, made.samples)))
