"""Tasks: problems for a policy, and how its answers are judged (protocol.py); here they are made by name."""

from typing import Any

from entropy_polarity.support.errors import check_settings, unknown_name
from entropy_polarity.tasks.protocol import Messages, Problem, Score, Split, Task

__all__ = ["Messages", "Problem", "Score", "Split", "Task", "check_task", "distinct_problems", "make_task"]


def distinct_problems(task: Task, seed: int, split: Split, count: int, or_all: bool = False) -> list[Problem]:
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


def make_task(name: str, **settings: Any) -> Task:
    """The task called `name`, with its settings.

    Names: "countdown", "math", "math:PRESET", "gym:DATASET", a game, "env" for an environment of one's own,
    "textarena:GAME", "textworld:CHALLENGE".

    Raises ValueError for an unknown name or a wrong setting, ImportError where a task needs a package that is missing.
    """
    build, settings = check_task(name, **settings)
    return build(**settings)


def check_task(name: str, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """Who builds the task called `name`, and from which settings. Raises ValueError as `make_task`, for the name and
    for names and types of settings alone."""
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
        raise unknown_name("task", name, [*tasks, *(f"{kind}:{what.upper()}" for kind, what in members.items())])
    if member:
        settings = {members[family]: member} | settings
    check_settings(f"task {name!r}", tasks[family], settings)
    return tasks[family], settings
