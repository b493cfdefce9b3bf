"""Mathematics: problems of a data set, from the hub or from a file, answers graded by math-verify.

    papo eval --model MODEL --task math:gsm8k
    papo eval --model MODEL --task math --set task.data=problems.jsonl --set task.prompt_column=question

Grading happens in worker processes with limits of time and memory (tasks/workers.py), and nothing of an answer is
evaluated (tasks/careful.py). What cannot be parsed, and what does not end in time, has a verdict of its own.
"""

import functools
import hashlib
import importlib.util
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from entropy_polarity._errors import unknown_name
from entropy_polarity.tasks import Messages, Problem, Score, Split
from entropy_polarity.tasks.tools import known_tools
from entropy_polarity.tasks.voting import merged
from entropy_polarity.tasks.workers import DIED, OUT_OF_MEMORY, TIMED_OUT, Workers

TEST_SHARE = 0.1
MAX_ANSWER_CHARACTERS = 4000  # of a completion, from its end: where an answer stands
SYSTEM = "Reason step by step, and put the final answer within \\boxed{}."
PROMPT_COLUMNS = ("problem", "question", "prompt")
ANSWER_COLUMNS = ("answer", "final_answer", "reward_model.ground_truth", "solution")
GRADE, FIND, COMPARE = "grade", "find", "compare"  # what workers do
CORRECT, WRONG, NOT_PARSED, FAILED = "correct", "wrong", "not parsed", "grading failed"
_FILES = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


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
class MathTask:
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
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError(f"task {self.name} needs math-verify: pip install 'entropy-polarity[math]'")
        if self.preset and self.preset not in PRESETS:
            raise unknown_name("math preset", self.preset, PRESETS)
        if not (self.preset or self.data):
            raise ValueError(
                "task math needs a preset or data: --task math:gsm8k, or --set task.data=FILE.jsonl "
                f"(presets: {', '.join(PRESETS)})"
            )
        if not (self.seconds > 0 and self.max_completion_tokens > 0):
            raise ValueError(
                f"task {self.name}: seconds={self.seconds}, max_completion_tokens={self.max_completion_tokens}; "
                "expected positive numbers"
            )
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
            (GRADE, problem.facts["answers"], completion[-MAX_ANSWER_CHARACTERS:]) for problem, completion in answers
        ]
        outcomes = _workers(self.seconds).map_distinct(calls)
        verdicts = [outcome.value or outcome.failure for outcome in outcomes]
        verdicts = [verdict if verdict in self.reasons else FAILED for verdict in verdicts]
        return [Score(float(verdict == CORRECT), verdict) for verdict in verdicts]

    def final_answers(self, answers: Sequence[tuple[Problem, str]]) -> list[str | None]:
        """The words in which math-verify finds the answer; of those that it takes for equal, the first one's."""
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

    own_file = Path(source.test_split).suffix in _FILES

    def table(name: str) -> list[Problem]:
        data, name = (name, "") if own_file and name == source.test_split else (source.data, name)
        return _read(data, source.subset, name, task.prompt_column, task.answer_column, source.system)

    divided = source.split and _is_one_table(source.data) and not own_file
    if divided or not source.test_split:
        problems = [problem for problem in table(source.split) if _is_test(problem.key) == (split == "test")]
    elif split == "test":
        problems = table(source.test_split)
    else:
        held_out = {problem.key for problem in _problems(task, "test")}
        problems = [problem for problem in table(source.split) if problem.key not in held_out]
    if not problems:
        raise ValueError(f"task {task.name} has no {split} problems in {source.data} {source.test_split}".rstrip())
    return problems


def _is_one_table(data: str) -> bool:
    """A file, or a folder with one table: the names of splits say nothing there."""
    path = Path(data).expanduser()
    return path.is_file() or (path.is_dir() and not (path / "dataset_dict.json").is_file())


@functools.lru_cache(maxsize=8)
def _order(count: int, seed: str) -> list[int]:
    return random.Random(seed).sample(range(count), count)


def _is_test(key: str) -> bool:
    return hashlib.sha256(key.encode()).digest()[0] < 256 * TEST_SHARE


@functools.lru_cache(maxsize=4)
def _read(data: str, subset: str, split: str, prompt: str, answer: str, system: str) -> list[Problem]:
    """The different problems of a table, in its order. Of one that is there twice, the first answer counts."""
    table = load_table(data, subset, split)
    prompt_column = prompt or _usual(table, PROMPT_COLUMNS, "prompt_column", data)
    answer_column = answer or _usual(table, ANSWER_COLUMNS, "answer_column", data)
    problems: dict[str, Problem] = {}
    for number, row in enumerate(_rows(table, data)):
        try:
            messages = _messages(_cell(row, prompt_column, data))
            answers = golds(_cell(row, answer_column, data))
        except TypeError as error:
            raise ValueError(f"row {number} of {data}: {error}") from None
        if not any(message["content"].strip() for message in messages) or not answers:
            raise ValueError(f"row {number} of {data} has no problem or no answer in {prompt_column}, {answer_column}")
        if system:
            messages = [{"role": "system", "content": system}, *messages]
        text = "\n\n".join(message["content"] for message in messages)
        problems.setdefault(text, Problem(text, {"answers": answers}, text, messages))
    return list(problems.values())


def _rows(table: Any, data: str) -> Iterator[dict[str, Any]]:
    try:
        yield from table
    except UnicodeDecodeError as error:  # text is decoded when it is looked at
        raise ValueError(f"cannot read {data}: {error}") from None


