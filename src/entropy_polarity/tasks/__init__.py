"""Tasks: where problems come from and how an answer is judged.

A task is a pure function of (seed, index): the same index always gives the same problem, on every machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

from entropy_polarity.support.errors import check_settings, unknown_name

if TYPE_CHECKING:
    from entropy_polarity.tasks.games import Game

Split = Literal["train", "test"]
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Problem:
    """One problem: the text the policy continues, the facts that the verifier needs, and what makes it different.

    Two problems with one `key` are the same problem in other words. Where there are `messages`, of roles "system",
    "user" and "assistant", a tokenizer with a chat template is given those in place of the text.
    """

    prompt: str
    facts: dict[str, Any]
    key: str
    messages: Messages | None = None


class Score(NamedTuple):
    """A verdict: the reward, and in one or two words why. Reasons are counted and shown, never swallowed.

    A reward of 1 or more is a success, between 0 and 1 it is a part of one: `_success.degree` says so for all.
    """

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
        """Every verdict that can be given."""
        ...

    def problem(self, seed: int, index: int, split: Split) -> Problem:
        """Problem `index` of the stream `seed`; the two splits share no problem."""
        ...

    def scores(self, answers: Sequence[tuple[Problem, str]]) -> list[Score]:
        """Judge a completion of each problem, in bounded time and memory, whatever text it is."""
        ...

    def final_answers(self, answers: Sequence[tuple[Problem, str]]) -> list[str | None]:
        """What a majority is counted over: the final answer of each completion, in one form for all that are equal.

        None where there is none. As bounded as `scores`, and as blind to what is right.
        """
        ...


def distinct_problems(task: "Task | Game", seed: int, split: Split, count: int, or_all: bool = False) -> list[Problem]:
    """The first `count` different problems of a stream: repeats would make intervals look surer than they are.

    Where the task seems to have fewer, the last thousand draws brought nothing new: with `or_all` those it has, else
    ValueError.
    """
    found: dict[str, Problem] = {}
    index = last_new = 0
    while len(found) < count:
        problem = task.problem(seed, index, split)
        if problem.key not in found:
            found[problem.key], last_new = problem, index
        elif index - last_new > 1000:
            if or_all:
                break
            raise ValueError(
                f"task {task.name!r} has about {len(found)} different {split} problems, {count} were asked for: "
                "ask for fewer"
            )
        index += 1
    return list(found.values())


def make_task(name: str, **settings: Any) -> "Task | Game":
    """The task called `name`, with its settings.

    Names: "countdown", "math", "math:PRESET", "gym:DATASET", a game, "env" for an environment of one's own,
    "textarena:GAME", "textworld:CHALLENGE".

    Raises ValueError for an unknown name or a wrong setting, ImportError where a task needs a package that is missing.
    """
    build, settings = check_task(name, **settings)
    return build(**settings)


def check_task(name: str, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """Who builds the task called `name`, and from which settings. Raises ValueError as `make_task`, for the name and
    for names and types of settings, without making anything."""
    from entropy_polarity.tasks.countdown import Countdown
    from entropy_polarity.tasks.environments import Environment
    from entropy_polarity.tasks.games import GAMES
    from entropy_polarity.tasks.gym import GymTask
    from entropy_polarity.tasks.math import MathTask
    from entropy_polarity.tasks.textarena import TextArena
    from entropy_polarity.tasks.textworld import TextWorld

    tasks: dict[str, Any] = {"countdown": Countdown, "gym": GymTask, "math": MathTask, **GAMES}
    tasks |= {"env": Environment, "textarena": TextArena, "textworld": TextWorld}
    members = {"gym": "dataset", "math": "preset", "textarena": "game", "textworld": "challenge"}
    family, _, member = str(name).partition(":")
    if family not in tasks or (member and family not in members):
        raise unknown_name(
            "task", name, [*tasks, *(f"{family}:{member.upper()}" for family, member in members.items())]
        )
    if member:
        settings = {members[family]: member} | settings
    check_settings(f"task {name!r}", tasks[family], settings)
    return tasks[family], settings
