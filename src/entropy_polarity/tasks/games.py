"""Games in text that come with the package, and the ways in which an episode of any game can end.

guess       a number from 1 to 32 in six guesses; the answers are < and >
keydoor     a 5 x 5 grid: fetch the key K, then reach the door D; moves are u, d, l, r
"""

import random
from dataclasses import dataclass
from typing import ClassVar, NoReturn

from entropy_polarity.tasks.protocol import Episodic, Problem, Split, StepResult, TextEnv

WON, OUT_OF_TURNS, MALFORMED, TOO_LONG, RAISED = "won", "out of turns", "malformed action", "action too long", "raised"


@dataclass(frozen=True)
class SmallGame(Episodic):
    """A game of this file. The splits hold different seeds, but so few starts are possible that some are alike."""

    environment: ClassVar[type]
    name: ClassVar[str]
    max_turns: ClassVar[int]
    max_action_tokens: ClassVar[int]
    reasons = (WON, OUT_OF_TURNS, MALFORMED, TOO_LONG, RAISED)

    def problem(self, seed: int, index: int, split: Split = "train") -> Problem:
        start = random.Random(f"{self.name}:{split}:{seed}:{index}").getrandbits(32)
        return Problem(self.env().reset(start), {"seed": start}, str(start))

    def env(self) -> TextEnv:
        return self.environment()


class GuessEnv:
    """Guess a number from 1 to 32.

    >>> game = GuessEnv()
    >>> game.reset(seed=5), game.step("16").observation, game.step("48").reason
    ('1-32:', '>', 'malformed action')
    """

    low, high = 1, 32

    def reset(self, seed: int) -> str:
        self.number = random.Random(seed).randint(self.low, self.high)
        self.guesses: list[int] = []
        self.infeasible, self.off_centre = 0, 0.0
        return f"{self.low}-{self.high}:"

    def step(self, action: str) -> StepResult:
        if not (action.isascii() and action.isdigit() and len(action) <= 2 and 1 <= int(action) <= 32):
            return StepResult("", done=True, reason=MALFORMED)
        guess = int(action)
        self.guesses.append(guess)
        self.infeasible += not self.low <= guess <= self.high
        # How far from the middle, from 0 to 1; in an interval of even length the two middle ones are half a step away.
        half, distance = (self.high - self.low) / 2, abs(guess - (self.low + self.high) / 2)
        self.off_centre += 0.0 if distance <= 0.5 else min(1.0, distance / max(half, 0.5))
        if guess == self.number:
            return StepResult("", 1.0, done=True, reason=WON)
        if guess < self.number:
            self.low = max(self.low, guess + 1)
            return StepResult(">")
        self.high = min(self.high, guess - 1)
        return StepResult("<")

    def counts(self) -> dict[str, float]:
        count = max(1, len(self.guesses))
        return {"infeasible": self.infeasible / count, "off_centre": self.off_centre / count}


class Guess(SmallGame):
    """Bisection always wins; uniform guesses among what is possible win 0.70 of the episodes."""

    environment, name, max_turns, max_action_tokens = GuessEnv, "guess", 6, 3


class KeyDoorEnv:
    """Walk a 5 x 5 grid. A is the walker, B the walker with the key; a step into the wall changes nothing.

    >>> game = KeyDoorEnv()
    >>> game.reset(seed=1).split()
    ['....A', '.....', '.....', '...K.', '....D', ':']
    """

    size = 5
    MOVES: ClassVar[dict[str, tuple[int, int]]] = {"u": (-1, 0), "d": (1, 0), "l": (0, -1), "r": (0, 1)}

    def reset(self, seed: int) -> str:
        cells = [(row, column) for row in range(self.size) for column in range(self.size)]
        self.walker, self.key, self.door = random.Random(seed).sample(cells, 3)
        self.has_key, self.blocked, self.steps = False, 0, 0
        return self._grid()

    def step(self, action: str) -> StepResult:
        if action not in self.MOVES:
            return StepResult("", done=True, reason=MALFORMED)
        moved = [at + by for at, by in zip(self.walker, self.MOVES[action], strict=True)]
        inside = tuple(min(max(at, 0), self.size - 1) for at in moved)
        self.steps += 1
        self.blocked += inside == self.walker
        self.walker = inside
        self.has_key |= self.walker == self.key
        if self.has_key and self.walker == self.door:
            return StepResult("", 1.0, done=True, reason=WON)
        return StepResult(self._grid())

    def _grid(self) -> str:
        marks = {self.door: "D"} | ({} if self.has_key else {self.key: "K"}) | {self.walker: "AB"[self.has_key]}
        rows = ("".join(marks.get((row, column), ".") for column in range(self.size)) for row in range(self.size))
        return "\n".join(rows) + "\n:"

    def counts(self) -> dict[str, float]:
        return {"key": float(self.has_key), "blocked": self.blocked / max(1, self.steps)}


class KeyDoor(SmallGame):
    """A straight walk to the key and then to the door takes at most 15 steps."""

    environment, name, max_turns, max_action_tokens = KeyDoorEnv, "keydoor", 16, 2


GAMES: dict[str, type[SmallGame]] = {"guess": Guess, "keydoor": KeyDoor}


def __getattr__(name: str) -> NoReturn:
    if name == "Answer":  # what environments of 0.1 import
        raise ImportError("games.Answer is tasks.protocol.StepResult now, and an environment has counts() for facts()")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
