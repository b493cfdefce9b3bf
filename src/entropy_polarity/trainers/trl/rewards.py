"""From a task to what TRL's trainer asks for: prompts, a reward function, and for games rollouts of several turns."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from entropy_polarity.generation import Sampling
from entropy_polarity.generation.episodes import Episode, mean_counts, play
from entropy_polarity.support.text import valid
from entropy_polarity.tasks.prompts import for_tokenizer, plain
from entropy_polarity.tasks.protocol import Game, Messages, Problem, Task, VerifiedTask
from entropy_polarity.tasks.tools import tools_of
from entropy_polarity.trainers.trl.recording import Judged


class VerifiedReward:
    """The reward function of a task of one turn: the task judges the completions.

    `problem` is a column of the data set, the number of each prompt's problem in `problems`. `judged` holds the last
    batch, in order.
    """

    __name__ = "verified"
    rollout = None  # TRL's own

    def __init__(self, task: VerifiedTask, problems: list[Problem]) -> None:
        self.task, self.problems, self.tools = task, problems, tools_of(task)
        self.judged: list[Judged] = []

    def prompts(self, tokenizer: Any) -> Sequence[str | Messages]:
        return [for_tokenizer(problem, tokenizer) for problem in self.problems]

    def __call__(self, completions: list[Any], problem: list[int], log_metric: Callable, **_: Any) -> list[float]:
        answers = [(self.problems[i], valid(plain(text))) for i, text in zip(problem, completions, strict=True)]
        scores = self.task.scores(answers)
        _log_verdicts(self.task, [score.reason for score in scores], log_metric)
        verdicts_on = zip(answers, scores, strict=True)
        self.judged = [Judged(asked.prompt, text, score.reason) for (asked, text), score in verdicts_on]
        return [score.reward for score in scores]


class EpisodeReward:
    """The rollouts (`rollout_func`) and the reward function of a game whose prompts are the numbers of `problems`.

    The reward is the environment's: a decoded completion holds its words as well as the policy's. Tokens of the
    environment have `env_mask` 0, which keeps them out of loss, entropy and every statistic. `judged` holds the last
    batch, in order.
    """

    __name__ = "episode"

    def __init__(self, game: Game, problems: list[Problem]) -> None:
        self.game, self.problems, self.tools = game, problems, []
        self.judged: list[Judged] = []

    def prompts(self, tokenizer: Any) -> Sequence[str | Messages]:
        return [str(number) for number in range(len(self.problems))]

    def rollout(self, prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        problems = [self.problems[int(prompt)] for prompt in prompts]
        model = trainer.accelerator.unwrap_model(trainer.model)
        episodes = play(model, trainer.processing_class, self.game, problems, Sampling(trainer.temperature))
        return {
            "prompt_ids": [episode.prompt_ids for episode in episodes],
            # TRL cannot take an empty completion: where nothing could be played one token stands, and is not trained.
            "completion_ids": [e.completion_ids or [trainer.processing_class.eos_token_id] for e in episodes],
            "env_mask": [e.env_mask or [0] for e in episodes],
            "logprobs": None,  # type: ignore[dict-item]
            "episode": episodes,
        }

    def __call__(self, completions: list[str], episode: list[Episode], log_metric: Callable, **_: Any) -> list[float]:
        _log_verdicts(self.game, [played.reason for played in episode], log_metric)
        for name, value in mean_counts(played.counts for played in episode).items():
            log_metric(f"episode/{name}", value)
        self.judged = [
            Judged(played.observation, text, played.reason) for text, played in zip(completions, episode, strict=True)
        ]
        return [played.reward for played in episode]


Reward = VerifiedReward | EpisodeReward


def reward_of(task: Task, problems: list[Problem]) -> Reward:
    """The reward function of `task`, whose prompts are those of `problems`."""
    return task.by_kind(
        verified=lambda task: VerifiedReward(task, problems), played=lambda game: EpisodeReward(game, problems)
    )


def _log_verdicts(task: Task, given: list[str], log_metric: Callable) -> None:
    """The share of each verdict that the task can give."""
    counted = Counter(given)
    for reason in task.reasons:
        log_metric(f"verdict/{reason.replace(' ', '_')}", counted[reason] / len(given))
