"""Procedural reasoning: every data set of reasoning-gym, by name and configuration, with its own scorer.

Item = f(seed, index). A tenth of all questions, chosen by a hash of the question, is the test split. Items are made and
answers judged in worker processes: a few data sets depend on the order of sets, which there is always the same, and
some scorers evaluate the answer, which there is interpreted instead (tasks/safe_evaluation.py).
"""

import copy
import functools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from entropy_polarity.support.errors import unknown_name
from entropy_polarity.support.success import degree
from entropy_polarity.support.text import valid_parts
from entropy_polarity.tasks.answers import tagged
from entropy_polarity.tasks.checks import check_installed, check_positive
from entropy_polarity.tasks.protocol import OneTurn, Problem, Score, Split, is_held_out
from entropy_polarity.tasks.workers import DIED, OUT_OF_MEMORY, TIMED_OUT, Outcome, Workers

SIZE = 20_000  # items of a data set, of which a stream draws
DRAWS = 200  # until one is of the split that was asked for
MAKE_SECONDS = 60.0
SYSTEM = "Think about the problem step by step, then give the final answer, alone, between <answer> and </answer>."
MAX_ANSWER_CHARACTERS = 20_000


@dataclass(frozen=True)
class GymTask(OneTurn):
    """A reasoning-gym data set: `dataset` by its name there, `config` as its own configuration names the settings.

    `composite` mixes several: config = {"datasets": [{"name": ..., "weight": ..., "config": {...}}, ...]}. What is
    judged is the text in the last <answer> tags, or where there are none, all of it; tags that are not closed hold no
    answer. The reward is the scorer's, from 0 to 1; judging one answer may compute for `seconds`. Raises ImportError
    without reasoning-gym, ValueError for a name or a configuration that it does not take.
    """

    dataset: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    system: str = SYSTEM
    max_completion_tokens: int = 1024
    seconds: float = 5.0

    reasons = ("correct", "partly", "wrong", "no answer", "too long", TIMED_OUT, OUT_OF_MEMORY, DIED, "scorer failed")

    def __post_init__(self) -> None:
        check_installed(self, "reasoning-gym", "gym")
        if not self.dataset:
            raise ValueError("task gym: say which data set, as in gym:chain_sum (or gym:composite, for several)")
        check_positive(self, "seconds", "max_completion_tokens")
        problem = self._made("checked", self._spec)
        if isinstance(problem, list):
            raise unknown_name("reasoning-gym data set", self.dataset, problem)
        if problem:
            raise ValueError(f"task {self.name}: {problem}")

    @property
    def name(self) -> str:
        return f"gym:{self.dataset}"

    @property
    def _spec(self) -> str:
        return json.dumps({"dataset": self.dataset, "config": self.config}, sort_keys=True)

    def problem(self, seed: int, index: int, split: Split = "train") -> Problem:
        made = self._made("item", self._spec, seed, index, split)
        if made is None:
            raise ValueError(
                f"task {self.name} has no {split} problem among {DRAWS} draws: allow more variety in its config"
            )
        made = valid_parts(made)
        question = made["question"]
        messages = [{"role": "system", "content": self.system}] if self.system else []
        metadata = {"seed": seed, "position": made["position"], "answer": made["answer"]}
        return Problem(question, metadata, question, [*messages, {"role": "user", "content": question}])

    def _made(self, function: str, *arguments: Any) -> Any:
        (made,) = _workers(function, MAKE_SECONDS).map([arguments])
        if made.failure:
            raise ValueError(f"task {self.name}: making a problem of it failed ({made.failure})")
        return made.value

    def scores(self, answers: Sequence[tuple[Problem, str]]) -> list[Score]:
        found: list[Score | None] = []
        calls = []
        for problem, completion in answers:
            answer = extracted(completion)
            if not answer:
                found.append(Score(0.0, "no answer"))
            elif len(answer) > MAX_ANSWER_CHARACTERS:
                found.append(Score(0.0, "too long"))
            else:
                found.append(None)
                calls.append((self._spec, problem.metadata["seed"], problem.metadata["position"], answer))
        judged = iter(_workers("judged", self.seconds).map_distinct(calls))
        return [_score(next(judged)) if score is None else score for score in found]

    def final_answers(self, answers: Sequence[tuple[Problem, str]]) -> list[str | None]:
        """The text that is judged, as it stands: only the data set knows which others would do."""
        found = [extracted(completion) for _, completion in answers]
        return [answer if 0 < len(answer) <= MAX_ANSWER_CHARACTERS else None for answer in found]


def extracted(completion: str) -> str:
    """The text in the last <answer> tags; all of it where there are none, nothing where the last are not closed."""
    answer = tagged(completion)
    return completion.strip() if answer is None else answer


def _score(outcome: Outcome) -> Score:
    if outcome.failure:
        return Score(0.0, outcome.failure if outcome.failure in GymTask.reasons else "scorer failed")
    found = degree(outcome.value)
    return Score(outcome.value, "correct" if found == "right" else found)


@functools.cache
def _workers(function: str, seconds: float) -> Workers:
    judging = function == "judged"
    return Workers(
        f"{__name__}:{function}",
        seconds=seconds,
        count=None if judging else 1,
        clock="processor",
        preload="reasoning_gym",
        reads_only=judging,
    )


# What follows runs in workers.


def checked(spec: str) -> str | list[str]:
    """What is wrong with that configuration, in a line; the known names where the name is not one of them."""
    from reasoning_gym.factory import DATASETS

    name = json.loads(spec)["dataset"]
    if name not in DATASETS:
        return sorted(DATASETS)
    try:
        _dataset(spec, 0)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def item(spec: str, seed: int, index: int, split: Split) -> dict[str, Any] | None:
    """Problem `index` of a stream: the first of its draws that belongs to the split."""
    rng = random.Random(f"gym:{split}:{seed}:{index}")
    for _ in range(DRAWS):
        position = rng.randrange(SIZE)
        entry = _entry(spec, seed, position)
        if is_held_out(entry["question"]) == (split == "test"):
            answer = entry["answer"]
            text = answer if isinstance(answer, str) else json.dumps(answer, default=str)
            return {"question": entry["question"], "answer": text, "position": position}
    return None


def judged(spec: str, seed: int, position: int, answer: str) -> float:
    """The data set's own verdict on an answer."""
    entry = copy.deepcopy(_entry(spec, seed, position))  # what a scorer does to it stays with this answer
    return float(_dataset(spec, seed).score_answer(answer=answer, entry=entry))


@functools.lru_cache(maxsize=1024)  # the answers of a group follow one another
def _entry(spec: str, seed: int, position: int) -> dict[str, Any]:
    return _dataset(spec, seed)[position]


@functools.lru_cache(maxsize=8)
def _dataset(spec: str, seed: int) -> Any:
    import reasoning_gym
    import sympy.parsing.sympy_parser  # noqa: F401 (so that it is there to be shielded)

    from entropy_polarity.tasks.safe_evaluation import shield

    shield("reasoning_gym")
    shield("sympy.parsing")
    wanted = json.loads(spec)
    config = wanted["config"]
    if wanted["dataset"] == "composite":
        from reasoning_gym.composite import DatasetSpec

        config = config | {"datasets": [DatasetSpec(**{"weight": 1, "config": {}, **d}) for d in config["datasets"]]}
    return reasoning_gym.create_dataset(wanted["dataset"], **{"size": SIZE, "seed": seed, **config})
