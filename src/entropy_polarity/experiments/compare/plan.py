"""The plan of a comparison: methods with their settings, on the same recipe, seeds and problems.

recipe           name or path (default: the demonstration)
set              overrides of the recipe, like "trainer.max_steps=300"
seeds            of prompts, sampling and training: every method gets each of them, unless [seeds_of] says less
[seeds_of]       LABEL = [0, 1]: this method gets only these of the seeds, where compute is short
baselines        labels that all others are compared with (default: grpo and dapo where present, else the first)
[methods.LABEL]  name, and the method's own settings
[notes]          LABEL = "text": what that label is there for, in a sentence for the page
[search]         seeds, set: apart from those of the comparison, to choose constants on (`--search`)
[search.values]  LABEL = {key = "level", values = [0.3, 0.4]}, or {} for a method without a constant to choose

A TOML file with any of these keys is a plan; none of them is a key of a recipe. What a plan says is checked when it
is read, before anything runs.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

from entropy_polarity.methods import check_name, given_beside
from entropy_polarity.runs.recipe import DEFAULT_RECIPE, Recipe, apply_override, load_recipe, read_recipe, typed_table
from entropy_polarity.support.errors import unknown_name

_USUAL_BASELINES = ("grpo", "dapo")
# A label is part of the names of files.
_LABEL = re.compile(r"[A-Za-z0-9][\w.+=@-]*")


@dataclass(frozen=True)
class Choice:
    """The constant of a method that is to be chosen, and its candidates; without a key the method runs as it is."""

    key: str = ""
    values: list[Any] = field(default_factory=list)

    def candidates(self, table: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
        """(value, method table) of each candidate. Of `level` and `fraction` the value that is tried stays; controllers
        that are tried all get the settings of the table."""
        if not self.key:
            return [(None, table)]
        if self.key == "controller":
            return [(value, table | {self.key: value}) for value in self.values]
        return [(value, given_beside(table, {self.key: value}, warnings.warn)) for value in self.values]


@dataclass(frozen=True)
class Search:
    seeds: list[int] = field(default_factory=list)
    set: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)  # label -> Choice

    def __post_init__(self) -> None:
        choices = {
            label: value if isinstance(value, Choice) else typed_table(Choice, value, f"search.values.{label}.", "plan")
            for label, value in self.values.items()
        }
        object.__setattr__(self, "values", choices)
        for label, choice in choices.items():
            if bool(choice.key) != bool(choice.values):
                raise ValueError(f"plan key 'search.values.{label}' needs both key and values, or neither")
        sizes = {label: len(choice.values) for label, choice in choices.items() if len(choice.values) > 1}
        if len(set(sizes.values())) > 1:
            shown = ", ".join(f"{label}: {size}" for label, size in sizes.items())
            raise ValueError(f"every method gets the same budget, but the numbers of values differ ({shown})")


@dataclass(frozen=True)
class Plan:
    recipe: str = DEFAULT_RECIPE
    set: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    seeds_of: dict[str, Any] = field(default_factory=dict)  # label -> seeds
    baselines: list[str] = field(default_factory=list)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    search: Search = Search()

    def pairs(self) -> list[tuple[str, int]]:
        """(label, seed) of every run, seed by seed: what a stopped comparison has finished can be paired."""
        return [
            (label, seed)
            for seed in self.seeds
            for label in self.methods
            if seed in self.seeds_of.get(label, self.seeds)
        ]

    def recipe_of(self, label: str, seed: int) -> Recipe:
        """The whole recipe of one run, as `papo train` takes it."""
        base = load_recipe(self.recipe, self.set)
        return replace(base, title=f"{label}, seed {seed}", cost="", expected="", seed=seed, method=self.methods[label])


def load_plan(
    source: str,
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (),
    baselines: Sequence[str] = (),
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = warnings.warn,
) -> Plan:
    """The plan in the file `source`, or of the recipe `source` with `methods` like "papo:controller=balance".

    What `methods` say stands beside the name of a method, as in `load_recipe`, which has `say`; a table of a file with
    more than a name is all that its method is told. `seeds` (for every method) and `baselines` take the place of the
    file's, `overrides` come after its own. Raises ValueError or FileNotFoundError for whatever is wrong but the
    settings of the methods, which need the methods' code to check.
    """
    document = read_recipe(source)
    if not document.keys() & {f.name for f in fields(Plan)}:
        own, tables = load_recipe(source).method, methods_of(methods)
        for label, given in tables.items():
            with naming_method(label):
                tables[label] = given_beside(own, given, say, f"methods.{label}")
        document = {"recipe": source, "methods": tables}
    elif methods:
        raise ValueError(f"--methods cannot be given with a plan: {source} names them in [methods.LABEL] tables")
    if isinstance(document.get("search"), dict):
        document["search"] = typed_table(Search, document["search"], "search.", "plan")
    plan = typed_table(Plan, document, file="plan")
    plan = replace(
        plan,
        set=[*plan.set, *overrides],
        search=replace(plan.search, set=[*plan.search.set, *overrides] if plan.search.values else plan.search.set),
        seeds=list(seeds) or plan.seeds,
        seeds_of={} if seeds else plan.seeds_of,
        baselines=list(baselines) or plan.baselines,
    )
    return checked_plan(plan)


def checked_plan(plan: Plan) -> Plan:
    """The plan with nothing left to defaults that a reader of the results would have to look up elsewhere.

    As with `papo train --method`, a method that is only named has the recipe's settings if the recipe is about it.
    Raises as `load_plan`.
    """
    _check(plan)
    methods = {
        label: dict(table) if len(table) > 1 else load_recipe(plan.recipe, plan.set, table["name"]).method
        for label, table in plan.methods.items()
    }
    usual = [label for label in _USUAL_BASELINES if label in methods]
    return replace(plan, methods=methods, baselines=plan.baselines or usual or [next(iter(methods))])


def methods_of(specifications: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Method tables by label, from texts like "grpo", "papo:controller=reference,level=0.4", "held=papo:level=0.4".

    >>> methods_of(["grpo", "held=papo:controller=reference,level=0.4"])
    {'grpo': {'name': 'grpo'}, 'held': {'name': 'papo', 'controller': 'reference', 'level': 0.4}}
    """
    tables: dict[str, dict[str, Any]] = {}
    for specification in specifications:
        head, _, settings = specification.partition(":")
        label, labelled, name = head.partition("=")
        if label in tables:
            raise ValueError(f"two methods are called {label!r}: give one a label, like other={specification}")
        tables[label] = {"name": name if labelled else label}
        # A comma inside a list is followed by a value, between settings by the next key.
        for setting in re.split(r",(?=\s*\w+\s*=)", settings) if settings else []:
            if (key := setting.partition("=")[0].strip()) in tables[label]:
                raise ValueError(f"method {specification!r} gives {key!r} twice: leave one of them out")
            apply_override(tables[label], setting)
    return tables


