"""From a game to what TRL's trainer asks for: rollouts of several turns, and their reward."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from entropy_polarity.generation.episodes import Episode, mean_facts, play
from entropy_polarity.tasks import Problem
from entropy_polarity.tasks.games import Game
from entropy_polarity.trainers.trl.recording import Judged


class Episodes:
    """The rollouts (`rollout_func`) and the reward function of a game whose prompts are the numbers of `problems`.

    The reward is the environment's: a decoded completion holds its words as well as the policy's. Tokens of the
    environment have `env_mask` 0, which keeps them out of loss, entropy and every statistic. `judged` holds the last
    batch, in order.
    """

    __name__ = "episode"

    def __init__(self, game: Game, problems: list[Problem]) -> None:
        self.game, self.problems = game, problems
        self.judged: list[Judged] = []

    def rollout(self, prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        problems = [self.problems[int(prompt)] for prompt in prompts]
        model = trainer.accelerator.unwrap_model(trainer.model)
        episodes = play(model, trainer.processing_class, self.game, problems, temperature=trainer.temperature)
        return {
            "prompt_ids": [episode.prompt_ids for episode in episodes],
            # TRL cannot take an empty completion: where nothing could be played one token stands, and is not trained.
            "completion_ids": [e.completion_ids or [trainer.processing_class.eos_token_id] for e in episodes],
            "env_mask": [e.env_mask or [0] for e in episodes],
            "logprobs": None,  # type: ignore[dict-item]
            "episode": episodes,
        }

    def __call__(self, completions: list[str], episode: list[Episode], log_metric: Callable, **_: Any) -> list[float]:
        ends = Counter(played.reason for played in episode)
        for reason in self.game.reasons:
            log_metric(f"verdict/{reason.replace(' ', '_')}", ends[reason] / len(episode))
        for name, value in mean_facts(episode).items():
            log_metric(f"episode/{name}", value)
        self.judged = [
            Judged(played.observation, text, played.reason) for text, played in zip(completions, episode, strict=True)
        ]
        return [played.reward for played in episode]
