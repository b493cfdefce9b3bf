"""What `papo compare` does: check the plan, run what is missing, summarise, write the document and the page."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from entropy_polarity.experiments.compare.plan import Plan
from entropy_polarity.experiments.compare.runs import Job, Queue, claim, locked, refuse_others
from entropy_polarity.experiments.compare.search import candidates_of, choose, judge, search_plan, unseen_problems
from entropy_polarity.experiments.compare.summary import Facts, summarise
from entropy_polarity.experiments.results import as_written, provenance, read_document, write_document
from entropy_polarity.methods import make_transform, name_of
from entropy_polarity.report.comparison import render_comparison
from entropy_polarity.report.progress import RunState
from entropy_polarity.runs.record import Run
from entropy_polarity.support.errors import unknown_name
from entropy_polarity.support.files import write_text

COMPARISON, PAGE, SEARCH = "comparison.json", "comparison.html", "search.json"
Watch = Callable[[list[RunState]], None]


def compare(
    plan: Plan,
    output: Path,
    at_once: int | None = None,
    watch: Watch = lambda states: None,
    known: Sequence[Path] = (),
) -> dict[str, Any]:
    """Train and evaluate every method of `plan` on every seed into `output`; what is finished there is kept.

    Runs that the result files `known` hold are finished too: several machines can share a plan. `at_once` runs are made
    at a time; with 0 none is made, and what is finished is summarised, even while another process is at work.
    Returns the document that is written to comparison.json, after a stop as well; its "failed" names the runs that
    did not finish, with the last line of their logs. Raises ValueError for a plan that cannot run, or a directory that
    holds other runs, before anything starts, and if no run finished; KeyboardInterrupt after a stop.
    """
    runs, failed, stopped = _run(plan, output, output, at_once, watch, known)
    document = {
        "comparison": 1,  # version of this layout
        "plan": _portable(plan),
        "environment": provenance(),
        "failed": failed,
        "summary": summarise(runs, plan.baselines),
        "runs": [run.to_json() for run in runs],
    }
    write_document(output / COMPARISON, document)
    write_page(document, output)
    if stopped:
        raise KeyboardInterrupt
    return document


def search(
    plan: Plan,
    output: Path,
    at_once: int | None = None,
    watch: Watch = lambda states: None,
    known: Sequence[Path] = (),
) -> dict[str, Any]:
    """Try the values of [search.values] on the search's seeds and problems; runs go into `output`/search.

    Returns the document that is written to search.json: one row a candidate, and the method tables of the chosen.
    Raises as `compare`.
    """
    trial = search_plan(plan)
    kept = unseen_problems(plan, trial)
    runs, failed, stopped = _run(trial, output / "search", output, at_once, watch, known)
    rows = judge(candidates_of(plan), runs, trial.seeds, kept)
    chosen = choose(rows)
    document = {
        "search": 1,
        "plan": _portable(plan) | {"resolved": _portable(trial)["resolved"]},
        "environment": provenance(),
        "criterion": "highest mean over the search's seeds of the final held-out pass@1; ties: of pass@16",
        "problems": len(kept),
        "failed": failed,
        "rows": rows,
        "chosen": {row["label"]: trial.methods[row["run_label"]] for row in chosen.values() if row},
        "runs": [run.to_json() for run in runs],
    }
    write_document(output / SEARCH, document)
    if stopped:
        raise KeyboardInterrupt
    return document


def read_comparison(file: Path, baselines: Sequence[str] = ()) -> dict[str, Any]:
    """The document of a comparison, summarised again, with other baselines if any are given."""
    document = read_document(file, "comparison")
    used = list(baselines) or document["plan"]["baselines"]
    for label in used:
        if label not in document["plan"]["methods"]:
            raise unknown_name("baseline", label, document["plan"]["methods"])
    plan = document["plan"] | {"baselines": used}
    return document | {"plan": plan, "summary": summarise([Facts(**run) for run in document["runs"]], used)}


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
    plan: Plan, root: Path, output: Path, at_once: int | None, watch: Watch, known: Sequence[Path]
) -> tuple[list[Facts], dict[str, str], bool]:
    """The facts of all finished runs of `plan`, made in `root` under the lock of `output`; what failed; and whether
    it was stopped."""
    if at_once is not None and at_once < 0:
        raise ValueError(f"jobs is {at_once}; expected at least 1, or 0 to summarise what is finished")
    _check(plan)
    elsewhere = _known(known, plan)
    wanted = plan.pairs()
    jobs = [
        Job(label, seed, plan.recipe_of(label, seed), root) for label, seed in wanted if (label, seed) not in elsewhere
    ]
    failed, stopped = {}, False
    if at_once == 0:
        if not output.exists() and not elsewhere:
            raise ValueError(f"jobs is 0, and {output} is not there: nothing to summarise")
        claim(output)
        refuse_others(jobs)
    else:
        with locked(output) as lock:
            refuse_others(jobs)
            for folder in ("recipes", "runs", "logs"):
                (root / folder).mkdir(parents=True, exist_ok=True)
            try:
                failed = Queue(jobs, at_once or default_jobs(), lock, watch).run()
            except KeyboardInterrupt:
                stopped = True
    made = {(job.label, job.seed): Facts.of(job.label, Run.read(job.directory)) for job in jobs if job.finished}
    runs = [facts for key in wanted if (facts := (elsewhere | made).get(key))]
    if stopped and not runs:
        raise KeyboardInterrupt
    if not runs:
        raise ValueError("no run finished" + "".join(f"; {name}: {line}" for name, line in sorted(failed.items())))
    return runs, failed, stopped


def _known(files: Sequence[Path], plan: Plan) -> dict[tuple[str, int], Facts]:
    """The runs of `plan` that result files hold. Raises ValueError for a file of another setting."""
    runs: dict[tuple[str, int], Facts] = {}
    for file in files:
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict) or "runs" not in document:
            raise ValueError(f"{file} is no result of papo compare: give a comparison.json or a search.json")
        with as_written(file):
            resolved = document.get("plan", {}).get("resolved")
        if resolved != json.loads(json.dumps(_portable(plan)["resolved"])):
            raise ValueError(f"{file} is of another recipe than the plan: its runs cannot be taken over")
        with as_written(file):
            for run in (Facts(**run) for run in document["runs"]):
                # By what was run, not by its label: a search calls the candidates of a method by numbers.
                method = run.method | {"name": name_of(run.method["name"], run.date)}
                same = [label for label, table in plan.methods.items() if table == method]
                runs |= {(label, run.seed): replace(run, label=label) for label in same}
    return runs


def _check(plan: Plan) -> None:
    """Everything that a run would refuse in its first seconds, for every method, before any starts."""
    for label, table in plan.methods.items():
        settings = {key: value for key, value in table.items() if key != "name"}
        try:
            make_transform(table["name"], settings)
        except ValueError as error:
            raise ValueError(f"[methods.{label}] {error}") from None
    from entropy_polarity.experiments.setup import check_recipe, quiet  # TRL: seconds that none of the above need wait

    quiet()
    for label in plan.methods:
        check_recipe(plan.recipe_of(label, plan.seeds[0]), Path())


def _portable(plan: Plan) -> dict[str, Any]:
    """The plan with the recipe itself beside its name: a path of this machine says nothing elsewhere."""
    recipe = plan.recipe_of(next(iter(plan.methods)), plan.seeds[0]).to_dict()
    kept = {key: recipe[key] for key in ("task", "policy", "trainer", "evaluation", "record")}
    return plan.to_json() | {"recipe": Path(plan.recipe).stem, "resolved": kept}