def _messages(asked: Any) -> Messages:
    """Raises TypeError for what is no text and no messages."""
    asked = "" if asked is None else asked
    messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    fits = isinstance(messages, list) and all(isinstance(m, dict) and m.keys() >= {"role", "content"} for m in messages)
    if not (fits and all(isinstance(message["content"], str) for message in messages)):
        raise TypeError(f"a problem is text, or messages with role and content; it is {str(asked)[:60]!r}")
    return [dict(message) for message in messages]


def golds(answer: Any) -> list[str]:
    """The accepted answers in a cell: a list is taken as it is; of a solution, what stands after #### or in its last
    \\boxed{}. None and NaN are no answer; raises TypeError for a table of values.

    >>> golds("6 * 12 = 72 #### 72"), golds("so it is \\\\boxed{1{,}000}"), golds(["1", "2"])
    (['72'], ['1{,}000'], ['1', '2'])
    """
    if isinstance(answer, list | tuple):
        return [text for part in answer for text in golds(part)]
    if isinstance(answer, dict):
        raise TypeError(f"an answer is text, a number or a list of them; it is {str(answer)[:60]!r}")
    text = "" if answer is None or answer != answer else str(answer).strip()  # NaN is not itself
    if "####" in text:
        text = text.rsplit("####", 1)[1].strip().replace(",", "")
    elif "\\boxed{" in text:
        text = _braced(text.rsplit("\\boxed{", 1)[1])
    return [text] if text else []


def _braced(text: str) -> str:
    """What stands before the brace that closes one opened before the text."""
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:place]
    return text


def load_table(data: str, subset: str = "", split: str = "") -> Any:
    """A table of rows: from a file or folder where `data` is a path, else from the hub or its cache on this machine.

    Raises ValueError or OSError with a line that says what to do.
    """
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong is in our line
    path = Path(data).expanduser()
    if not path.exists() and (path.suffix in _FILES or data.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"nothing at {data}: expected .jsonl, .json, .parquet, or a folder of save_to_disk")
    try:
        if path.is_file():
            kind = _FILES.get(path.suffix, "json")
            loaded = datasets.load_dataset(kind, data_files=str(path), split="train")
        elif path.is_dir():
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(data, subset or None, split=split or None)
    # A reader of files may raise whatever it likes, StopIteration of an empty one included.
    except Exception as error:
        if path.exists():
            raise ValueError(f"cannot read {data}: {_reason(error)}") from error
        raise ConnectionError(
            f"cannot load {data} from the hub ({_reason(error)}): with a network set HF_HUB_OFFLINE=0; without "
            "one, give a local copy with --set task.data=PATH (.jsonl, .json, .parquet, or a folder of save_to_disk)"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise ValueError(f"{data} has no split {split!r}; it has {', '.join(map(str, loaded))}")
        return loaded[split]
    return loaded


def _reason(error: BaseException) -> str:
    """In a line: what a library wraps in its own error says more than that does."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    said = (str(error).splitlines() or [""])[0].rstrip(".")
    return said or ("there is nothing in it" if isinstance(error, StopIteration) else type(error).__name__)


def _usual(table: Any, names: tuple[str, ...], setting: str, data: str) -> str:
    columns = table.column_names
    for name in names:
        if name.split(".")[0] in columns:
            return name
    raise ValueError(f"{data} has the columns {', '.join(columns)}: say which with --set task.{setting}=NAME")


def _cell(row: dict[str, Any], column: str, data: str) -> Any:
    found: Any = row
    for part in column.split("."):
        if not isinstance(found, dict) or part not in found:
            raise ValueError(f"{data} has no column {column!r}; it has {', '.join(row)}")
        found = found[part]
    return found


@functools.cache
def _workers(seconds: float) -> Workers:
    return Workers(f"{__name__}:work", seconds=seconds, clock="processor", preload="math_verify")


# What follows runs in workers.


def work(what: str, *arguments: Any) -> Any:
    """One pool of processes for all that math-verify is asked."""
    return {GRADE: grade, FIND: find, COMPARE: compare}[what](*arguments)


def grade(answers: list[str], completion: str) -> str:
    """The verdict on a completion, by math-verify: it may be any of the accepted answers."""
    parse, verify = _math_verify()
    found = parse(completion)
    if not found:
        return NOT_PARSED
    return CORRECT if any(verify(parse(_as_latex(gold)), found) for gold in answers) else WRONG


def find(completion: str) -> str | None:
    """The answer in a completion, in its own words; None where math-verify finds none."""
    parse, _ = _math_verify()
    found = parse(completion)
    return str(found[-1]) if found else None


def compare(completion: str, other: str) -> bool:
    """Whether the answers of two completions are equal."""
    parse, verify = _math_verify()
    return bool(verify(parse(completion), parse(other)))


def _as_latex(gold: str) -> str:
    return gold if "$" in gold or "\\boxed" in gold else f"\\boxed{{{gold}}}"


@functools.cache
def _math_verify() -> tuple[Any, Any]:
    """Its two functions, without its own time limits, which the worker has, and without Python's eval."""
    import math_verify

    from entropy_polarity.tasks.careful import shield

    for package in ("sympy", "latex2sympy2_extended", "math_verify"):
        shield(package)
    # A box, where there is one, before any other expression.
    targets = [math_verify.LatexExtractionConfig(boxed_match_priority=0), math_verify.ExprExtractionConfig()]
    parse = functools.partial(math_verify.parse, extraction_config=targets, parsing_timeout=0)
    return parse, functools.partial(math_verify.verify, timeout_seconds=0)
