"""Problems from tables of other people: a data set of the hub, a file or a folder."""

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from entropy_polarity.support.hub import why_not_asked
from entropy_polarity.support.text import valid_parts
from entropy_polarity.tasks.answers import boxed
from entropy_polarity.tasks.protocol import Messages, Problem

PROMPT_COLUMNS = ("problem", "question", "prompt")
ANSWER_COLUMNS = ("answer", "final_answer", "reward_model.ground_truth", "solution")
FILES = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def is_one_table(data: str) -> bool:
    """Whether it is a file, or a folder with one table, where the names of splits say nothing."""
    path = Path(os.path.expanduser(data))
    return path.is_file() or (path.is_dir() and not (path / "dataset_dict.json").is_file())


@functools.lru_cache(maxsize=4)
def read_problems(data: str, subset: str, split: str, prompt: str, answer: str, system: str) -> list[Problem]:
    """The different problems of a table, in its order, with their accepted answers in the metadata "answers".

    Columns that are not named are looked for under their usual names. Of a problem that is there twice, the first
    answer counts. Raises ValueError or OSError, in a line, for a table or a row that does not fit.
    """
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
    """A problem as messages. Raises TypeError for what is neither text nor messages."""
    asked = "" if asked is None else asked
    messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    fits = isinstance(messages, list) and all(isinstance(m, dict) and m.keys() >= {"role", "content"} for m in messages)
    if not (fits and all(isinstance(message["content"], str) for message in messages)):
        raise TypeError(f"a problem is text, or messages with role and content; it is {str(asked)[:60]!r}")
    return [dict(message) for message in messages]


def golds(answer: Any) -> list[str]:
    """The accepted answers in a cell: a list is taken as it is; of a solution, what stands after #### or in its last
    \\boxed{}; one that is not closed is no answer, nor are None and NaN. Raises TypeError for a table of values.

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
    elif (held := boxed(text)) is not None:
        text = held
    return [text] if text else []


def load_table(data: str, subset: str = "", split: str = "") -> Any:
    """A table of rows: from a file or folder where `data` is a path, else from the hub or its cache on this machine.

    Raises ValueError or OSError with a line that says what to do.
    """
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong is in our line
    path, silent = Path(os.path.expanduser(data)), None
    if not path.exists() and (path.suffix in FILES or data.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"nothing at {data}: expected .jsonl, .json, .parquet, or a folder of save_to_disk")
    try:
        if path.is_file():
            kind = FILES.get(path.suffix, "json")
            loaded = datasets.load_dataset(kind, data_files=str(path), split="train")
        elif path.is_dir():
            loaded = datasets.load_from_disk(str(path))
        else:
            silent = why_not_asked()
            loaded = datasets.load_dataset(data, subset or None, split=split or None)
    # A reader of files may raise whatever it likes, StopIteration of an empty one included.
    except Exception as error:
        if path.exists():
            raise ValueError(f"cannot read {data}: {_reason(error)}") from error
        raise ConnectionError(
            f"cannot load {data} from the hub ({silent or _reason(error)}): give a local copy with "
            "--set task.data=PATH (.jsonl, .json, .parquet, or a folder of save_to_disk)"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise ValueError(f"{data} has no split {split!r}; it has {', '.join(map(str, loaded))}")
        return loaded[split]
    return loaded


def _reason(error: BaseException) -> str:
    """Why, in one line: the error that a library wraps in its own says more than that does."""
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
    return valid_parts(found)
