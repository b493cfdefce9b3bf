"""What every task is: where problems come from, and how what a policy says to them is judged.

There are two kinds. In one turn a completion is the whole answer, and a verifier judges it (`VerifiedTask`); in several
an environment answers each action of the policy and gives the reward (`Game`). Callers ask for a `Task`, and write what
differs between the kinds once for each: `Task.by_kind` takes the one that fits.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, NoReturn, Protocol, TypeVar, runtime_checkable

Split = Literal["train", "test"]
TEST_SHARE = 0.1
Messages = list[dict[str, str]]
Made = TypeVar("Made")
STARTS = 3  # episodes that are tried before a run, until one can be started


@dataclass(frozen=True)
class Problem:
    """One problem: the text that the policy continues, the metadata that judging it needs, and what identifies it.

    Two problems with one `key` are the same problem in other words. Where there are `messages`, of roles "system",
    "user" and "assistant", a tokenizer with a chat template is given those in place of the text.
    """

    prompt: str
    metadata: dict[str, Any]
    key: str
    messages: Messages | None = None


def is_held_out(key: str) -> bool:
    """Whether the problem `key` is of the test split, a tenth of all: the same one on every machine, however drawn."""
    return hashlib.sha256(key.encode()).digest()[0] < 256 * TEST_SHARE


class Score(NamedTuple):
    """A verdict: the reward, and in one or two words why. Reasons are counted and shown, never swallowed.

    A reward of 1 or more is a success, between 0 and 1 it is a part of one (`support.success.degree`).
    """

    reward: float
    reason: str


class StepResult(NamedTuple):
    """What an environment says to an action. `reason` is why the episode is over, and empty before that."""

    observation: str
    reward: float = 0.0
    done: bool = False
    reason: str = ""


class EpisodeOverError(Exception):
    """Ends the episode of the environment that raises it, for a reason other than that it raised."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@runtime_checkable
class TextEnv(Protocol):
    """The environment of one episode. It is used once: `reset`, then `step` until the episode is done."""

    def reset(self, seed: int) -> str:
        """Start the episode of that seed; returns what the policy reads first."""
        ...

    def step(self, action: str) -> StepResult: ...

    def counts(self) -> dict[str, float]:
        """Numbers of the episode so far, to be averaged over episodes."""
        ...


@runtime_checkable
class Task(Protocol):
    """What a trainer and an evaluation need of a task. It is a pure function of (seed, index)."""

    @property
    def name(self) -> str: ...

    @property
    def max_completion_tokens(self) -> int | None:
        """Of a completion; None where it holds words of an environment too, whose length is the environment's."""
        ...

    @property
    def reasons(self) -> tuple[str, ...]:
        """Every verdict that can be given, or every way in which an episode can end."""
        ...

    def problem(self, seed: int, index: int, split: Split) -> Problem:
        """Problem `index` of the stream `seed`, the same on every machine; the two splits share no problem."""
        ...

    def check_starts(self, problems: Sequence[Problem]) -> None:
        """Raise ValueError where none of the first few problems can be posed: no single problem is to blame."""
        ...

    def by_kind(self, verified: "Callable[[VerifiedTask], Made]", played: "Callable[[Game], Made]") -> Made:
        """`verified(self)` of a task of one turn, `played(self)` of a game."""
        ...


@runtime_checkable
class VerifiedTask(Task, Protocol):
    """A task of one turn: a completion is the whole answer, which the task judges. Its class is a `OneTurn`."""

    @property
    def max_completion_tokens(self) -> int: ...

    def scores(self, answers: Sequence[tuple[Problem, str]]) -> list[Score]:
        """Judge a completion of each problem, in bounded time and memory, whatever text it is."""
        ...

    def final_answers(self, answers: Sequence[tuple[Problem, str]]) -> list[str | None]:
        """What a majority is counted over: the final answer of each completion, in one form for all that are equal.

        None where there is none. As bounded as `scores`, and as blind to what is right.
        """
        ...


@runtime_checkable
class Game(Task, Protocol):
    """A task of several turns: an episode is played, and its environment gives the reward. Its class is an `Episodic`.

    `metadata["seed"]` of its problems is what an environment starts from.
    """

    @property
    def max_turns(self) -> int: ...

    @property
    def max_action_tokens(self) -> int:
        """Of what the policy says in one turn."""
        ...

    def env(self) -> TextEnv: ...

    def envs(self, count: int) -> list[list[TextEnv]]:
        """`count` environments in groups, in order: those of different groups may be asked at the same time."""
        ...


class OneTurn:
    """What all tasks of one turn have: the base of their classes."""

    def check_starts(self, problems: Sequence[Problem]) -> None:
        """A prompt can always be posed."""

    def by_kind(self: VerifiedTask, verified: Callable[[VerifiedTask], Made], played: Callable[[Game], Made]) -> Made:
        return verified(self)


class Episodic:
    """What all games have: the base of their classes. Their environments live in this process unless they say more."""

    max_completion_tokens = None

    def check_starts(self: Game, problems: Sequence[Problem]) -> None:
        why = None
        for problem in problems[:STARTS]:
            try:
                self.env().reset(problem.metadata["seed"])
                return
            except Exception as error:
                why = error
        raise ValueError(f"task {self.name}: no episode can be started ({why})")

    def envs(self: Game, count: int) -> list[list[TextEnv]]:
        return [[self.env() for _ in range(count)]]

    def by_kind(self: Game, verified: Callable[[VerifiedTask], Made], played: Callable[[Game], Made]) -> Made:
        return played(self)


def expect_one_turn(task: Task, why: str) -> VerifiedTask:
    """The same task, of one turn. Raises ValueError, with the reason `why` only that will do, where it is a game."""

    def refuse(game: Game) -> NoReturn:
        raise ValueError(f"{why}; {game.name} is a game: give another --task")

    return task.by_kind(verified=lambda task: task, played=refuse)
