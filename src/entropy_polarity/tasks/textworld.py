"""Text adventures, made on the spot by TextWorld: a seed is a game. Each is played in a process that can be killed.

TextWorld (MIT) plays its games with Jericho, which is under GPL-2: both come with the extra [games] only.
"""

import argparse
import functools
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from entropy_polarity.support.errors import unknown_name
from entropy_polarity.tasks.checks import check_installed
from entropy_polarity.tasks.environments import LOST, EnvironmentClass, SubprocessGame
from entropy_polarity.tasks.games import WON
from entropy_polarity.tasks.protocol import StepResult

DEFAULTS: dict[str, dict[str, Any]] = {
    "coin_collector": {"level": 3},
    "cooking": {"recipe": 1, "take": 1},
    "simple": {"rewards": "balanced", "goal": "brief"},
    "treasure_hunter": {"level": 3},
}
MAX_LEVEL = {"coin_collector": 300, "treasure_hunter": 30}
MAX_COMMAND_CHARACTERS = 120  # the interpreter is C
_ABOUT_THE_GAME = {"quit", "q", "restart", "restore", "save", "script", "transcript", "undo", "verify"}
_NOT_PRINTABLE = re.compile(r"[^ -~]")  # ASCII: to the interpreter, others are keys of its own
_PROMPT = re.compile(r"\n>[^\n]*\s*\Z")  # and the status line after it
_BLANK_LINES = re.compile(r"\n\s*\n\s*")


@dataclass(frozen=True, kw_only=True)
class TextWorld(SubprocessGame):
    """The challenge `challenge` of TextWorld; `options` as the command tw-make names them, without the dashes.

    The reward is the share of the game's points that a step gained; all of them are a success. With `show_commands` the
    policy is told which commands make sense. Making a game takes seconds, and is done in the reset. Counts: `score`,
    the share of the points, and `useless`, the share of commands that made no sense. Raises ImportError without
    textworld, ValueError for a challenge or an option that it does not have.
    """

    challenge: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    show_commands: bool = False
    max_turns: int = 32
    max_action_tokens: int = 32
    max_observation_characters: int = 1500
    seconds: float = 60.0

    def __post_init__(self) -> None:
        check_installed(self, "textworld", "games")
        if self.challenge not in DEFAULTS:
            raise unknown_name("TextWorld challenge", self.challenge, DEFAULTS)
        super().__post_init__()

    @property
    def name(self) -> str:
        return f"textworld:{self.challenge}"

    def environment_class(self) -> EnvironmentClass:
        options = DEFAULTS[self.challenge] | self.options
        settings = {"challenge": self.challenge, "options": options, "show_commands": self.show_commands}
        return EnvironmentClass(f"{__name__}:WorldEnv", settings, library="textworld.challenges")


class WorldEnv:
    """One episode, in a worker."""

    def __init__(self, challenge: str, options: dict[str, Any], show_commands: bool) -> None:
        self.challenge, self.options, self.show_commands = challenge, tuple(sorted(options.items())), show_commands
        self.paid, self.moves, self.useless = 0.0, 0, 0
        _settings(challenge, self.options)

    def reset(self, seed: int) -> str:
        import textworld

        wanted = dict.fromkeys(("won", "lost", "score", "max_score", "objective", "description", "feedback"), True)
        infos = textworld.EnvInfos(**wanted, admissible_commands=True)
        # The files are needed until the game runs. A killed process must not leave one for every game that it made.
        with tempfile.TemporaryDirectory() as folder:
            for name, content in _game_files(self.challenge, self.options, seed):
                Path(folder, name).write_bytes(content)
            self.env: Any = textworld.start(f"{folder}/game.z8", infos)
            self.env.seed(seed % 2**15)
            self.state = self.env.reset()
        return self._shown(f"{self.state.objective}\n\n{self.state.description}")

    def step(self, action: str) -> StepResult:
        command = " ".join(_NOT_PRINTABLE.sub("", " ".join(action.split())).split())[:MAX_COMMAND_CHARACTERS]
        self.moves += 1
        self.useless += command not in self.state.admissible_commands
        # After a backslash stand commands to the interpreter itself.
        if not command or "\\" in command or command.split()[0].lower() in _ABOUT_THE_GAME:
            return StepResult(self._shown("That is not a command of this game."))
        self.state, score, _ = self.env.step(command)
        # All that was paid adds up to exactly 1 where all points were made.
        gained = score / self.state.max_score - self.paid
        self.paid += gained
        over = self.state.won or self.state.lost
        heard = self._shown(_PROMPT.sub("", self.state.feedback.rstrip(" ")), commands=not over)
        return StepResult(heard, gained, over, (WON if self.state.won else LOST) if over else "")

    def _shown(self, text: str, commands: bool = True) -> str:
        text = _BLANK_LINES.sub("\n", text.strip())
        if self.show_commands and commands:
            text += f"\nCommands: {', '.join(self.state.admissible_commands)}"
        return text

    def counts(self) -> dict[str, float]:
        return {"score": self.paid, "useless": self.useless / max(1, self.moves)}


@functools.lru_cache(maxsize=32)  # the episodes of a group follow one another
def _game_files(challenge: str, options: tuple[tuple[str, Any], ...], seed: int) -> list[tuple[str, bytes]]:
    """The files of the game of that seed."""
    from textworld.challenges import CHALLENGES
    from textworld.generator import GameOptions, compile_game

    settings = _settings(challenge, options)
    if settings.get("take"):  # cooking, which would ask for the same recipe in every game
        settings["recipe_seed"] = settings["recipe_seed"] or seed
    made = GameOptions()
    made.seeds = seed
    with tempfile.TemporaryDirectory() as folder:
        made.path = f"{folder}/game.z8"
        _, make, _ = CHALLENGES[f"tw-{challenge}"]
        compile_game(make(settings, made), made)
        return [(name, Path(folder, name).read_bytes()) for name in ("game.z8", "game.json")]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _settings(challenge: str, options: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """The settings of a challenge as its own parser of tw-make reads them, which knows all names and defaults."""
    from textworld.challenges import CHALLENGES

    parser = _Parser(allow_abbrev=False, add_help=False)
    _, _, add_arguments = CHALLENGES[f"tw-{challenge}"]
    add_arguments(parser)
    words: list[str] = []
    for name, value in options:
        flag = f"--{name.replace('_', '-')}"
        words += [flag] * bool(value) if isinstance(value, bool) else [f"{flag}={value}"]
    settings = vars(parser.parse_args(words))
    if challenge in MAX_LEVEL and not 1 <= settings["level"] <= MAX_LEVEL[challenge]:
        raise ValueError(f"level is {settings['level']}; expected 1 to {MAX_LEVEL[challenge]}")
    return settings
