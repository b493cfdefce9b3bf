"""Evaluation: have a policy attempt held-out problems, and count successes problem by problem."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from entropy_polarity.generation import GREEDY, Generator, Progress, Sampling, silent
from entropy_polarity.generation.attempts import Attempt, attempting
from entropy_polarity.generation.episodes import mean_counts
from entropy_polarity.generation.sampling import TransformersGenerator
from entropy_polarity.statistics.intervals import RATE, Estimate
from entropy_polarity.statistics.success import maj_at_k, pass_at_k
from entropy_polarity.tasks import Problem, Task, distinct_problems


@dataclass(frozen=True)
class Attempts:
    """A policy's attempts at some problems: `sampled` has a row of samples for each, `greedy` one attempt.

    `voted` says whether they have final answers, over which a majority can be counted.
    """

    problems: list[Problem]
    sampled: list[list[Attempt]]
    greedy: list[Attempt]
    voted: bool = False

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

    def counts(self) -> dict[str, Float[np.ndarray, " P"]]:
        """What environments and tools counted, the mean over the samples of each problem; NaN where none has it."""
        means = [mean_counts(attempt.counts for attempt in row) for row in self.sampled]
        names = dict.fromkeys(name for found in means for name in found)
        return {name: np.array([found.get(name, np.nan) for found in means]) for name in names}

    def measures(self) -> dict[str, Float[np.ndarray, " P"]]:
        """One value per problem of each measure: avg@n, pass@k, maj@k where there are votes, greedy, reward."""
        n, successes = self.samples, np.array(self.successes)
        sizes = sizes_up_to(n)
        found = {f"avg@{n}": successes / n} | {f"pass@{k}": pass_at_k(successes, n, k) for k in sizes}
        if self.voted:
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
    by token, is right, and `greedy_pass` their mean. With both, runs can be compared problem by problem. `counts` are
    the means over the samples of what environments and tools count, of a game the number of turns among them.
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
    counts: dict[str, Estimate] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        document = asdict(self)
        document["facts"] = document.pop("counts")  # as in the files of earlier versions
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
    task: Task,
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
    if problems < 1 or samples < 1:
        raise ValueError(f"evaluate: problems={problems} and samples={samples}; expected at least 1 of each")
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
        {name: Estimate.of(values[~np.isnan(values)]) for name, values in made.counts().items()},
    )


def attempt(
    generator: Generator,
    task: Task,
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

    With `final_answers` those of completions are kept, to be voted on. `progress` is told of samples, greedy answers
    and verdicts as they are made. Raises TypeError for a game and a generator that cannot play it.
    """
    way = attempting(generator, task)
    voted = final_answers and way.voted
    sampled = way.attempts(problems, samples, seed, sampling, voted, progress)
    if greedy is None:
        greedy = [first for (first,) in way.attempts(problems, 1, seed, GREEDY, voted, progress)]
    return Attempts(problems, sampled, greedy, voted)


def warn_before(
    generator: Generator,
    task: Task,
    problems: list[Problem],
    say: Callable[[str], None],
    label: str = "the policy",
) -> None:
    """Say so where a policy cannot read the problems of a task."""
    if (why := attempting(generator, task).why_unreadable(problems)) is not None:
        say(f"warning: {label}: {why}")


def warn_after(made: Attempts, say: Callable[[str], None], label: str = "the policy") -> None:
    """Say so where all samples got the same verdict and none a reward: most often nothing that could be judged."""
    scores = [attempt.score for row in made.sampled for attempt in row]
    reasons = {score.reason for score in scores}
    if len(reasons) == 1 and not any(score.reward > 0 for score in scores):
        say(f"warning: {label}: all {len(scores):,} attempts were judged {reasons.pop()!r}: look at what it answers")
