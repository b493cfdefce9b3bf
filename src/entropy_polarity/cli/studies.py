"""Commands that run several trainings, or look into one: compare, ablate, audit."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from entropy_polarity.cli.common import Json, Overrides, check_early, note, print_json, refuse
from entropy_polarity.report.terminal import print_audit, print_comparison, print_search
from entropy_polarity.runs.recipe import DEFAULT_RECIPE, Recipe
from entropy_polarity.support.text import printable


def compare(
    plan: Positional[str] = DEFAULT_RECIPE,
    /,
    methods: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (),
    baselines: tuple[str, ...] = (),
    output: Path | None = None,
    jobs: int | None = None,
    max_steps: int | None = None,
    search: FlagCreatePairsOff[bool] = False,
    known: tuple[Path, ...] = (),
    finished: Annotated[Path | None, arg(name="from")] = None,
    overrides: Overrides = (),
    as_json: Json = False,
) -> None:
    """Compare methods on the same seeds, prompts and held-out problems. The same command goes on after a stop.

    Args:
        plan: a recipe (then --methods says what to compare), or a .toml file with [methods.LABEL] tables
        methods: such as grpo "papo:controller=reference,level=0.4" "held=papo:controller=thermostat,level=0.3"
        seeds: each method is trained with each of them (default: those of the plan, or 0 1 2)
        baselines: labels that the others are compared with (default: grpo and dapo where present, else the first)
        output: where runs, comparison.json and comparison.html go (default: runs/compare-<plan>)
        jobs: runs at a time (default: one for each CPU; each run has one thread unless OMP_NUM_THREADS is set); 0: no
            runs, only a summary of what is finished
        max_steps: optimiser steps of each run
        search: try the constants of the plan's [search] instead, and print what to paste into the plan
        known: result files (comparison.json, search.json) whose runs count as finished, as of another machine
        finished: print the tables of a comparison.json again, and write its page with --output; nothing is run
        overrides: any key of the recipe, e.g. trainer.learning_rate=1e-4
    """
    from entropy_polarity.experiments.compare.plan import load_plan

    if finished is not None:
        refuse(
            "--from", methods=methods, seeds=seeds, jobs=jobs, max_steps=max_steps, search=search, known=known,
            set=overrides,
        )  # fmt: skip
        return _compared_before(finished, baselines, output, as_json)
    if search:
        refuse("--search (give them in the plan's [search] table)", seeds=seeds)
    planned = load_plan(plan, methods, seeds, baselines, [*overrides, *_steps(max_steps)], note)
    check_early(planned.recipe_of(next(iter(planned.methods)), planned.seeds[0]))
    _compare(planned, output or Path("runs") / f"compare-{Path(plan).stem}", jobs, known, as_json, search)


def _compare(
    plan: Any, directory: Path, jobs: int | None, known: tuple[Path, ...], as_json: bool, search: bool = False
) -> None:
    from entropy_polarity.experiments.compare import experiment
    from entropy_polarity.report.progress import ComparisonView

    do = experiment.search if search else experiment.compare
    with ComparisonView(str(directory), sys.stderr if as_json else sys.stdout) as view:
        try:
            document = do(plan, directory, at_once=jobs, watch=view.watch, known=known)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command goes on; finished runs are kept") from None
    if as_json:
        print_json({"output": str(directory)} | {k: document[k] for k in document.keys() - {"runs", "environment"}})
    else:
        print_search(document) if search else print_comparison(document)
        print(printable(directory / (experiment.SEARCH if search else experiment.PAGE)))
    if document["failed"]:
        sys.exit(1)


def ablate(
    recipe: Positional[str] = DEFAULT_RECIPE,
    /,
    seeds: tuple[int, ...] = (0, 1, 2),
    output: Path | None = None,
    jobs: int | None = None,
    max_steps: int | None = None,
    known: tuple[Path, ...] = (),
    overrides: Overrides = (),
    as_json: Json = False,
) -> None:
    """What does each branch do? PAPO against its parts: one branch, a random share, no sign, shuffled signs.

    Args:
        recipe: name of a recipe that comes with the package, or path of a .toml file; its [method] sets PAPO
        seeds: each arm is trained with each of them
        output: where runs, comparison.json and comparison.html go (default: runs/ablate-<recipe>)
        jobs: as in papo compare
        max_steps: optimiser steps of each run
        known: as in papo compare
        overrides: any key of the recipe, e.g. method.level=0.3
    """
    from entropy_polarity.experiments.compare.ablation import ablation_plan

    planned = ablation_plan(recipe, seeds, [*overrides, *_steps(max_steps)], note)
    check_early(planned.recipe_of("papo", planned.seeds[0]))
    _compare(planned, output or Path("runs") / f"ablate-{Path(recipe).stem}", jobs, known, as_json)


def _steps(max_steps: int | None) -> tuple[str, ...]:
    return () if max_steps is None else (f"trainer.max_steps={max_steps}",)


def _compared_before(file: Path, baselines: tuple[str, ...], output: Path | None, as_json: bool) -> None:
    from entropy_polarity.experiments.compare.experiment import read_comparison, write_page
    from entropy_polarity.experiments.results import as_written

    with as_written(file):
        document = read_comparison(file, baselines)
        if output is not None:
            write_page(document, output)
        print_json(document["summary"]) if as_json else print_comparison(document)


def audit(
    recipe: Positional[str] = DEFAULT_RECIPE,
    /,
    model: str | None = None,
    task: str | None = None,
    method: str | None = None,
    steps: int = 40,
    seeds: tuple[int, ...] = (0,),
    optimizer: Literal["adamw", "sgd"] | None = None,
    output: Path | None = None,
    finished: Annotated[Path | None, arg(name="from")] = None,
    overrides: Overrides = (),
    as_json: Json = False,
) -> None:
    """Does polarity predict the entropy change? Audit every update of a short training. The same command goes on.

    Args:
        recipe: name of a recipe that comes with the package, or path of a .toml file
        model: "embedded", a model folder, or a run directory (its last checkpoint, on its own recipe)
        task: name of a task (default: the recipe's)
        method: a name of `papo methods` (default: that of a run as --model, else grpo)
        steps: updates to audit, for each seed, one per rollout: 4 or more; intervals take 20, those of forecasts 25
        seeds: seeds of prompts, sampling and training; what is finished in --output is kept
        optimizer: adamw, or sgd without momentum at a learning rate of 0.1 (default: the recipe's)
        output: where audit.json and audit.html go (default: runs/audit-<recipe>-<method>-<optimizer>)
        finished: print the tables of an audit.json again, summarised anew from its updates, and write them and the
            page with --output; nothing is run
        overrides: any key of the recipe, e.g. trainer.learning_rate=1e-5
    """
    from entropy_polarity.experiments.flags import audit_folder, audit_recipe
    from entropy_polarity.experiments.results import as_written

    if finished is not None:
        from entropy_polarity.experiments.auditing import audited_before

        refuse("--from", model=model, task=task, method=method, optimizer=optimizer, set=overrides)
        with as_written(finished):
            return _print_found(audited_before(finished, output), output, as_json)
    chosen = audit_recipe(recipe, model, task, method, steps, optimizer, overrides, note)
    check_early(chosen)
    _audit(chosen, seeds, steps, output or audit_folder(recipe, chosen), as_json)


def _audit(chosen: Recipe, seeds: tuple[int, ...], steps: int, directory: Path, as_json: bool) -> None:
    from entropy_polarity.experiments.auditing import audit as run
    from entropy_polarity.report.lines import LiveOrLines

    with LiveOrLines(sys.stderr if as_json else sys.stdout) as view:

        def watch(seed: int, step: int, exact: float, realised: float) -> None:
            view.line(f"seed {seed}, update {step}/{steps}: exact {exact:+.5f}, realised {realised:+.5f} nats")

        try:
            document = run(chosen, seeds, directory, watch)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command goes on; finished seeds are kept") from None
    _print_found(document, directory, as_json)


def _print_found(document: dict[str, Any], directory: Path | None, as_json: bool) -> None:
    from entropy_polarity.experiments.auditing import PAGE

    if as_json:
        found = {key: value for key, value in document.items() if key not in ("runs", "environment")}
        return print_json({"output": directory and str(directory)} | found)
    print_audit(document)
    if directory is not None:
        print(printable(directory / PAGE))