@contextmanager
def naming_method(label: str) -> Iterator[None]:
    """A context whose ValueErrors name the table of the method that they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"[methods.{label}] {error}") from None


def _check(plan: Plan) -> None:
    if not plan.methods:
        raise ValueError("nothing to compare: give --methods, or a plan with [methods.LABEL] tables")
    for label, table in plan.methods.items():
        if not _LABEL.fullmatch(label):
            raise ValueError(
                f"label {label!r} names files: use letters, digits and _ . + = @ -, a letter or digit first"
            )
        if not isinstance(table, dict) or not isinstance(table.get("name"), str):
            raise ValueError(
                f"plan key 'methods.{label}' is {table!r}; expected a table with a name, as in papo methods"
            )
        with naming_method(label):
            check_name(table["name"])
    _check_seeds("seeds", plan.seeds)
    _check_labels(plan, "seeds_of", plan.seeds_of)
    for label, seeds in plan.seeds_of.items():
        _check_seeds(f"seeds_of.{label}", seeds)
        if stray := sorted({*seeds} - {*plan.seeds}):
            raise ValueError(f"plan key 'seeds_of.{label}' has seeds {stray}, which are not in seeds ({plan.seeds})")
    _check_labels(plan, "notes", plan.notes)
    for label, note in plan.notes.items():
        if not isinstance(note, str):
            raise ValueError(f"plan key 'notes.{label}' is {note!r}; expected a text")
    _check_overrides("set", plan.set)
    for label in plan.baselines:
        if label not in plan.methods:
            raise unknown_name("baseline", label, plan.methods)
    load_recipe(plan.recipe, plan.set)
    if plan.search.values:
        _check_search(plan)


def _check_search(plan: Plan) -> None:
    _check_seeds("search.seeds", plan.search.seeds)
    _check_overrides("search.set", plan.search.set)
    _check_labels(plan, "search.values", plan.search.values)
    if both := sorted({*plan.seeds} & {*plan.search.seeds}):
        raise ValueError(
            f"seeds {both} are in both seeds and search.seeds: what is chosen on a seed must not be judged on it"
        )
    final, search = (load_recipe(plan.recipe, s).evaluation.seed for s in (plan.set, [*plan.set, *plan.search.set]))
    if final == search:
        raise ValueError(
            f"the search would be judged on the problems of the comparison: both have evaluation.seed={final}; "
            'add "evaluation.seed=1000" to search.set'
        )


def _check_labels(plan: Plan, table: str, labels: Iterable[str]) -> None:
    for label in labels:
        if label not in plan.methods:
            raise unknown_name("plan key", f"{table}.{label}", [f"{table}.{method}" for method in plan.methods])


def _check_seeds(key: str, seeds: Any) -> None:
    right = isinstance(seeds, list) and seeds and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not right or len({*seeds}) < len(seeds):
        raise ValueError(f"plan key {key!r} is {seeds}; expected different whole numbers from 0 up, at least one")


def _check_overrides(key: str, overrides: list[Any]) -> None:
    for override in overrides:
        if not isinstance(override, str):
            raise ValueError(f'plan key {key!r} has {override!r}; expected texts like "trainer.max_steps=300"')
        section = override.partition("=")[0].partition(".")[0].strip()
        if section in ("seed", "method"):
            raise ValueError(f"override {override!r} of plan key {key!r} would not last: the plan has {section}s")
