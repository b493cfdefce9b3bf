"""Mathematics: problems of a data set, from the hub or from a file, answers graded by math-verify (tasks/grading.py).

Grading happens in worker processes with limits of time and memory (tasks/workers.py), and nothing of an answer is
evaluated (tasks/safe_evaluation.py). What cannot be parsed, and what does not end in time, has a verdict of its own.
"""

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from entropy_polarity.support.errors import unknown_name
from entropy_polarity.tasks import grading
from entropy_polarity.tasks.checks import check_installed, check_positive
from entropy_polarity.tasks.grading import COMPARE, CORRECT, FIND, GRADE, NOT_PARSED, WRONG
from entropy_polarity.tasks.protocol import OneTurn, Problem, Score, Split, is_held_out
from entropy_polarity.tasks.tables import FILES, is_one_table, read_problems
from entropy_polarity.tasks.tools import known_tools
from entropy_polarity.tasks.workers import DIED, OUT_OF_MEMORY, TIMED_OUT, Workers

MAX_ANSWER_CHARACTERS = 4000  # of a completion, from its end: where an answer stands
SYSTEM = "Reason step by step, and put the final answer within \\boxed{}."
FAILED = "grading failed"


class Preset(NamedTuple):
    """Where a known data set is on the hub, and which of its splits are for what; the columns have usual names."""

    data: str
    subset: str = ""
    split: str = ""  # to train on; empty: it is for evaluation only
    test_split: str = ""  # empty: a tenth of the other
    system: str = SYSTEM


PRESETS = {
    "gsm8k": Preset("openai/gsm8k", "main", split="train", test_split="test"),
    "math-500": Preset("HuggingFaceH4/MATH-500", test_split="test"),
    # Its prompts bring their own instruction.
    "dapo-math-17k": Preset("BytedTsinghua-SIA/DAPO-Math-17k", split="train", system=""),
    "aime-2024": Preset("HuggingFaceH4/aime_2024", test_split="train"),
    "aime-2025": Preset("math-ai/aime25", test_split="test"),
    "amc23": Preset("math-ai/amc23", test_split="test"),
    "minerva": Preset("math-ai/minervamath", test_split="test"),
    "olympiadbench": Preset("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", test_split="train"),
}


@dataclass(frozen=True)
class MathTask(OneTurn):
    """Problems with one final answer.

    preset          a name of PRESETS; whatever else is given wins over it
    data            a hub name, or a path: .jsonl, .json, .parquet, or a folder of `save_to_disk`
    subset          the hub's configuration of it, where it has several
    split           to train on
    test_split      to evaluate on: a split, or another file. Without one, and where `data` is one table that has no
                    splits, a tenth of the problems, chosen by a hash of the problem, is kept for that. What is
                    evaluated on is never trained on, should both tables have it
    prompt_column, answer_column
                    where they are, "a.b" for nested ones; empty looks for the usual names. A prompt may be messages
    system          the system message, and before the problem where a tokenizer has no chat template
    seconds         of computing that grading one answer may take, however busy the machine is
    tools           names of tasks/tools.py: what the policy may call while it is trained; none unless asked for

    Raises ImportError without math-verify, ValueError or OSError for data that is not there or not of that form.
    """

    preset: str = ""
    data: str = ""
    subset: str = ""
    split: str = ""
    test_split: str = ""
    prompt_column: str = ""
    answer_column: str = ""
    system: str | None = None
    max_completion_tokens: int = 1024
    seconds: float = 5.0
    tools: tuple[str, ...] = ()

    reasons = (CORRECT, WRONG, NOT_PARSED, TIMED_OUT, OUT_OF_MEMORY, DIED, FAILED)

    def __post_init__(self) -> None:
        check_installed(self, "math-verify", "math")
        if self.preset and self.preset not in PRESETS:
            raise unknown_name("math preset", self.preset, PRESETS)
        if not (self.preset or self.data):
            raise ValueError(
                "task math needs a preset or data: --task math:gsm8k, or --set task.data=FILE.jsonl "
                f"(presets: {', '.join(PRESETS)})"
            )
        check_positive(self, "seconds", "max_completion_tokens")
        object.__setattr__(self, "tools", known_tools(self.tools))

    @property
    def name(self) -> str:
        return f"math:{self.preset}" if self.preset else "math"

    def problem(self, seed: int, index: int, split: Split = "train") -> Problem:
        """Every pass over the data is a new order, of the seed."""
        problems = _problems(self, split)
        turn, place = divmod(index, len(problems))
        return problems[_order(len(problems), f"math:{seed}:{turn}")[place]]

    def source(self) -> Preset:
        """The preset with what was said beside it; without one, the data that was named."""
        known = PRESETS[self.preset] if self.preset else Preset("", split="train")
        said = {field: value for field in Preset._fields if (value := getattr(self, field))}
        return known._replace(**said | ({} if self.system is None else {"system": self.system}))

    def scores(self, answers: Sequence[tuple[Problem, str]]) -> list[Score]:
        calls = [
            (GRADE, problem.metadata["answers"], completion[-MAX_ANSWER_CHARACTERS:]) for problem, completion in answers
        ]
        outcomes = _workers(self.seconds).map_distinct(calls)
        verdicts = [outcome.value or outcome.failure for outcome in outcomes]
        verdicts = [verdict if verdict in self.reasons else FAILED for verdict in verdicts]
        return [Score(float(verdict == CORRECT), verdict) for verdict in verdicts]

    def final_answers(self, answers: Sequence[tuple[Problem, str]]) -> list[str | None]:
        """The words of the answer that is graded; of those that it takes for equal, the first one's."""
        texts, workers = [completion[-MAX_ANSWER_CHARACTERS:] for _, completion in answers], _workers(self.seconds)
        found = [outcome.value for outcome in workers.map_distinct([(FIND, text) for text in texts])]

        def equal(pairs: list[tuple[str, str]]) -> list[bool]:
            return [outcome.value is True for outcome in workers.map_distinct([(COMPARE, *pair) for pair in pairs])]

        return merged([problem.key for problem, _ in answers], found, texts, equal)


