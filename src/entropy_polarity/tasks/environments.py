"""Environments that other people wrote, played in processes that can be killed.

An environment is any class that is a `TextEnv`; the user names it, as "module:Class". Its episodes live in worker
processes, each in one of them. What raises, hangs, eats memory or kills its process ends its own episode, with a
reason. The other episodes of a process that was ended are played again, from the seed and the actions, when it is their
turn. An environment has to answer the same actions alike; an episode of one that does not ends as "not repeatable".
"""

import itertools
import json
import os
import random
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from entropy_polarity.support.success import SUCCESS
from entropy_polarity.tasks import Problem, Split
from entropy_polarity.tasks.games import OUT_OF_TURNS, RAISED, TOO_LONG, WON, EpisodeOverError, StepResult, TextEnv
from entropy_polarity.tasks.workers import DIED, OUT_OF_MEMORY, TIMED_OUT, NoWorkerError, Outcome, Workers

LOST, NOT_REPEATABLE = "lost", "not repeatable"
REASONS = (WON, LOST, OUT_OF_TURNS, TOO_LONG, RAISED, TIMED_OUT, OUT_OF_MEMORY, DIED, NOT_REPEATABLE)
MAX_PROCESSES = 8  # unless more are asked for: each holds the libraries of the environment
_NUMBERS = itertools.count()


class Made(NamedTuple):
    """How a worker makes an environment: a class, "module:Class", its keyword arguments, what to import beforehand, and
    a folder where modules are looked for last."""

    factory: str
    settings: Mapping[str, Any]
    library: str
    also: str = ""


@dataclass(frozen=True, kw_only=True)
class SubprocessGame:
    """A game whose environments live in other processes; `made` says of what class they are.

    A reset or a step may take `seconds`, a process `memory_gib` of address space; what an environment says is cut after
    `max_observation_characters`. `processes` play at the same time, by default one for each core, at most 8. A reward
    of 1 or more in all is a success. An episode that is done is `won` or `lost` by that, unless the environment gives
    one of the reasons that its class lists in `reasons`. The splits hold different seeds. Raises ValueError, in a line,
    for a class that cannot be imported or made, or is no `TextEnv`, and for limits that are not positive.
    """

    max_turns: int = 16
    max_action_tokens: int = 64
    max_observation_characters: int = 4000
    seconds: float = 10.0
    memory_gib: float = 4.0
    processes: int | None = None
    reasons: tuple[str, ...] = field(init=False, compare=False, repr=False)
    _lanes: "list[EnvironmentProcess]" = field(init=False, compare=False, repr=False)

    @property
    def name(self) -> str:
        raise NotImplementedError

    def made(self) -> Made:
        raise NotImplementedError

    def __post_init__(self) -> None:
        limits = ("max_turns", "max_action_tokens", "max_observation_characters", "seconds", "memory_gib", "processes")
        for limit in limits:
            value = getattr(self, limit)
            if value is not None and not value > 0:
                raise ValueError(f"task {self.name}: {limit} is {value}; expected a positive number")
        processes = self.processes or min(os.cpu_count() or 1, MAX_PROCESSES)
        object.__setattr__(self, "_lanes", [EnvironmentProcess(self) for _ in range(processes)])
        object.__setattr__(self, "reasons", tuple(dict.fromkeys([*REASONS, *self._checked()])))

    def _checked(self) -> list[str]:
        """The reasons that the class lists, if an environment of it can be made."""
        try:
            outcome = self._lanes[0].ask("check", *self.made()[:2])
        except NoWorkerError as error:
            why = str(error).rpartition(": ")[2]
            raise ValueError(f"task {self.name}: {self.made().factory} cannot be imported: {why}") from None
        wrong = outcome.failure or outcome.value["wrong"]
        if wrong:
            raise ValueError(f"task {self.name}: {self.made().factory} cannot be played: {wrong}")
        return outcome.value["reasons"]

    def problem(self, seed: int, index: int, split: Split = "train") -> Problem:
        # The last bit tells the splits apart; numpy takes seeds of 32 bits.
        start = 2 * random.Random(f"{self.name}:{split}:{seed}:{index}").getrandbits(31) + (split == "test")
        # What the policy reads first is not here: that would start every episode of a run before the first one.
        return Problem(f"{self.name}, seed {start}", {"seed": start}, str(start))

    @property
    def lanes(self) -> int:
        return len(self._lanes)

    def env(self, lane: int = 0) -> TextEnv:
        return _Played(self, self._lanes[lane])

    def close(self) -> None:
        """End the processes. Episodes that go on after that are played again in new ones."""
        for lane in self._lanes:
            lane.workers.close()


