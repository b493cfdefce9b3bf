"""What `papo eval` does: the same problems for every model, every sampling seed, and what is different between them."""

import gc
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from entropy_polarity.evaluation import Attempts, attempt, warn_after, warn_before
from entropy_polarity.experiments.models import labelled, settle_task, weights_of
from entropy_polarity.experiments.results import bounds, provenance, rounded, write_document
from entropy_polarity.experiments.setup import quiet
from entropy_polarity.generation import Generator, Progress, Sampling, silent
from entropy_polarity.generation.episodes import check_starts
from entropy_polarity.generation.sampling import TransformersGenerator
from entropy_polarity.policy import resolve_model
from entropy_polarity.policy.folder import check_folder
from entropy_polarity.policy.loading import load_policy
from entropy_polarity.report.evaluation import render_evaluation
from entropy_polarity.runs.layout import refuse_occupied
from entropy_polarity.statistics.intervals import DIFFERENCE, RATE, Estimate, paired_bootstrap
from entropy_polarity.support.errors import unknown_name
from entropy_polarity.support.files import append_text, locked, write_text
from entropy_polarity.support.json_files import without_nan
from entropy_polarity.tasks import Problem, Task, distinct_problems, make_task
from entropy_polarity.tasks.games import Game

EVALUATION, PROBLEMS, PAGE = "evaluation.json", "problems.jsonl", "evaluation.html"
Backend = Literal["transformers", "vllm"]
SHOWN_PROBLEMS, SHOWN_ATTEMPTS = 12, 4  # on the page
SMALL = 100_000_000  # bytes of weights


@dataclass(frozen=True)
class Settings:
    """How models are evaluated: on `problems` held-out problems of the stream `seed`, with `samples` samples for each
    of the sampling `seeds`. A count that is None is chosen by `budget`, and by what the task has."""

    problems: int | None = None
    samples: int | None = None
    seed: int = 0
    seeds: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    backend: Backend = "transformers"
    batch_size: int | None = None

    def __post_init__(self) -> None:
        for name, count in (("problems", self.problems), ("samples", self.samples)):
            if count is not None and count < 1:
                raise ValueError(f"{name} is {count}; expected at least 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; expected a positive number")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; expected a number above 0, at most 1")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; expected at least 1")
        if self.batch_size is not None and self.backend == "vllm":
            raise ValueError("--batch-size cannot be given with --backend vllm, which batches on its own")
        object.__setattr__(self, "seeds", self.seeds or (self.seed,))
        if min(self.seed, *self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"seed is {self.seed}, seeds are {list(self.seeds)}; expected different ones, none negative"
            )


def budget(weights: Sequence[str]) -> tuple[int, int]:
    """(problems, samples) of an evaluation where nobody says: 200 x 16 if the weights of every model are a folder of at
    most 100 MB, else 100 x 4. It looks at no clock: the same command has the same counts on every machine."""
    return (200, 16) if all(0 < _bytes_of(Path(resolve_model(place))) <= SMALL for place in weights) else (100, 4)


def _bytes_of(folder: Path) -> int:
    """Of the weights in a folder; 0 for what is none, as a name of the hub."""
    return sum(file.stat().st_size for kind in ("safetensors", "bin") for file in folder.glob(f"*model*.{kind}"))


