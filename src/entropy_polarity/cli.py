"""The `papo` command. Torch is imported inside the commands, so that help and errors are instant."""

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction, arg

from entropy_polarity._errors import unknown_name
from entropy_polarity.recipe import DEFAULT_RECIPE, Recipe, apply_override, load_recipe, with_flags
from entropy_polarity.report.terminal import (
    print_audit,
    print_comparison,
    print_estimates,
    print_evaluation,
    print_search,
)

Json = Annotated[
    FlagCreatePairsOff[bool],
    arg(name="json", help="print one JSON document on standard output, nothing else"),
]
Overrides = Annotated[UseAppendAction[tuple[str, ...]], arg(name="set", metavar="KEY=VALUE")]


def train(
    recipe: Positional[str] = DEFAULT_RECIPE,
    /,
    output: Path | None = None,
    task: str | None = None,
    method: str | None = None,
    max_steps: int | None = None,
    seed: int | None = None,
    model: str | None = None,
    resume: Path | None = None,
    overrides: Overrides = (),
    as_json: Json = False,
) -> None:
    """Train a policy by reinforcement, from a recipe into a run directory.

    Args:
        recipe: name of a recipe that comes with the package, or path of a .toml file
        output: the run directory; must not hold a run yet (default: runs/<recipe>-<method>-<seed>)
        task: in place of the recipe's: countdown, math:PRESET, gym:DATASET, guess, keydoor, textarena:GAME,
            textworld:CHALLENGE, math (with --set task.data=FILE) or env (with --set task.factory=MODULE:CLASS)
        method: a name of `papo methods`
        max_steps: optimiser steps
        seed: seed of prompts, sampling and training
        model: "embedded", or a folder with a Hugging Face causal language model
        resume: a run directory to go on with, from its last checkpoint (its own recipe is used)
        overrides: any key of the recipe, e.g. trainer.learning_rate=1e-4; can be repeated
    """
    chosen, directory = _what_to_train(recipe, output, task, method, max_steps, seed, model, resume, overrides)

    from entropy_polarity.experiments.train import train as run
    from entropy_polarity.report.live import LiveView

    steps = chosen.trainer.get("max_steps", -1)
    with LiveView(chosen.title or str(directory), steps, sys.stderr if as_json else sys.stdout) as view:
        summary = run(chosen, directory, resume=resume is not None, watch=view.watch, say=view.say)
    if as_json:
        _print_json({"run": str(directory), **summary})
    else:
        print_estimates({name: summary[name] for name in ("before", "after") if name in summary})
        print(f"{summary['status']}: {directory}/report.html")


def _what_to_train(
    recipe: str,
    output: Path | None,
    task: str | None,
    method: str | None,
    max_steps: int | None,
    seed: int | None,
    model: str | None,
    resume: Path | None,
    overrides: tuple[str, ...],
) -> tuple[Recipe, Path]:
    if resume is None:
        named = () if task is None else (f"task={{name={task!r}}}",)
        chosen = with_flags(
            load_recipe(recipe, (*named, *overrides), method), max_steps=max_steps, seed=seed, model=model
        )
        return chosen, output or Path("runs") / f"{Path(recipe).stem}-{chosen.method['name']}-{chosen.seed}"
    fixed = {
        "--output": output,
        "--task": task,
        "--method": method,
        "--seed": seed,
        "--model": model,
        "--set": overrides or None,
    }
    given = [flag for flag, value in fixed.items() if value is not None]
    if given or recipe != DEFAULT_RECIPE:
        what = ", ".join(given) or f"recipe {recipe}"
        raise ValueError(
            f"{what} cannot be given with --resume: a resumed run keeps its recipe (only --max-steps may change)"
        )
    if not (resume / "config.toml").is_file():
        raise FileNotFoundError(f"{resume} holds no run to resume: config.toml is missing")
    return with_flags(load_recipe(str(resume / "config.toml")), max_steps=max_steps), resume


