"""`papo compare`: check the plan, run what is missing, summarise, write the document and the page."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

from entropy_polarity.experiments.compare.plan import Plan, naming_method
from entropy_polarity.experiments.compare.runs import Job, Queue, claim, locked, refuse_others
from entropy_polarity.experiments.compare.search import candidates_of, choose, judge, search_plan, unseen_problems
from entropy_polarity.experiments.compare.summary import RunResults, summarise
from entropy_polarity.experiments.results import as_written, provenance, read_document, write_document
from entropy_polarity.methods import make_transform, name_of
from entropy_polarity.report.comparison import render_comparison
from entropy_polarity.report.progress import RunState
from entropy_polarity.runs.record import Run
from entropy_polarity.support.errors import unknown_name
from entropy_polarity.support.files import write_text
from entropy_polarity.support.json_files import parsed

COMPARISON, PAGE, SEARCH = "comparison.json", "comparison.html", "search.json"
Watch = Callable[[list[RunState]], None]


class How(TypedDict, total=False):
    """How runs are made: `at_once` of them at a time, where 0 makes none and summarises what is finished, even while
    another process is at work; `watch` gets the states of all; runs that the result files `known` hold are finished
    too, so that several machines can share a plan."""

    at_once: int | None
    watch: Watch
    known: Sequence[Path]


class _Made(NamedTuple):
    """The results of all finished runs, why others failed, and whether the work was stopped."""

    runs: list[RunResults]
    failed: dict[str, str]
    stopped: bool


def compare(plan: Plan, output: Path, **how: Unpack[How]) -> dict[str, Any]:
    """Train and evaluate every method of `plan` on every seed into `output`; what is finished there is kept.

    Returns the document that is written to comparison.json, after a stop as well; its "failed" names the runs that
    did not finish, with the last line of their logs. Raises ValueError for a plan that cannot run, or a directory that
    holds other runs, before anything starts, and if no run finished; KeyboardInterrupt after a stop.
    """
    made = _run(plan, output, output, **how)
    document = _document("comparison", plan, plan, made, summary=summarise(made.runs, plan.baselines))
    write_document(output / COMPARISON, document)
    write_page(document, output)
    if made.stopped:
        raise KeyboardInterrupt
    return document


def search(plan: Plan, output: Path, **how: Unpack[How]) -> dict[str, Any]:
    """Try the values of [search.values] on the search's seeds and problems; runs go into `output`/search. Returns the
    document that is written to search.json. Raises as `compare`."""
    trial = search_plan(plan)
    kept = unseen_problems(plan, trial)
    made = _run(trial, output / "search", output, **how)
    rows = judge(candidates_of(plan), made.runs, trial.seeds, kept)
    found = {
        "criterion": "highest mean over the search's seeds of the final held-out pass@1; ties: of pass@16",
        "problems": len(kept),
        "rows": rows,
        "chosen": {row["label"]: trial.methods[row["run_label"]] for row in choose(rows).values() if row},
    }
    document = _document("search", plan, trial, made, **found)
    write_document(output / SEARCH, document)
    if made.stopped:
        raise KeyboardInterrupt
    return document


def _document(kind: str, plan: Plan, trained: Plan, made: _Made, **results: Any) -> dict[str, Any]:
    """A result document: `kind` holds the version of the layout, "plan" the settings that were `trained`."""
    return {
        kind: 1,
        "plan": _portable(plan) | {"resolved": _portable(trained)["resolved"]},
        "environment": provenance(),
        "failed": made.failed,
        **results,
        "runs": [asdict(run) for run in made.runs],
    }


def read_comparison(file: Path, baselines: Sequence[str] = ()) -> dict[str, Any]:
    """The document of a comparison, summarised again, with other baselines if any are given."""
    document = read_document(file, "comparison")
    plan = document["plan"] | ({"baselines": list(baselines)} if baselines else {})
    for label in plan["baselines"]:
        if label not in plan["methods"]:
            raise unknown_name("baseline", label, plan["methods"])
    summary = summarise([RunResults(**run) for run in document["runs"]], plan["baselines"])
    return document | {"plan": plan, "summary": summary}


def write_page(document: dict[str, Any], output: Path) -> Path:
    """The page of a comparison in the folder `output`."""
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / PAGE, render_comparison(document))
    return output / PAGE


def default_jobs() -> int:
    """As many runs as there are threads for: the CPUs that this process may use, over OMP_NUM_THREADS (1)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return max(1, cores // max(1, int(threads) if threads.isdigit() else 1))


def _run(
    plan: Plan,
    root: Path,
    output: Path,
    at_once: int | None = None,
    watch: Watch = lambda states: None,
    known: Sequence[Path] = (),
) -> _Made:
    """Make the runs of `plan` in `root`, under the lock of `output`."""
    if at_once is not None and at_once < 0:
        raise ValueError(f"jobs is {at_once}; expected at least 1, or 0 to summarise what is finished")
    _check(plan)
    results, pairs = _known(known, plan), plan.pairs()
    jobs = [Job(*pair, plan.recipe_of(*pair), root) for pair in pairs if pair not in results]
    if at_once == 0:
        if not output.exists() and not results:
            raise ValueError(f"jobs is 0, and {output} is not there: nothing to summarise")
        claim(output)
        refuse_others(jobs)
        failed, stopped = {}, False
    else:
        failed, stopped = _train(jobs, root, output, at_once or default_jobs(), watch)
    ended = [job for job in jobs if job.finished]
    results |= {(job.label, job.seed): RunResults.of(job.label, Run.read(job.directory)) for job in ended}
    runs = [results[pair] for pair in pairs if pair in results]
    if stopped and not runs:
        raise KeyboardInterrupt
    if not runs:
        raise ValueError("no run finished" + "".join(f"; {name}: {line}" for name, line in sorted(failed.items())))
    return _Made(runs, failed, stopped)


def _train(jobs: list[Job], root: Path, output: Path, at_once: int, watch: Watch) -> tuple[dict[str, str], bool]:
    """Why runs failed, by name, and whether the work was stopped."""
    with locked(output) as lock:
        refuse_others(jobs)
        for folder in ("recipes", "runs", "logs"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        try:
            return Queue(jobs, at_once, lock, watch).run(), False
        except KeyboardInterrupt:
            return {}, True


def _known(files: Sequence[Path], plan: Plan) -> dict[tuple[str, int], RunResults]:
    """The runs of `plan` that result files hold. Raises ValueError for a file of another setting."""
    runs: dict[tuple[str, int], RunResults] = {}
    for file in files:
        try:
            document = parsed(file.read_bytes())
        except ValueError:
            document = None
        if not isinstance(document, dict) or "runs" not in document:
            raise ValueError(f"{file} is no result of papo compare: give a comparison.json or a search.json")
        with as_written(file):
            if document.get("plan", {}).get("resolved") != parsed(json.dumps(_portable(plan)["resolved"])):
                raise ValueError(f"{file} is of another recipe than the plan: its runs cannot be taken over")
            for run in (RunResults(**run) for run in document["runs"]):
                # By what was run, not by its label: a search calls the candidates of a method by numbers.
                method = run.method | {"name": name_of(run.method["name"], run.date)}
                same = [label for label, table in plan.methods.items() if table == method]
                runs |= {(label, run.seed): replace(run, label=label) for label in same}
    return runs


def _check(plan: Plan) -> None:
    """Everything that a run would refuse in its first seconds, for every method, before any starts."""
    for label, table in plan.methods.items():
        with naming_method(label):
            make_transform(table["name"], {key: value for key, value in table.items() if key != "name"})
    from entropy_polarity.experiments.setup import check_recipe, quiet  # TRL: seconds that none of the above need wait

    quiet()
    for label in plan.methods:
        check_recipe(plan.recipe_of(label, plan.seeds[0]), Path())


def _portable(plan: Plan) -> dict[str, Any]:
    """The plan with the recipe itself beside its name: a path of this machine says nothing elsewhere."""
    recipe = plan.recipe_of(next(iter(plan.methods)), plan.seeds[0]).to_dict()
    kept = {key: recipe[key] for key in ("task", "policy", "trainer", "evaluation", "record")}
    return asdict(plan) | {"recipe": Path(plan.recipe).stem, "resolved": kept}