@functools.lru_cache(maxsize=8)
def _problems(task: MathTask, split: Split) -> list[Problem]:
    """The problems to train on or to evaluate on; no problem is among both."""
    source = task.source()
    if split == "train" and not source.split:
        raise ValueError(f"task {task.name} is for evaluation: it has no training problems; name a split to train on")

    own_file = Path(source.test_split).suffix in FILES

    def table(name: str) -> list[Problem]:
        data, name = (name, "") if own_file and name == source.test_split else (source.data, name)
        return read_problems(data, source.subset, name, task.prompt_column, task.answer_column, source.system)

    divided = not source.test_split or (source.split and is_one_table(source.data) and not own_file)
    if divided:
        problems = [problem for problem in table(source.split) if is_held_out(problem.key) == (split == "test")]
    elif split == "test":
        problems = table(source.test_split)
    else:
        held_out = {problem.key for problem in _problems(task, "test")}
        problems = [problem for problem in table(source.split) if problem.key not in held_out]
    if problems:
        return problems
    if divided:
        raise ValueError(
            f"task {task.name} has no {split} problems: of {source.data} a tenth, chosen by a hash of each problem, is "
            "kept to evaluate on, and so few are divided badly. Name a file of problems to evaluate on with "
            "--set task.test_split=FILE (the same file will do for papo eval), or give more problems"
        )
    raise ValueError(
        f"task {task.name}: every problem of {source.data} is also in {source.test_split}, and what is evaluated on is "
        "not trained on: name other problems with --set task.test_split=FILE"
    )


def merged(
    problems: Sequence[str],
    answers: Sequence[str | None],
    completions: Sequence[str],
    equal: Callable[[list[tuple[str, str]]], list[bool]],
) -> list[str | None]:
    """The `answers` with each one that is equal to an earlier one of the same problem in that one's words.

    `equal` judges pairs of completions, of which only those with different answers are asked about. Equality need not
    be transitive: an answer joins the first of those that joined none.

    >>> same = lambda pairs: [float(a) == float(b) for a, b in pairs]
    >>> merged(["p"] * 4, ["1", None, "1.0", "2"], ["1", "?", "1.0", "2"], same)
    ['1', None, '1', '2']
    """
    distinct: dict[str, dict[str, str]] = {}
    for problem, answer, completion in zip(problems, answers, completions, strict=True):
        if answer is not None:
            distinct.setdefault(problem, {}).setdefault(answer, completion)
    asked = [(problem, a, b) for problem, known in distinct.items() for a, b in combinations(known, 2)]
    verdicts = equal([(distinct[problem][a], distinct[problem][b]) for problem, a, b in asked])
    same = {question for question, verdict in zip(asked, verdicts, strict=True) if verdict}
    names: dict[tuple[str, str], str] = {}
    for problem, known in distinct.items():
        for answer in known:
            first = (earlier for earlier in known if names.get((problem, earlier)) == earlier)
            names[problem, answer] = next((name for name in first if (problem, name, answer) in same), answer)
    return [None if a is None else names[problem, a] for problem, a in zip(problems, answers, strict=True)]


@functools.lru_cache(maxsize=8)
def _order(count: int, seed: str) -> list[int]:
    return random.Random(seed).sample(range(count), count)


@functools.cache
def _workers(seconds: float) -> Workers:
    return Workers(
        f"{grading.__name__}:work", seconds=seconds, clock="processor", preload="math_verify", reads_only=True
    )
