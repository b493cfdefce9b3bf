"""A policy's attempts at problems: completions that the task judges, or episodes that it plays with an environment."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from entropy_polarity.generation import GREEDY, Generator, Progress, Sampling, Tick
from entropy_polarity.generation.episodes import play
from entropy_polarity.generation.sampling import TransformersGenerator
from entropy_polarity.support.success import SUCCESS
from entropy_polarity.support.text import valid, valid_parts
from entropy_polarity.tasks.prompts import encoded, for_tokenizer, plain, why_unreadable
from entropy_polarity.tasks.protocol import Game, Problem, Score, Task, VerifiedTask
from entropy_polarity.tasks.tools import tools_of

LARGEST_BATCH_OF_EPISODES = 256
JUDGED_AT_A_TIME = 512


@dataclass(frozen=True)
class Attempt:
    """A completion, or an episode, and its verdict.

    Of a completion `text` is all that the policy said (with tools the content of its messages, without calls and
    reasoning), `answer` its final answer, None where there is none or no vote was asked for, `messages` what it said
    and heard where it has tools. Of an episode `text` is what its environment said first, `said` the turns as (action,
    observation). `counts` are the numbers that the environment or the tools count.
    """

    text: str
    score: Score
    answer: str | None = None
    said: list[tuple[str, str]] | None = None
    counts: dict[str, float] = field(default_factory=dict)
    messages: list[dict[str, Any]] | None = None

    @property
    def right(self) -> bool:
        return self.score.reward >= SUCCESS

    def to_json(self) -> dict[str, Any]:
        judged = {"verdict": self.score.reason, "reward": self.score.reward}
        if self.said is not None:
            return {"observation": self.text, "turns": self.said, **judged, "facts": self.counts}  # the name of 0.1
        heard = {} if self.messages is None else {"messages": self.messages, "facts": self.counts}
        return {"completion": self.text, "answer": self.answer, **judged, **heard}


class _Said(NamedTuple):
    """What a policy said to a problem; with tools also what was counted, and all that was said and heard."""

    text: str
    counts: dict[str, float]
    messages: list[dict[str, Any]] | None


class Answering:
    """Attempts at a task of one turn: the policy answers, with tools where the task has them, and the task judges."""

    voted = True  # completions have final answers, over which a majority can be counted

    def __init__(self, generator: Generator, task: VerifiedTask) -> None:
        self.generator, self.task = generator, task

    def why_unreadable(self, problems: Sequence[Problem]) -> str | None:
        """Why the policy cannot read the problems, in one line, or None where it can."""
        prompts, tokenizer = self._prompts(problems), self.generator.tokenizer
        return why_unreadable(prompts, tokenizer, self.task.max_completion_tokens, self.generator.context)

    def attempts(
        self, problems: list[Problem], samples: int, seed: int, sampling: Sampling, vote: bool, progress: Progress
    ) -> list[list[Attempt]]:
        """`samples` attempts at each problem from the random state of `seed`; with final answers, to `vote` over."""
        _watch(self.generator, sampling, progress)
        said = (self._with_tools if tools_of(self.task) else self._alone)(problems, samples, seed, sampling)
        asked = [(problem, one.text) for problem, row in zip(problems, said, strict=True) for one in row]
        answers = iter(_in_parts(self.task.final_answers, asked, "votes", progress) if vote else [None] * len(asked))
        scores = iter(_in_parts(self.task.scores, asked, "verdicts", progress))
        return [
            [Attempt(o.text, next(scores), next(answers), counts=o.counts, messages=o.messages) for o in row]
            for row in said
        ]

    def _prompts(self, problems: Sequence[Problem]) -> list[list[int]]:
        tokenizer = self.generator.tokenizer
        return [encoded(for_tokenizer(problem, tokenizer), tokenizer) for problem in problems]

    def _alone(self, problems: list[Problem], samples: int, seed: int, sampling: Sampling) -> list[list[_Said]]:
        longest = self.task.max_completion_tokens
        made = self.generator.complete(self._prompts(problems), samples, longest, sampling, seed)
        texts = [self.generator.tokenizer.batch_decode(row, skip_special_tokens=True) for row in made]
        return [[_Said(valid(text), {}, None) for text in row] for row in texts]

    def _with_tools(self, problems: list[Problem], samples: int, seed: int, sampling: Sampling) -> list[list[_Said]]:
        from entropy_polarity.generation.tools import Conversation, converse  # needs TRL

        def said(conversation: Conversation) -> _Said:
            counts = {"tool_calls": float(conversation.calls), "failed_tool_calls": float(conversation.failures)}
            return _Said(valid(plain(conversation.messages)), counts, valid_parts(conversation.messages))

        asked = [problem.messages or [{"role": "user", "content": problem.prompt}] for problem in problems]
        longest = self.task.max_completion_tokens
        made = converse(self.generator, tools_of(self.task), asked, samples, longest, sampling, seed)
        return [[said(conversation) for conversation in row] for row in made]


class Playing:
    """Attempts at a game: the policy plays episodes, and their environments give the rewards."""

    voted = False

    def __init__(self, generator: Generator, game: Game) -> None:
        self.generator, self.game = generator, game

    def why_unreadable(self, problems: Sequence[Problem]) -> str | None:
        return None  # that shows when it plays

    def attempts(
        self, problems: list[Problem], samples: int, seed: int, sampling: Sampling, vote: bool, progress: Progress
    ) -> list[list[Attempt]]:
        game, generator = self.game, self.generator
        if not isinstance(generator, TransformersGenerator):
            raise TypeError(f"task {game.name!r} is a game: it is played with a TransformersGenerator")
        _watch(generator, sampling, progress)

        def played(batch: Sequence[Problem], tick: Tick) -> list[Attempt]:
            of_batch = play(generator.model, generator.tokenizer, game, batch, sampling, len(batch), tick=tick)
            return [Attempt(e.observation, Score(e.reward, e.reason), said=e.said, counts=e.counts) for e in of_batch]

        # As if every observation were as long as the first.
        said = max(len(problem.prompt) for problem in problems)
        tokens = said + game.max_turns * (said + game.max_action_tokens)
        return generator.draw(problems, samples, played, seed, tokens, LARGEST_BATCH_OF_EPISODES, logit_rows=said)


def _watch(generator: Generator, sampling: Sampling, progress: Progress) -> None:
    generator.watch = partial(progress, "greedy answers" if sampling == GREEDY else "samples")


def _in_parts(judge: Callable[[list[Any]], list[Any]], answers: list[Any], what: str, progress: Progress) -> list[Any]:
    """What `judge` says of each of the answers, some hundreds at a time."""
    judged: list[Any] = []
    while len(judged) < len(answers):
        judged += judge(answers[len(judged) : len(judged) + JUDGED_AT_A_TIME])
        progress(what, float(len(judged)), len(answers))
    return judged


def attempting(generator: Generator, task: Task) -> Answering | Playing:
    """How the policy of `generator` attempts the problems of `task`."""
    return task.by_kind(verified=lambda task: Answering(generator, task), played=lambda game: Playing(generator, game))