def evaluate(
    model: tuple[str, ...] = ("embedded",),
    baseline: str | None = None,
    task: str | None = None,
    samples: int = 16,
    problems: int = 200,
    seed: int = 0,
    seeds: tuple[int, ...] = (),
    temperature: float = 1.0,
    top_p: float = 1.0,
    output: Path | None = None,
    backend: Literal["transformers", "vllm"] = "transformers",
    batch_size: int | None = None,
    overrides: Overrides = (),
    as_json: Json = False,
) -> None:
    """Evaluate models on held-out problems: avg@k, pass@k and maj@k with intervals; several side by side.

    Args:
        model: model folders, runs (their last checkpoints), checkpoints of runs, or "embedded"; LABEL=MODEL names one
        baseline: label of the model that the others are compared with (default: the first)
        task: name of a task (default: the runs' own, or countdown)
        samples: completions a problem, the largest k
        problems: number of held-out problems
        seed: seed of the problems, and of sampling unless --seeds are given
        seeds: seeds of sampling; intervals are then over problems and seeds
        temperature: sampling temperature
        top_p: sample from the likeliest tokens that make up this probability
        output: folder for evaluation.json, problems.jsonl (every completion) and evaluation.html
        backend: what generates; vllm needs the extra [vllm]
        batch_size: completions at a time to start with, halved when memory runs out (default: by free memory)
        overrides: settings of the task, e.g. numbers=[3,4]; can be repeated
    """
    from entropy_polarity.experiments.evaluate import PAGE, Settings, evaluate_models
    from entropy_polarity.report.lines import LiveOrLines

    settings = Settings(problems, samples, seed, seeds, temperature, top_p, backend, batch_size)
    with LiveOrLines(sys.stderr) as view:
        document = evaluate_models(
            model,
            settings,
            task=task,
            task_settings=overrides,
            baseline=baseline,
            output=output,
            say=view.line,
        )
    if as_json:
        return _print_json(document)
    print_evaluation(document)
    if output is not None:
        print(output / PAGE)


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
        overrides: any key of the recipe, e.g. trainer.learning_rate=1e-4; can be repeated
    """
    from entropy_polarity.experiments.compare.plan import load_plan

    if finished is not None:
        _refuse("--from", methods=methods, seeds=seeds, jobs=jobs, max_steps=max_steps, search=search, known=known)
        return _compared_before(finished, baselines, output, as_json)
    if search:
        _refuse("--search (give them in the plan's [search] table)", seeds=seeds)
    planned = load_plan(plan, methods, seeds, baselines, [*overrides, *_steps(max_steps)])
    _compare(planned, output or Path("runs") / f"compare-{Path(plan).stem}", jobs, known, as_json, search)


def _compare(
    plan: Any, directory: Path, jobs: int | None, known: tuple[Path, ...], as_json: bool, search: bool = False
) -> None:
    from entropy_polarity.experiments.compare import experiment
    from entropy_polarity.report.progress import ComparisonView

    do = experiment.search if search else experiment.compare
    with ComparisonView(str(directory), sys.stderr if as_json else sys.stdout) as view:
        try:
            document = do(plan, directory, jobs, view.watch, known)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command goes on; finished runs are kept") from None
    if as_json:
        _print_json({"output": str(directory)} | {k: document[k] for k in document.keys() - {"runs", "environment"}})
    else:
        print_search(document) if search else print_comparison(document)
        print(directory / (experiment.SEARCH if search else experiment.PAGE))
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
        overrides: any key of the recipe, e.g. method.level=0.3; can be repeated
    """
    from entropy_polarity.experiments.compare.ablation import ablation_plan

    planned = ablation_plan(recipe, seeds, [*overrides, *_steps(max_steps)])
    _compare(planned, output or Path("runs") / f"ablate-{Path(recipe).stem}", jobs, known, as_json)


def _steps(max_steps: int | None) -> tuple[str, ...]:
    return () if max_steps is None else (f"trainer.max_steps={max_steps}",)


def _refuse(owner: str, **flags: Any) -> None:
    """Raise ValueError for flags that would have no effect."""
    given = [f"--{name.replace('_', '-')}" for name, value in flags.items() if value not in (None, (), False)]
    if given:
        raise ValueError(f"{', '.join(given)} cannot be given with {owner}")


