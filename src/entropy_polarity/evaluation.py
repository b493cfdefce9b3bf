"""Evaluation: have a policy answer held-out problems, judge its answers, and count successes problem by problem."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from entropy_polarity.generation import GREEDY, Generator, Progress, Sampling, silent
from entropy_polarity.generation.episodes import Episode, mean_facts, play
from entropy_polarity.generation.sampling import TransformersGenerator
from entropy_polarity.statistics.intervals import RATE, Estimate
from entropy_polarity.statistics.success import maj_at_k, pass_at_k
from entropy_polarity.support.success import SUCCESS
from entropy_polarity.support.text import valid, valid_parts
from entropy_polarity.tasks import Problem, Score, Task, distinct_problems
from entropy_polarity.tasks.games import Game
from entropy_polarity.tasks.prompts import encoded, for_tokenizer, plain, unreadable
from entropy_polarity.tasks.tools import tools_of

LARGEST_BATCH_OF_EPISODES = 256
JUDGED_AT_A_TIME = 512


@dataclass(frozen=True)
class Attempt:
    """A completion, or an episode, and its verdict.

    Of a completion `text` is all that the policy said (with tools the content of its messages, without calls and
    reasoning), `answer` its final answer, None where there is none or nobody asked for it, `messages` what it said and
    heard where it has tools. Of an episode `text` is what its environment said first, `said` the turns as (action,
    observation). `facts` is what the environment or the tools counted.
    """

    text: str
    score: Score
    answer: str | None = None
    said: list[tuple[str, str]] | None = None
    facts: dict[str, float] = field(default_factory=dict)
    messages: list[dict[str, Any]] | None = None

    @property
    def right(self) -> bool:
        return self.score.reward >= SUCCESS

    def to_json(self) -> dict[str, Any]:
        judged = {"verdict": self.score.reason, "reward": self.score.reward}
        if self.said is not None:
            return {"observation": self.text, "turns": self.said, **judged, "facts": self.facts}
        heard = {} if self.messages is None else {"messages": self.messages, "facts": self.facts}
        return {"completion": self.text, "answer": self.answer, **judged, **heard}


@dataclass(frozen=True)
class Attempts:
    """What a policy made of the same problems: `sampled` has a row of samples for each, `greedy` one attempt."""

    problems: list[Problem]
    sampled: list[list[Attempt]]
    greedy: list[Attempt]

    @property
    def samples(self) -> int:
        return len(self.sampled[0])

    @property
    def successes(self) -> list[int]:
        return [sum(attempt.right for attempt in row) for row in self.sampled]

    @property
    def greedy_right(self) -> list[int]:
        return [int(attempt.right) for attempt in self.greedy]

    def verdicts(self, reasons: Sequence[str]) -> dict[str, float]:
        """The share of samples with each verdict."""
        counted = Counter(attempt.score.reason for row in self.sampled for attempt in row)
        return {reason: counted[reason] / (len(self.problems) * self.samples) for reason in reasons}

    def facts(self) -> dict[str, Float[np.ndarray, " P"]]:
        """What environments counted, the mean over the samples of each problem; NaN where none of them has it."""
        means = [mean_facts(row) for row in self.sampled]
        names = dict.fromkeys(name for found in means for name in found)
        return {name: np.array([found.get(name, np.nan) for found in means]) for name in names}

    def measures(self, voted: bool) -> dict[str, Float[np.ndarray, " P"]]:
        """One value a problem of each measure: avg@n, pass@k, maj@k where answers are `voted` on, greedy, reward."""
        n, successes = self.samples, np.array(self.successes)
        sizes = sizes_up_to(n)
        found = {f"avg@{n}": successes / n} | {f"pass@{k}": pass_at_k(successes, n, k) for k in sizes}
        if voted:
            rows = [([a.answer for a in row], [a.right for a in row]) for row in self.sampled]
            for k in (k for k in sizes if k > 2):
                found[f"maj@{k}"] = np.array([maj_at_k(answers, right, k) for answers, right in rows])
        found["greedy"] = np.array(self.greedy_right, dtype=float)
        found["reward"] = np.array([np.mean([attempt.score.reward for attempt in row]) for row in self.sampled])
        return found


@dataclass(frozen=True)
class Evaluation:
    """Successes on held-out problems: pass@k by k, and how often each verdict was given (as a share).

    `successes` counts the right samples of each problem; `greedy` is 1 where the most likely completion, taken token
    by token, is right, and `greedy_pass` their mean. With both, runs can be compared problem by problem. `facts` are
    of games: the number of turns, and what else an environment counts, over the samples.
    """

    problems: int
    samples: int
    seed: int
    temperature: float
    pass_at: dict[int, Estimate]
    greedy_pass: Estimate
    verdicts: dict[str, float]
    successes: list[int]
    greedy: list[int]
    facts: dict[str, Estimate] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        document = asdict(self)
        document["pass_at"] = {str(k): asdict(e) for k, e in self.pass_at.items()}
        return document


def sizes_up_to(samples: int) -> list[int]:
    """The k of pass@k: powers of two, and the number of samples.

    >>> sizes_up_to(12)
    [1, 2, 4, 8, 12]
    """
    return [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k < samples] + [samples]


def evaluate(
    model: Any,
    tokenizer: Any,
    task: Task | Game,
    *,
    problems: int = 200,
    samples: int = 16,
    seed: int = 0,
    temperature: float = 1.0,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """pass@1, @2, @4, ... @`samples` and of the greedy answer, on the task's test split, with intervals over problems.

    `say` is told of a policy that cannot do the task at all. The random state of the caller and the mode of the model
    are left as they were.
    """
    check_counts(problems, samples)
    chosen = distinct_problems(task, seed, "test", problems)
    generator = TransformersGenerator(model, tokenizer)
    warn_before(generator, task, chosen, say)
    made = attempt(generator, task, chosen, samples, seed, Sampling(temperature), progress=progress)
    warn_after(made, say)
    successes = np.array(made.successes)
    return Evaluation(
        problems,
        samples,
        seed,
        temperature,
        {k: Estimate.of(pass_at_k(successes, samples, k), RATE) for k in sizes_up_to(samples)},
        Estimate.of(np.array(made.greedy_right, dtype=float), RATE),
        made.verdicts(task.reasons),
        made.successes,
        made.greedy_right,
        {name: Estimate.of(values[~np.isnan(values)]) for name, values in made.facts().items()},
    )


def check_counts(problems: int, samples: int) -> None:
    if problems < 1 or samples < 1:
        raise ValueError(f"evaluate: problems={problems} and samples={samples}; expected at least 1 of each")


def attempt(
    generator: Generator,
    task: Task | Game,
    problems: list[Problem],
    samples: int,
    seed: int,
    sampling: Sampling,
    *,
    final_answers: bool = False,
    greedy: list[Attempt] | None = None,
    progress: Progress = silent,
) -> Attempts:
    """`samples` attempts at each problem with the random state of `seed`, and the greedy one, unless it is known.

    `progress` is told of samples, greedy answers and verdicts as they come.

    Raises TypeError for a game and a generator that cannot play it.
    """
    sampled = _attempts(generator, task, problems, samples, seed, sampling, final_answers, progress)
    if greedy is None:
        drawn = _attempts(generator, task, problems, 1, seed, GREEDY, final_answers, progress)
        greedy = [first for (first,) in drawn]
    return Attempts(problems, sampled, greedy)


def warn_before(
    generator: Generator,
    task: Task | Game,
    problems: list[Problem],
    say: Callable[[str], None],
    label: str = "the policy",
) -> None:
    """Say so where a policy cannot read the problems of a task. What a game says is known only when it is played."""
    if isinstance(task, Game):
        return
    prompts = [encoded(for_tokenizer(problem, generator.tokenizer), generator.tokenizer) for problem in problems]
    why = unreadable(prompts, generator.tokenizer, task.max_completion_tokens, generator.context)
    if why is not None:
        say(f"warning: {label}: {why}")


def warn_after(made: Attempts, say: Callable[[str], None], label: str = "the policy") -> None:
    """Say so where all samples got the same verdict and none a reward: most often nothing that could be judged."""
    scores = [attempt.score for row in made.sampled for attempt in row]
    reasons = {score.reason for score in scores}
    if len(reasons) == 1 and not any(score.reward > 0 for score in scores):
        say(f"warning: {label}: all {len(scores):,} attempts were judged {reasons.pop()!r}: look at what it answers")


def _attempts(
    generator: Generator,
    task: Task | Game,
    problems: list[Problem],
    samples: int,
    seed: int,
    sampling: Sampling,
    final_answers: bool,
    progress: Progress,
) -> list[list[Attempt]]:
    generator.watch = partial(progress, "greedy answers" if sampling == GREEDY else "samples")
    repeated = [problem for problem in problems for _ in range(samples)]
    if isinstance(task, Game):
        made = [
            Attempt(e.observation, Score(e.reward, e.reason), said=e.said, facts=e.facts)
            for e in _played(generator, task, repeated, seed, sampling)
        ]
    else:
        said = [one for row in _said(generator, task, problems, samples, seed, sampling) for one in row]
        asked = [(problem, one.text) for problem, one in zip(repeated, said, strict=True)]
        finals = _in_parts(task.final_answers, asked, "votes", progress) if final_answers else [None] * len(asked)
        judged = zip(said, _in_parts(task.scores, asked, "verdicts", progress), finals, strict=True)
        made = [
            Attempt(one.text, score, answer, facts=one.facts, messages=one.messages) for one, score, answer in judged
        ]
    return [made[i * samples : (i + 1) * samples] for i in range(len(problems))]


def _in_parts(judge: Callable[[list[Any]], list[Any]], answers: list[Any], what: str, progress: Progress) -> list[Any]:
    """What `judge` says of each of the answers, some hundreds at a time."""
    judged: list[Any] = []
    while len(judged) < len(answers):
        judged += judge(answers[len(judged) : len(judged) + JUDGED_AT_A_TIME])
        progress(what, float(len(judged)), len(answers))
    return judged


class _Said(NamedTuple):
    """What a policy said to a problem; with tools also what was counted, and all that was said and heard."""

    text: str
    facts: dict[str, float]
    messages: list[dict[str, Any]] | None


def _said(
    generator: Generator, task: Task, problems: list[Problem], samples: int, seed: int, sampling: Sampling
) -> list[list[_Said]]:
    tokenizer, longest, tools = generator.tokenizer, task.max_completion_tokens, tools_of(task)
    if not tools:
        prompts = [encoded(for_tokenizer(problem, tokenizer), tokenizer) for problem in problems]
        made = generator.complete(prompts, samples, longest, sampling, seed)
        texts = [tokenizer.batch_decode(row, skip_special_tokens=True) for row in made]
        return [[_Said(valid(text), {}, None) for text in row] for row in texts]
    from entropy_polarity.generation.tools import Conversation, converse  # needs TRL

    def said(conversation: Conversation) -> _Said:
        facts = {"tool_calls": float(conversation.calls), "failed_tool_calls": float(conversation.failures)}
        return _Said(valid(plain(conversation.messages)), facts, valid_parts(conversation.messages))

    asked = [problem.messages or [{"role": "user", "content": problem.prompt}] for problem in problems]
    return [[said(c) for c in row] for row in converse(generator, tools, asked, samples, longest, sampling, seed)]


def _played(generator: Generator, game: Game, problems: list[Problem], seed: int, sampling: Sampling) -> list[Episode]:
    if not isinstance(generator, TransformersGenerator):
        raise TypeError(f"task {game.name!r} is a game: it is played with a TransformersGenerator")
    model, tokenizer = generator.model, generator.tokenizer

    def episodes_of(batch: Sequence[Problem], tick: Callable[[float], None]) -> list[Episode]:
        return play(
            model,
            tokenizer,
            game,
            batch,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            batch_size=len(batch),
            tick=tick,
        )

    # As if every observation were as long as the first.
    said = max(len(problem.prompt) for problem in problems)
    tokens = said + game.max_turns * (said + game.max_action_tokens)
    return generator.draw(problems, episodes_of, seed, tokens, LARGEST_BATCH_OF_EPISODES, logit_rows=said)