@dataclass(frozen=True, kw_only=True)
class Environment(SubprocessGame):
    """The game of a class of one's own: `factory` names it, "module:Class", `settings` are its keyword arguments.

    The module is imported in workers, from wherever this process finds its modules, then from the current folder.
    """

    factory: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        module, _, attribute = self.factory.partition(":")
        if not (module and attribute):
            raise ValueError(f"task env: factory is {self.factory!r}; expected 'module:Class', a TextEnv")
        try:
            json.dumps(self.settings)
        except TypeError as error:
            raise ValueError(f"task env: settings must be what JSON can hold ({error})") from None
        super().__post_init__()

    @property
    def name(self) -> str:
        return "env"

    def made(self) -> Made:
        return Made(self.factory, self.settings, library=self.factory.partition(":")[0], also=os.getcwd())


class EnvironmentProcess:
    """One process, and the numbers of the episodes in it that are over."""

    def __init__(self, game: SubprocessGame) -> None:
        self.over: list[int] = []
        self.workers = Workers(
            "entropy_polarity.tasks.environment_worker:serve",
            seconds=game.seconds,
            memory_bytes=int(game.memory_gib * 2**30),
            count=1,
            preload=game.made().library,
            also=game.made().also,
        )

    def ask(self, *request: Any) -> Outcome:
        return self.workers.map([request])[0]


class _Played:
    """An episode as its policy sees it: what was done and heard stays here, the environment lives in the lane."""

    def __init__(self, game: SubprocessGame, lane: EnvironmentProcess) -> None:
        self.game, self.lane, self.number = game, lane, next(_NUMBERS)
        self.actions: list[str | None] = []  # None is the reset
        self.heard: list[list[Any]] = []
        self.reward, self.counted = 0.0, {}
        weakref.finalize(self, lane.over.append, self.number).atexit = False

    def reset(self, seed: int) -> str:
        self.seed = seed
        return self._do(None).observation

    def step(self, action: str) -> StepResult:
        return self._do(action)

    def facts(self) -> dict[str, float]:
        return self.counted

    def _do(self, action: str | None) -> StepResult:
        outcome = self._ask(action)
        if outcome.failure in (OUT_OF_MEMORY, DIED):
            # Perhaps another episode had filled or broken the process: judged is what this one does alone.
            self.lane.workers.close()
            outcome = self._ask(action)
        if outcome.failure:
            if outcome.failure != NOT_REPEATABLE:
                self.lane.workers.close()  # nobody knows what an interrupted library left behind
            known = outcome.failure in self.game.reasons
            raise EpisodeOverError(outcome.failure if known else RAISED, outcome.failure)
        if "raised" in outcome.value:
            raise EpisodeOverError(RAISED, outcome.value["raised"])
        self.actions.append(action)
        self.heard.append(outcome.value["answer"])
        self.counted = outcome.value["facts"]
        answer = StepResult(*outcome.value["answer"])
        self.reward += answer.reward
        if answer.done and answer.reason not in self.game.reasons:
            answer = answer._replace(reason=WON if self.reward >= SUCCESS else LOST)
        return answer

    def _ask(self, action: str | None) -> Outcome:
        """The outcome of an action; before it, where the process does not know the episode, of those that led here."""
        outcome = self._send(action)
        if outcome != Outcome(None):
            return outcome
        for done, heard in zip(self.actions, self.heard, strict=True):
            outcome = self._send(done)
            if outcome.failure or outcome.value.get("answer") != heard:
                return Outcome(None, outcome.failure or NOT_REPEATABLE)
        return self._send(action)

    def _send(self, action: str | None) -> Outcome:
        limit = self.game.max_observation_characters
        if action is not None:
            return self.lane.ask("step", self.number, action, limit)
        over = [self.lane.over.pop() for _ in range(len(self.lane.over))]
        return self.lane.ask("reset", self.number, *self.game.made()[:2], self.seed, over, limit)