def _compared_before(file: Path, baselines: tuple[str, ...], output: Path | None, as_json: bool) -> None:
    from entropy_polarity.experiments.compare.experiment import read_comparison, write_page

    document = read_comparison(file, baselines)
    if output is not None:
        write_page(document, output)
    _print_json(document["summary"]) if as_json else print_comparison(document)


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
        steps: updates to audit, for each seed; one update a rollout
        seeds: seeds of prompts, sampling and training; what is finished in --output is kept
        optimizer: adamw, or sgd without momentum at a learning rate of 0.1 (default: the recipe's)
        output: where audit.json and audit.html go (default: runs/audit-<recipe>-<method>-<optimizer>)
        finished: print the tables of an audit.json again, summarised anew from its updates, and write them and the
            page with --output; nothing is run
        overrides: any key of the recipe, e.g. trainer.learning_rate=1e-5; can be repeated
    """
    from entropy_polarity.experiments.audit import audit as run
    from entropy_polarity.experiments.audit import audit_recipe, audited_before, default_output
    from entropy_polarity.report.lines import LiveOrLines

    if finished is not None:
        _refuse("--from", model=model, task=task, method=method, optimizer=optimizer, set=overrides)
        return _print_found(audited_before(finished, output), output, as_json)
    chosen = audit_recipe(recipe, model, task, method, steps, optimizer, overrides)
    directory = output or default_output(recipe, chosen)
    with LiveOrLines(sys.stderr if as_json else sys.stdout) as view:

        def watch(seed: int, step: int, exact: float, realised: float) -> None:
            view.line(f"seed {seed}, update {step}/{steps}: exact {exact:+.5f}, realised {realised:+.5f} nats")

        try:
            document = run(chosen, seeds, directory, watch)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command goes on; finished seeds are kept") from None
    _print_found(document, directory, as_json)


def _print_found(document: dict[str, Any], directory: Path | None, as_json: bool) -> None:
    from entropy_polarity.experiments.audit import PAGE

    if as_json:
        found = {key: value for key, value in document.items() if key not in ("runs", "environment")}
        return _print_json({"output": directory and str(directory)} | found)
    print_audit(document)
    if directory is not None:
        print(directory / PAGE)


def report(run: Positional[Path], /, as_json: Json = False) -> None:
    """Write the page of a run again, from its files.

    Args:
        run: the run directory
    """
    from entropy_polarity.record import Run, RunWriter
    from entropy_polarity.report.page import render_page

    page = RunWriter(run).write_report(render_page(Run.read(run)))
    _print_json({"report": str(page)}) if as_json else print(page)


def methods(as_json: Json = False) -> None:
    """List the methods: what each does, when it decides and what that costs, what it needs, its source and settings."""
    from entropy_polarity.methods import describe_methods

    rows = describe_methods()
    if as_json:
        return _print_json(rows)
    table = Table("method", "what it does; from what it decides, and what that costs; its settings (? has no default)")
    table.show_lines = True
    for row in rows:
        needs = f"; needs {', '.join(row['needs'])}" if row["needs"] else ""
        lines = [
            row["summary"],
            f"from {row['decides']}{needs}; extra pass: {row['cost']}",
            *([_settings_line("fixes of the loss", row["fixes"])] if row["fixes"] else []),
            _settings_line("settings", row["settings"]),
            *(_settings_line(f"  {name} ({c['decides']})", c["settings"]) for name, c in row["controllers"].items()),
            row["source"],
        ]
        table.add_row(row["name"], escape("\n".join(lines)))
    Console().print(table)


def _settings_line(owner: str, settings: dict[str, Any]) -> str:
    listed = (f"{name}={'?' if value == 'required' else repr(value)}" for name, value in settings.items())
    return f"{owner}: {', '.join(listed) or 'none'}"


def pretrain(
    output: Path,
    task: str = "countdown",
    seed: int = 0,
    steps: int = 1200,
    width: int = 128,
    layers: int = 4,
    overrides: Overrides = (),
    as_json: Json = False,
) -> None:
    """Make an embedded policy again, from a seed, and say how good it is.

    Args:
        output: where the model goes; must not exist yet
        task: countdown ("embedded"), games ("embedded:games": guess and keydoor) or gym:DATASET
        seed: seed of weights and problems
        steps: supervised steps, each on a batch of demonstrations
        width: of the hidden states, a multiple of 32
        layers: number of layers
        overrides: numbers of countdown, or config of a gym data set, e.g. config.max_terms=3; can be repeated
    """
    if width < 32 or width % 32 or min(layers, steps) < 1:
        raise ValueError(
            f"width {width}, layers {layers}, steps {steps}; expected a multiple of 32, and 1 or more of the others"
        )

    from entropy_polarity.experiments.pretrain import pretrain_policy
    from entropy_polarity.policy.pretrain import PretrainSettings

    def progress(step: int, loss: float) -> None:
        if step % 50 == 0 or step == steps:
            print(f"step {step}/{steps}  loss {loss:.4f}", file=sys.stderr, flush=True)

    given: dict[str, Any] = {}
    for override in overrides:
        apply_override(given, override)
    if stray := sorted(given.keys() - {"numbers", "config"}):
        raise unknown_name("setting", stray[0], ["numbers", "config"])
    given = {key: tuple(value) if key == "numbers" else value for key, value in given.items()}
    settings = PretrainSettings(task, seed, steps, width=width, layers=layers, **given)
    quality = pretrain_policy(output, settings, progress)
    if as_json:
        return _print_json(quality)
    print_estimates(quality["evaluation"])
    print(f"policy written to {output}")


def doctor(as_json: Json = False) -> None:
    """Say which kernels run here and why, and check versions, hooks and accuracy. Exit code 1 if something is wrong."""
    from entropy_polarity.doctor import examine

    findings = examine()
    if as_json:
        _print_json([finding._asdict() for finding in findings])
    else:
        colours = {"ok": "green", "note": "yellow", "problem": "red"}
        table = Table("what", "", "found")
        for finding in findings:
            mark = f"[{colours[finding.status]}]{finding.status}[/]"
            table.add_row(escape(finding.part), mark, escape(finding.detail))
        Console().print(table)
    if any(finding.status == "problem" for finding in findings):
        sys.exit(1)


def _print_json(document: Any) -> None:
    from entropy_polarity.experiments.results import without_nan

    print(json.dumps(without_nan(document), indent=2, allow_nan=False))


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "eval": evaluate,
    "compare": compare,
    "ablate": ablate,
    "audit": audit,
    "report": report,
    "methods": methods,
    "pretrain": pretrain,
    "doctor": doctor,
}


def main() -> None:
    """Bad input ends in one clear line and exit code 2; PAPO_DEBUG=1 shows the traceback instead."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a model of the hub is fetched with HF_HUB_OFFLINE=0
    warnings.filterwarnings("ignore")
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="papo", description="Measure and control entropy.")
    except KeyboardInterrupt as stop:
        how = str(stop) or "papo train --resume goes on with a run from its last checkpoint"
        print(f"papo: stopped; {how}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if os.environ.get("PAPO_DEBUG"):
            raise
        line = _one_line(error)
        if line is None:
            raise
        print(f"papo: {line}", file=sys.stderr)
        sys.exit(2)


def _one_line(error: BaseException | None) -> str | None:
    """What a user can act on; None for what is a bug and deserves its traceback."""
    chain = error
    while chain is not None:
        # Writers of checkpoints turn a full disk into errors of their own.
        full = ("No space left on device", "code: 28", "inline_container", "PytorchStreamWriter")
        if any(sign in str(chain) for sign in full):
            return "no space left on the device: free some, then go on with papo train --resume"
        chain = chain.__cause__ or chain.__context__
    if isinstance(error, ValueError | OSError | ImportError):
        return " ".join(str(error).split()) or type(error).__name__
    return None


if __name__ == "__main__":
    main()
