"""Games of TextArena that work offline and start from a seed; each in a process that can be killed.

The rules and the words are TextArena's, and so is the score, with one exception: some games pay for an episode that
ended with an illegal move, and here that pays nothing.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any, ClassVar

from entropy_polarity.tasks.environments import GameElsewhere, Made
from entropy_polarity.tasks.games import Answer

GAMES = ("2048", "Bandit", "Blackjack", "FrozenLake", "GuessTheNumber", "LightsOut", "Mastermind", "Minesweeper",
         "Secretary", "Sokoban")  # fmt: skip
ILLEGAL = "illegal move"


@dataclass(frozen=True, kw_only=True)
class TextArena(GameElsewhere):
    """The game `game` as TextArena names it, as "GuessTheNumber" or "Minesweeper-v0-small".

    The reward is the game's score at the end, and none after an illegal move (a negative score stays). 1 is a success.
    Facts: `score`, as TextArena gave it, and `illegal`, the share of moves that the game refused; one refusal in a row
    is forgiven. Raises ImportError without textarena, ValueError for a game that is neither of `GAMES` nor a variant.
    """

    game: str = ""
    max_turns: int = 32

    def __post_init__(self) -> None:
        if importlib.util.find_spec("textarena") is None:
            raise ImportError(f"task {self.name} needs textarena: pip install 'entropy-polarity[games]'")
        if self.game.partition("-")[0] not in GAMES:
            raise ValueError(
                f"task {self.name}: not a game that works offline and from a seed, as these do: {', '.join(GAMES)}"
            )
        super().__post_init__()

    @property
    def name(self) -> str:
        return f"textarena:{self.game}"

    def made(self) -> Made:
        return Made(f"{__name__}:ArenaEnv", {"game": self.game}, library="textarena")


class ArenaEnv:
    """One episode, in a worker."""

    reasons: ClassVar[tuple[str, ...]] = (ILLEGAL,)

    def __init__(self, game: str) -> None:
        import textarena
        from textarena.envs.registration import ENV_REGISTRY
        from textarena.wrappers import ActionFormattingWrapper

        kind, _, variant = game.partition("-")
        full = "-".join(filter(None, [kind, "v0", variant.removeprefix("v0").removeprefix("-")]))
        if f"{full}-raw" not in ENV_REGISTRY:
            known = [name.removesuffix("-raw") for name in ENV_REGISTRY if name.endswith("-raw")]
            variants = ", ".join(name for name in known if name.startswith(f"{kind}-v0"))
            raise ValueError(f"TextArena has no {full}: expected one of {variants}")
        self.env: Any = ActionFormattingWrapper(textarena.make(f"{full}-raw"))
        self.moves = self.refused = 0
        self.score: dict[str, float] = {}

    def reset(self, seed: int) -> str:
        self.env.reset(num_players=1, seed=seed)
        return self._heard()

    def step(self, action: str) -> Answer:
        self.moves += 1
        over, _ = self.env.step(action)
        if not over:
            self.refused += self.env.state.error_count > 0
            return Answer(self._heard())
        rewards, info = self.env.close()
        illegal, why = bool(info[0]["invalid_move"]), str(info[0].get("reason", ""))
        self.refused += illegal
        self.score = {"score": float(rewards[0])}
        if illegal:
            return Answer(why, min(self.score["score"], 0.0), done=True, reason=ILLEGAL)
        return Answer(why, self.score["score"], done=True)

    def _heard(self) -> str:
        """What the game said since the last move; the move itself the policy has read already."""
        from textarena.core import ObservationType

        _, messages = self.env.get_observation()
        return "\n".join(text for _, text, kind in messages if kind != ObservationType.PLAYER_ACTION)

    def facts(self) -> dict[str, float]:
        return {"illegal": self.refused / max(1, self.moves), **self.score}