def evaluate_models(
    models: Sequence[str],
    settings: Settings,
    *,
    task: str | None = None,
    task_settings: Sequence[str] = (),
    baseline: str | None = None,
    output: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Evaluate every one of `models` on the same problems; where there are several, compare them with `baseline`.

    A model is a folder, a hub name, a run (its last checkpoint) or a checkpoint of a run, by default on the run's own
    task; "label=model" gives it another name than its own. Returns the document that `output` gets as evaluation.json,
    beside problems.jsonl (a line for every problem, model and seed) and the page. What a user can get wrong raises
    ValueError, OSError or ImportError, most of it before anything is computed.
    """
    quiet()
    named = labelled(models)
    reference = _reference(baseline, list(named))
    weights = {label: weights_of(model)[0] for label, model in named.items()}
    for place in weights.values():
        if (folder := Path(resolve_model(place))).is_dir():
            check_folder(folder)
    of_task = settle_task(named, task, task_settings)
    judged = make_task(**of_task)
    if isinstance(judged, Game) and settings.backend != "transformers":
        raise ValueError(f"task {judged.name!r} is a game, which only --backend transformers can play")
    most, samples = budget(list(weights.values()))
    said = settings.problems is not None
    chosen = distinct_problems(judged, settings.seed, "test", settings.problems or most, or_all=not said)
    settings = replace(settings, problems=len(chosen), samples=settings.samples or samples)
    if output is not None:
        refuse_occupied(output)
    if isinstance(judged, Game):
        check_starts(judged, chosen)
    attempts: dict[str, list[Attempts]] = {}
    batch_sizes: dict[str, list[int]] = {}
    with nullcontext() if output is None else locked(output, "evaluation"):
        if output is not None:
            refuse_occupied(output)  # again: another evaluation may just have ended there
        for label, place in weights.items():
            attempts[label], batch_sizes[label] = _attempts_of(
                label, place, judged, chosen, settings, output, say, progress
            )
    document = {
        "evaluation": 1,  # version of this layout
        "task": of_task,
        "settings": asdict(settings),
        "environment": provenance(),
        "game": isinstance(judged, Game),
        "baseline": reference,
        **summarise(attempts, judged, reference),
    }
    for label, found in document["models"].items():
        document["models"][label] = {"model": weights[label], "batch_sizes": batch_sizes[label], **found}
    if output is not None:
        write_document(output / EVALUATION, document)
        write_text(output / PAGE, render_evaluation(document, examples(attempts)))
    return document


def _attempts_of(
    label: str,
    place: str,
    task: Task | Game,
    problems: list[Problem],
    settings: Settings,
    output: Path | None,
    say: Callable[[str], None],
    progress: Progress,
) -> tuple[list[Attempts], list[int]]:
    """The attempts of one model with each sampling seed, written as they come, and its batch sizes."""
    generator, made = _generator(place, settings), []
    warn_before(generator, task, problems, say, label)
    for seed in settings.seeds:
        say(f"{label}, seed {seed}: {settings.problems} problems x {settings.samples} samples")
        told = partial(_told, progress, f"{label}, seed {seed}")
        made.append(_attempted(generator, task, problems, seed, settings, made[0].greedy if made else None, told))
        warn_after(made[-1], say, f"{label}, seed {seed}")
        if output is not None:
            _append(output / PROBLEMS, label, seed, made[-1])
    batch_sizes = generator.batch_sizes
    del generator
    _free()
    return made, batch_sizes


def summarise(attempts: dict[str, list[Attempts]], task: Task | Game, reference: str | None) -> dict[str, Any]:
    """Every measure of every model with its interval over problems and seeds, and its paired differences to
    `reference`."""
    voted = not isinstance(task, Game)
    scores = {label: _by_seed([made.measures(voted) for made in rows]) for label, rows in attempts.items()}
    facts = {label: _by_seed([made.facts() for made in rows]) for label, rows in attempts.items()}
    models = {
        label: {
            "scores": {name: _estimate(values, _is_rate(name)) for name, values in scores[label].items()},
            "facts": {name: _estimate(values, False) for name, values in facts[label].items()},
            "verdicts": _mean_shares([made.verdicts(task.reasons) for made in rows]),
            "successes": [made.successes for made in rows],
            "greedy": rows[0].greedy_right,
        }
        for label, rows in attempts.items()
    }
    against = {}
    if reference is not None:
        theirs = scores[reference] | facts[reference]
        for label in attempts.keys() - {reference}:
            mine = scores[label] | facts[label]
            shared = [name for name in mine if name in theirs and _complete(mine[name] + theirs[name]).any()]
            against[label] = {
                name: _difference(mine[name], theirs[name], name in scores[label] and _is_rate(name)) for name in shared
            }
    return {"models": models, "against": {label: against[label] for label in attempts if label in against}}


def _by_seed(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """(seeds, problems) for each name that every seed has, of one problem at least."""
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0] if all(name in row for row in rows)}
    return {name: values for name, values in stacked.items() if _complete(values).any()}


def _complete(values: np.ndarray) -> np.ndarray:
    """The problems of which every seed has a number: an environment need not always count the same."""
    return np.logical_not(np.isnan(values).any(axis=0))


def _is_rate(score: str) -> bool:
    """Whether a score is a share of right answers; a reward may be anything."""
    return score != "reward"


def _estimate(values: np.ndarray, rate: bool) -> dict[str, float | None]:
    estimate = Estimate.of(values[:, _complete(values)], RATE if rate else None)
    return without_nan({name: rounded(value) for name, value in asdict(estimate).items()})


def _difference(a: np.ndarray, b: np.ndarray, rate: bool) -> dict[str, Any]:
    """Over the problems that both have, and the same sampling seeds."""
    both = _complete(a + b)
    found = paired_bootstrap(a[:, both], b[:, both], within=DIFFERENCE if rate else None)
    return {"difference": rounded(found.value), "bootstrap": bounds(found)}


def _mean_shares(shares: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: rounded(sum(share[name] for share in shares) / len(shares)) for name in shares[0]}


def _reference(baseline: str | None, labels: list[str]) -> str | None:
    if baseline is not None and baseline not in labels:
        raise unknown_name("baseline", baseline, labels)
    if len(labels) == 1:
        if baseline is not None:
            raise ValueError(f"--baseline {baseline} needs several models to compare: give them with --model")
        return None
    return baseline or labels[0]


def _generator(place: str, settings: Settings) -> Generator:
    if settings.backend == "vllm":
        from entropy_polarity.generation.vllm import VllmGenerator

        return VllmGenerator(resolve_model(place))
    policy, tokenizer = load_policy(place)
    return TransformersGenerator(
        policy.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, settings.batch_size
    )


def _attempted(
    generator: Generator,
    task: Task | Game,
    problems: list[Problem],
    seed: int,
    settings: Settings,
    greedy: list[Any] | None,
    progress: Progress,
) -> Attempts:
    assert settings.samples is not None  # chosen by now
    sampling = Sampling(settings.temperature, settings.top_p)
    voted = not isinstance(task, Game)
    return attempt(
        generator,
        task,
        problems,
        settings.samples,
        seed,
        sampling,
        final_answers=voted,
        greedy=greedy,
        progress=progress,
    )


def _told(progress: Progress, about: str, what: str, done: float, total: int) -> None:
    progress(f"{about}, {what}", done, total)


def _append(path: Path, label: str, seed: int, made: Attempts) -> None:
    """A line for each problem: what was asked, what is right, and every attempt."""
    for number, (problem, row, greedy) in enumerate(zip(made.problems, made.sampled, made.greedy, strict=True)):
        line = {
            "model": label,
            "seed": seed,
            "problem": number,
            "prompt": problem.prompt,
            "facts": problem.facts,
            "successes": sum(one.right for one in row),
            "samples": [one.to_json() for one in row],
            "greedy": greedy.to_json(),
        }
        append_text(path, json.dumps(line, default=str) + "\n")


def examples(attempts: dict[str, list[Attempts]]) -> list[dict[str, Any]]:
    """For the page: problems, those first whose numbers of right samples differ most between the models (with the first
    sampling seed), with a few attempts of each model; of one model the first problems."""
    first = {label: rows[0] for label, rows in attempts.items()}
    problems = next(iter(first.values())).problems
    counts = np.array([made.successes for made in first.values()])
    spread = counts.max(axis=0) - counts.min(axis=0)
    order = sorted(range(len(problems)), key=lambda i: (-spread[i], i))[:SHOWN_PROBLEMS]
    return [
        {
            "number": number,
            "prompt": problems[number].prompt,
            "facts": problems[number].facts,
            "models": {
                label: {
                    "successes": sum(one.right for one in made.sampled[number]),
                    "samples": made.samples,
                    "attempts": [one.to_json() for one in made.sampled[number][:SHOWN_ATTEMPTS]],
                }
                for label, made in first.items()
            },
        }
        for number in order
    ]


def _free() -> None:
    """What a model leaves behind has to go before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
