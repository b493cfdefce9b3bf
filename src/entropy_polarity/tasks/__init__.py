"""Tasks: where problems come from and how an answer is judged.

A task is a pure function of (seed, index): the same index always gives the same problem, on every machine.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, Protocol

from entropy_polarity._errors import unknown_name

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Problem:
    """One problem: the text the policy continues, and the facts that the verifier needs."""

    prompt: str
    facts: dict[str, Any]


class Score(NamedTuple):
    """A verdict: the reward, and in one or two words why. Reasons are counted and shown, never swallowed."""

    reward: float
    reason: str


class Task(Protocol):
    """What a trainer and an evaluation need of a task."""

    @property
    def name(self) -> str: ...

    @property
    def max_completion_tokens(self) -> int: ...

    @property
    def reasons(self) -> tuple[str, ...]:
        """Every verdict that `score` can give."""
        ...

    def problem(self, seed: int, index: int, split: Split) -> Problem:
        """Problem `index` of the stream `seed`; the two splits share no problem."""
        ...

    def score(self, problem: Problem, completion: str) -> Score:
        """Judge a completion, in bounded time and memory, whatever text it is."""
        ...


def distinct_problems(task: Task, seed: int, split: Split, count: int) -> list[Problem]:
    """The first `count` problems of a stream, repeats left out (for evaluation, where repeats bias intervals)."""
    return list(_distinct(task, seed, split, count))


def _distinct(task: Task, seed: int, split: Split, count: int) -> Iterator[Problem]:
    seen: set[str] = set()
    repeats = 0
    for index in range(1_000 * count + 10_000):
        if len(seen) == count:
            return
        problem = task.problem(seed, index, split)
        # A small task runs out of new problems: say so instead of searching for ever.
        repeats = repeats + 1 if problem.prompt in seen else 0
        if repeats > 10_000:
            break
        if problem.prompt not in seen:
            seen.add(problem.prompt)
            yield problem
    if len(seen) < count:
        raise ValueError(
            f"task {task.name!r} has only {len(seen)} different {split} problems in stream {seed}, "
            f"{count} were asked for: ask for fewer"
        )


def make_task(name: str, **settings: Any) -> Task:
    """The task called `name`, with its settings. Raises ValueError for an unknown name or setting."""
    from entropy_polarity.tasks.countdown import Countdown

    tasks = {"countdown": Countdown}
    if name not in tasks:
        raise unknown_name("task", name, tasks)
    known = [f.name for f in fields(tasks[name])]
    for setting in settings:
        if setting not in known:
            raise unknown_name(f"setting of task {name!r}", setting, known)
    return tasks[name](**settings)
