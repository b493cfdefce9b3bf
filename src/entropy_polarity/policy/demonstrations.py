"""What an embedded policy reads before reinforcement: texts in parts, each said by the task or a program that plays."""

import functools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

from entropy_polarity.support.errors import unknown_name
from entropy_polarity.tasks.countdown import Countdown
from entropy_polarity.tasks.games import Guess, GuessEnv, KeyDoor, KeyDoorEnv
from entropy_polarity.tasks.gym import GymTask
from entropy_polarity.tasks.protocol import Game, Problem

FRESH = 10_000  # problems of one seed of a data set
READ_AGAIN = 30_000


class Part(NamedTuple):
    """A piece of text; what the player says is learnt, with an <eos> after it."""

    text: str
    from_player: bool


class Source(NamedTuple):
    """The demonstrations of a task: number `index` of the stream `seed`, how many make a batch, and how many batches
    made the policy that is shipped, or are enough for a fair one."""

    parts: Callable[[int, int], list[Part]]
    batch_size: int
    steps: int


def countdown(numbers: tuple[int, ...]) -> Source:
    """Problems with one of their solutions."""
    task = Countdown(numbers=numbers)

    def parts(seed: int, index: int) -> list[Part]:
        problem, solution = task.solved_problem(seed, index, "train")
        return [Part(problem.prompt, False), Part(solution, True)]

    return Source(parts, 128, 1200)


def answered(task: GymTask) -> Source:
    """Problems of a data set with the answer that comes with them, the same `READ_AGAIN` of them again and again."""

    @functools.cache  # a data set takes its time to make one
    def problem(seed: int, index: int) -> Problem:
        # Seeds that no run has; one seed of a data set is soon read through.
        return task.problem(1_000_000 * (seed + 1) + index // FRESH, index, "train")

    def parts(seed: int, index: int) -> list[Part]:
        shown = problem(seed, index % READ_AGAIN)
        return [Part(shown.prompt, False), Part(shown.metadata["answer"], True)]

    return Source(parts, 128, 700)


def episodes(game: Game, player: Callable[[Any, random.Random], str], batch_size: int, steps: int) -> Source:
    """Episodes of a game, played by `player(env, rng)`."""

    def parts(seed: int, index: int) -> list[Part]:
        rng, env = random.Random(f"demonstration:{game.name}:{seed}:{index}"), game.env()
        said = [Part(env.reset(game.problem(seed, index, "train").metadata["seed"]), False)]
        for turn in range(game.max_turns):
            action = player(env, rng)
            said.append(Part(action, True))
            result = env.step(action)
            if result.done or turn == game.max_turns - 1:
                break
            said.append(Part(result.observation, False))
        return said

    return Source(parts, batch_size, steps)


def guesser(env: GuessEnv, rng: random.Random) -> str:
    """A quarter of its guesses are anywhere, the others where the number can be."""
    low, high = (1, 32) if rng.random() < 0.25 else (env.low, env.high)
    return str(rng.randint(low, high))


def walker(env: KeyDoorEnv, rng: random.Random) -> str:
    """Half of its steps lead to what it needs next, the others anywhere."""
    if rng.random() < 0.5:
        return rng.choice("udlr")
    goal = env.door if env.has_key else env.key
    down, right = goal[0] - env.walker[0], goal[1] - env.walker[1]
    useful = ["d"] * (down > 0) + ["u"] * (down < 0) + ["r"] * (right > 0) + ["l"] * (right < 0)
    return rng.choice(useful or ["u", "d", "l", "r"])


PLAYED = {"guess": (Guess, guesser, 128, 500), "keydoor": (KeyDoor, walker, 32, 400)}


def source_of(task: str, numbers: tuple[int, ...], config: dict[str, Any]) -> Source:
    """What a policy for `task` reads. Raises ValueError for a task that has no demonstrations."""
    if task == "countdown":
        return countdown(tuple(numbers))  # TOML has lists
    if task in PLAYED:
        game, *rest = PLAYED[task]
        return episodes(game(), *rest)
    if task.startswith("gym:"):
        return answered(GymTask(task.removeprefix("gym:"), config))
    raise unknown_name("task with demonstrations", task, ["countdown", *PLAYED, "gym:DATASET"])
