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
from entropy_polarity.tasks.checks import check_positive
from entropy_polarity.tasks.games import OUT_OF_TURNS, RAISED, TOO_LONG, WON
from entropy_polarity.tasks.protocol import EpisodeOverError, Episodic, Problem, Split, StepResult, TextEnv
from entropy_polarity.tasks.workers import DIED, OUT_OF_MEMORY, TIMED_OUT, NoWorkerError, Outcome, Workers

LOST, NOT_REPEATABLE = "lost", "not repeatable"
REASONS = (WON, LOST, OUT_OF_TURNS, TOO_LONG, RAISED, TIMED_OUT, OUT_OF_MEMORY, DIED, NOT_REPEATABLE)
MAX_PROCESSES = 8  # unless more are asked for: each holds the libraries of the environment
_NUMBERS = itertools.count()


class EnvironmentClass(NamedTuple):
    """The class of an environment, "module:Class", and its keyword arguments; what a worker imports beforehand, and a
    folder where it looks for modules last."""

    factory: str
    settings: Mapping[str, Any]
    library: str
    last_folder: str = ""


@dataclass(frozen=True, kw_only=True)
class SubprocessGame(Episodic):
    """A game whose environments live in other processes; `environment_class` says what they are.

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
    _processes: "list[EnvironmentProcess]" = field(init=False, compare=False, repr=False)

    @property
    def name(self) -> str:
        raise NotImplementedError

    def environment_class(self) -> EnvironmentClass:
        raise NotImplementedError

    def __post_init__(self) -> None:
        check_positive(self, "max_turns", "max_action_tokens", "max_observation_characters")
        check_positive(self, "seconds", "memory_gib", "processes")
        count = self.processes or min(os.cpu_count() or 1, MAX_PROCESSES)
        object.__setattr__(self, "_processes", [EnvironmentProcess(self) for _ in range(count)])
        object.__setattr__(self, "reasons", tuple(dict.fromkeys([*REASONS, *self._own_reasons()])))

    def _own_reasons(self) -> list[str]:
        """The reasons that the class lists, if an environment of it can be made."""
        factory, settings, *_ = self.environment_class()
        try:
            outcome = self._processes[0].ask("check", factory, settings)
        except NoWorkerError as error:
            why = str(error).rpartition(": ")[2]
            raise ValueError(f"task {self.name}: {factory} cannot be imported: {why}") from None
        wrong = outcome.failure or outcome.value["wrong"]
        if wrong:
            raise ValueError(f"task {self.name}: {factory} cannot be played: {wrong}")
        return outcome.value["reasons"]

    def problem(self, seed: int, index: int, split: Split = "train") -> Problem:
        # The last bit tells the splits apart; numpy takes seeds of 32 bits.
        start = 2 * random.Random(f"{self.name}:{split}:{seed}:{index}").getrandbits(31) + (split == "test")
        # What the policy reads first is not here: that would start every episode of a run before the first one.
        return Problem(f"{self.name}, seed {start}", {"seed": start}, str(start))

    def env(self) -> TextEnv:
        return _SubprocessEnv(self, self._processes[0])

    def envs(self, count: int) -> list[list[TextEnv]]:
        """A group for each process; neighbours, which are often of one seed, share one."""
        numbers = [i * len(self._processes) // count for i in range(count)]
        return [[_SubprocessEnv(self, p) for _ in range(numbers.count(i))] for i, p in enumerate(self._processes)]

    def close(self) -> None:
        """End the processes. Episodes that go on after that are played again in new ones."""
        for process in self._processes:
            process.workers.close()


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

    def environment_class(self) -> EnvironmentClass:
        library = self.factory.partition(":")[0]
        return EnvironmentClass(self.factory, self.settings, library, last_folder=os.getcwd())


class EnvironmentProcess:
    """A process in which environments live, and the numbers of those of its episodes that are over."""

    def __init__(self, game: SubprocessGame) -> None:
        self.over: list[int] = []
        _, _, library, last_folder = game.environment_class()
        self.workers = Workers(
            "entropy_polarity.tasks.environment_worker:serve",
            seconds=game.seconds,
            memory_bytes=int(game.memory_gib * 2**30),
            count=1,
            preload=library,
            last_folder=last_folder,
        )

    def ask(self, *request: Any) -> Outcome:
        return self.workers.map([request])[0]


class _SubprocessEnv:
    """An episode whose environment lives in another process. Its actions and their results are kept here."""

    def __init__(self, game: SubprocessGame, process: EnvironmentProcess) -> None:
        self.game, self.process, self.number = game, process, next(_NUMBERS)
        self.actions: list[str | None] = []  # None is the reset
        self.results: list[list[Any]] = []
        self.reward, self.counted = 0.0, {}
        weakref.finalize(self, process.over.append, self.number).atexit = False

    def reset(self, seed: int) -> str:
        self.seed = seed
        return self.step(None).observation

    def counts(self) -> dict[str, float]:
        return self.counted

    def step(self, action: str | None) -> StepResult:
        outcome = self._ask(action)
        if outcome.failure in (OUT_OF_MEMORY, DIED):
            # Perhaps another episode had filled or broken the process: judged is what this one does alone.
            self.process.workers.close()
            outcome = self._ask(action)
        if outcome.failure:
            if outcome.failure != NOT_REPEATABLE:
                self.process.workers.close()  # nobody knows what an interrupted library left behind
            known = outcome.failure in self.game.reasons
            raise EpisodeOverError(outcome.failure if known else RAISED, outcome.failure)
        if "raised" in outcome.value:
            raise EpisodeOverError(RAISED, outcome.value["raised"])
        self.actions.append(action)
        self.results.append(outcome.value["result"])
        self.counted = outcome.value["counts"]
        result = StepResult(*outcome.value["result"])
        self.reward += result.reward
        if result.done and result.reason not in self.game.reasons:
            result = result._replace(reason=WON if self.reward >= SUCCESS else LOST)
        return result

    def _ask(self, action: str | None) -> Outcome:
        """The outcome of an action. Where the process does not know the episode, its earlier actions are done first."""
        outcome = self._send(action)
        if outcome != Outcome(None):
            return outcome
        for earlier, result in zip(self.actions, self.results, strict=True):
            outcome = self._send(earlier)
            if outcome.failure or outcome.value.get("result") != result:
                return Outcome(None, outcome.failure or NOT_REPEATABLE)
        return self._send(action)

    def _send(self, action: str | None) -> Outcome:
        limit = self.game.max_observation_characters
        if action is not None:
            return self.process.ask("step", self.number, action, limit)
        over = [self.process.over.pop() for _ in range(len(self.process.over))]
        factory, settings, *_ = self.game.environment_class()
        return self.process.ask("reset", self.number, factory, settings, self.seed, over, limit)
