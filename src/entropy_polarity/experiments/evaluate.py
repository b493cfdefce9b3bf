"""What `papo eval` does: the same problems for every model, every sampling seed, and what is different between them."""

import gc
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from entropy_polarity.evaluation import Attempts, attempt, warn_after, warn_before
from entropy_polarity.experiments.evaluation_summary import examples, summarise
from entropy_polarity.experiments.models import ChosenModels, chosen_models
from entropy_polarity.experiments.results import provenance, write_document
from entropy_polarity.experiments.setup import quiet
from entropy_polarity.generation import Generator, Progress, Sampling, silent
from entropy_polarity.generation.attempts import Attempt
from entropy_polarity.generation.sampling import TransformersGenerator
from entropy_polarity.policy import resolve_model
from entropy_polarity.policy.loading import check_folder, load_policy
from entropy_polarity.report.evaluation import render_evaluation
from entropy_polarity.runs.layout import refuse_occupied
from entropy_polarity.support.files import append_text, locked, write_text
from entropy_polarity.tasks import Problem, Task, distinct_problems, make_task
from entropy_polarity.tasks.protocol import expect_one_turn

EVALUATION, PROBLEMS, PAGE = "evaluation.json", "problems.jsonl", "evaluation.html"
Backend = Literal["transformers", "vllm"]
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
        for name in ("problems", "samples", "batch_size"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise ValueError(f"{name} is {count}; expected at least 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; expected a positive number")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; expected a number above 0, at most 1")
        if self.batch_size is not None and self.backend == "vllm":
            raise ValueError("--batch-size cannot be given with --backend vllm, which batches on its own")
        object.__setattr__(self, "seeds", self.seeds or (self.seed,))
        if min(self.seed, *self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"seed is {self.seed}, seeds are {list(self.seeds)}; expected different ones, none negative"
            )


def budget(weights: Sequence[str]) -> tuple[int, int]:
    """(problems, samples) where none are given: 200 x 16 if the weights of every model are a folder of at most 100 MB,
    else 100 x 4. It looks at no clock: the same command has the same counts on every machine."""
    return (200, 16) if all(0 < _bytes_of(Path(resolve_model(place))) <= SMALL for place in weights) else (100, 4)


def _bytes_of(folder: Path) -> int:
    """The bytes of the weights in a folder; 0 where there is no such folder, as for a name of the hub."""
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
    chosen = chosen_models(models, baseline, task, task_settings)
    for folder in map(Path, map(resolve_model, chosen.weights.values())):
        if folder.is_dir():
            check_folder(folder)
    made = make_task(**chosen.task)
    if settings.backend != "transformers":
        expect_one_turn(made, "only --backend transformers can play episodes")
    most, samples = budget([*chosen.weights.values()])
    count, or_all = (most, True) if settings.problems is None else (settings.problems, False)
    problems = distinct_problems(made, settings.seed, "test", count, or_all)
    settings = replace(settings, problems=len(problems), samples=settings.samples or samples)
    if output is not None:
        refuse_occupied(output)
    made.check_starts(problems)
    evaluation = _Evaluation(made, problems, settings, output, say, progress)
    with nullcontext() if output is None else locked(output, "evaluation"):
        if output is not None:
            refuse_occupied(output)  # again: another evaluation may just have ended there
        found = {label: evaluation.of_model(label, place) for label, place in chosen.weights.items()}
    return _written(chosen, evaluation, found)


class _Found(NamedTuple):
    """The attempts of a model with each sampling seed, and its batch sizes."""

    attempts: list[Attempts]
    batch_sizes: list[int]


@dataclass(frozen=True)
class _Evaluation:
    """The evaluation of every model on the same problems, whose attempts are written as they are made."""

    task: Task
    problems: list[Problem]
    settings: Settings
    output: Path | None
    say: Callable[[str], None]
    progress: Progress

    def of_model(self, label: str, place: str) -> _Found:
        generator, made = _generator(place, self.settings), []
        warn_before(generator, self.task, self.problems, self.say, label)
        for seed in self.settings.seeds:
            about = f"{label}, seed {seed}"
            self.say(f"{about}: {self.settings.problems} problems x {self.settings.samples} samples")
            made.append(self._attempted(generator, seed, made[0].greedy if made else None, about))
            warn_after(made[-1], self.say, about)
            if self.output is not None:
                _append(self.output / PROBLEMS, label, seed, made[-1])
        found = _Found(made, generator.batch_sizes)
        # What a model leaves behind has to go before the next one is loaded.
        del generator
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return found

    def _attempted(self, generator: Generator, seed: int, greedy: list[Attempt] | None, about: str) -> Attempts:
        def progress(what: str, done: float, total: int) -> None:
            self.progress(f"{about}, {what}", done, total)

        samples, sampling = self.settings.samples, Sampling(self.settings.temperature, self.settings.top_p)
        assert samples is not None  # chosen by now
        more: dict[str, Any] = {"final_answers": True, "greedy": greedy, "progress": progress}
        return attempt(generator, self.task, self.problems, samples, seed, sampling, **more)


def _written(chosen: ChosenModels, evaluation: _Evaluation, found: dict[str, _Found]) -> dict[str, Any]:
    """The document of an evaluation, written with its page where there is a folder for them."""
    attempts = {label: model.attempts for label, model in found.items()}
    document = {
        "evaluation": 1,  # version of this layout
        "task": chosen.task,
        "settings": asdict(evaluation.settings),
        "environment": provenance(),
        "game": not any(made.voted for rows in attempts.values() for made in rows),
        "baseline": chosen.baseline,
        **summarise(attempts, evaluation.task, chosen.baseline),
    }
    for label, model in document["models"].items():
        own = {"model": chosen.weights[label], "batch_sizes": found[label].batch_sizes}
        document["models"][label] = own | model
    if evaluation.output is not None:
        write_document(evaluation.output / EVALUATION, document)
        write_text(evaluation.output / PAGE, render_evaluation(document, examples(attempts)))
    return document


def _generator(place: str, settings: Settings) -> Generator:
    if settings.backend == "vllm":
        from entropy_polarity.generation.vllm import VllmGenerator

        return VllmGenerator(resolve_model(place))
    policy, tokenizer = load_policy(place)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return TransformersGenerator(policy.to(device), tokenizer, settings.batch_size)


def _append(path: Path, label: str, seed: int, made: Attempts) -> None:
    """A line for each problem: what was asked, what is right, and every attempt."""
    for number, (problem, row, greedy) in enumerate(zip(made.problems, made.sampled, made.greedy, strict=True)):
        line = {
            "model": label,
            "seed": seed,
            "problem": number,
            "prompt": problem.prompt,
            "facts": problem.metadata,
            "successes": sum(one.right for one in row),
            "samples": [one.to_json() for one in row],
            "greedy": greedy.to_json(),
        }
        append_text(path, json.dumps(line, default=str) + "\n")
