"""Tasks: where problems come from and how an answer is judged.

A task is a pure function of (seed, index): the same index always gives the same problem, on every machine.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from entropy_polarity._errors import check_settings, unknown_name

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Problem:
    """One problem: the text the policy continues, the facts that the verifier needs, and what makes it different.

    Two problems with one `key` are the same problem in other words.
    """

    prompt: str
    facts: dict[str, Any]
    key: str


class Score(NamedTuple):
    """A verdict: the reward, and in one or two words why. Reasons are counted and shown, never swallowed."""

    reward: float
    reason: str


@runtime_checkable
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
    """The first `count` different problems of a stream: repeats would make intervals look surer than they are.

    Raises ValueError where the task seems to have fewer: the last thousand draws brought nothing new.
    """
    found: dict[str, Problem] = {}
    index = last_new = 0
    while len(found) < count:
        problem = task.problem(seed, index, split)
        if problem.key not in found:
            found[problem.key], last_new = problem, index
        elif index - last_new > 1000:
            raise ValueError(
                f"task {task.name!r} has about {len(found)} different {split} problems, {count} were asked for: "
                "ask for fewer"
            )
        index += 1
    return list(found.values())


def make_task(name: str, **settings: Any) -> Task:
    """The task called `name`, with its settings. Raises ValueError for an unknown name or a wrong setting."""
    from entropy_polarity.tasks.countdown import Countdown

    tasks = {"countdown": Countdown}
    if name not in tasks:
        raise unknown_name("task", name, tasks)
    check_settings(f"task {name!r}", tasks[name], settings)
    return tasks[name](**settings)
