"""Games of TextArena that work offline and start from a seed; each in a process that can be killed.

The rules and the words are TextArena's. What is paid is ours where TextArena's score is no reward: best play has 1, the
worst 0, and nothing but a win has 1 (`paid`). In 0.7.4 Bandit's score is the higher the worse the button, a lost 2048
can have 1, LightsOut goes below 0, and others pay for what was lost or ended with an illegal move.
"""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from entropy_polarity.tasks.checks import check_installed
from entropy_polarity.tasks.environments import EnvironmentClass, SubprocessGame
from entropy_polarity.tasks.protocol import StepResult

GAMES = ("2048", "Bandit", "Blackjack", "FrozenLake", "GuessTheNumber", "LightsOut", "Mastermind", "Minesweeper",
         "Secretary", "Sokoban")  # fmt: skip
ILLEGAL = "illegal move"
WELL_CHOSEN = "Congratulations! You chose the correct button."
# Whose score is a share of what there was to win: hands, lights, cells, boxes.
SHARES = ("Blackjack", "LightsOut", "Minesweeper", "Sokoban")


@dataclass(frozen=True, kw_only=True)
class TextArena(SubprocessGame):
    """The game `game` as TextArena names it, as "GuessTheNumber" or "Minesweeper-v0-small".

    The reward is what `paid` says at the end, and none after an illegal move. 1 is a success. Counts: `score`, as
    TextArena gave it, and `illegal`, the share of moves that the game refused; one refusal in a row is forgiven.
    Raises ImportError without textarena, ValueError for a game that is neither of `GAMES` nor a variant.
    """

    game: str = ""
    max_turns: int = 32

    def __post_init__(self) -> None:
        check_installed(self, "textarena", "games")
        if self.game.partition("-")[0] not in GAMES:
            raise ValueError(
                f"task {self.name}: not a game that works offline and from a seed, as these do: {', '.join(GAMES)}"
            )
        super().__post_init__()

    @property
    def name(self) -> str:
        return f"textarena:{self.game}"

    def environment_class(self) -> EnvironmentClass:
        return EnvironmentClass(f"{__name__}:ArenaEnv", {"game": self.game}, library="textarena")


class ArenaEnv:
    """One episode, in a worker."""

    reasons: ClassVar[tuple[str, ...]] = (ILLEGAL,)

    def __init__(self, game: str) -> None:
        import textarena
        from textarena.envs.registration import ENV_REGISTRY
        from textarena.wrappers import ActionFormattingWrapper

        self.kind, _, variant = game.partition("-")
        full = "-".join(filter(None, [self.kind, "v0", variant.removeprefix("v0").removeprefix("-")]))
        if f"{full}-raw" not in ENV_REGISTRY:
            known = [name.removesuffix("-raw") for name in ENV_REGISTRY if name.endswith("-raw")]
            variants = ", ".join(name for name in known if name.startswith(f"{self.kind}-v0"))
            raise ValueError(f"TextArena has no {full}: expected one of {variants}")
        self.env: Any = ActionFormattingWrapper(textarena.make(f"{full}-raw"))
        self.moves = self.refused = 0
        self.score: dict[str, float] = {}

    def reset(self, seed: int) -> str:
        self.env.reset(num_players=1, seed=seed)
        return self._heard()

    def step(self, action: str) -> StepResult:
        self.moves += 1
        over, _ = self.env.step(action)
        if not over:
            self.refused += self.env.state.error_count > 0
            return StepResult(self._heard())
        rewards, info = self.env.close()
        illegal, why = bool(info[0]["invalid_move"]), str(info[0].get("reason", ""))
        self.refused += illegal
        self.score = {"score": float(rewards[0])}
        if illegal:
            return StepResult(why, 0.0, done=True, reason=ILLEGAL)
        reward = paid(self.kind, self.env, action, self.score["score"])
        # Bandit tells everybody that the button was wrong.
        return StepResult(WELL_CHOSEN if self.kind == "Bandit" and reward == 1 else why, reward, done=True)

    def _heard(self) -> str:
        """What the game said since the last move; the move itself the policy has read already."""
        from textarena.core import ObservationType

        _, messages = self.env.get_observation()
        return "\n".join(text for _, text, kind in messages if kind != ObservationType.PLAYER_ACTION)

    def counts(self) -> dict[str, float]:
        return {"illegal": self.refused / max(1, self.moves), **self.score}


def paid(kind: str, env: Any, action: str, score: float) -> float:
    """The reward of a game that ended with `action`, of its true state and of TextArena's score: from 0 to 1.

    Bandit      how good the chosen button is: (mean - worst mean) / (best mean - worst mean)
    Mastermind  the share of the last guess that stands in its place
    SHARES      the score: of Blackjack hands won, of LightsOut lights put out (0 where more are on than at first),
                of Minesweeper safe cells, of Sokoban boxes on their targets
    others      1 for a win, else 0
    """
    state = env.state.game_state
    if kind == "Bandit":
        means, named = state["ground_truth"], re.search(r"\[(.*)\]", action)
        chosen = means[named[1] if named else action]
        return (chosen - min(means.values())) / (max(means.values()) - min(means.values()))
    if kind == "Mastermind":
        return state["history"][-1]["black"] / state["code_length"]
    if kind == "2048":
        return float(max(map(max, state["board"])) >= env.target_tile)
    return max(score, 0.0) if kind in SHARES else float(score >= 1)
