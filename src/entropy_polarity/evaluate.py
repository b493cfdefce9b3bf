"""Evaluation: sample completions of held-out problems, count successes, and say how sure the numbers are.

The statistics stand first, pure functions of numbers; sampling from a policy comes after them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from entropy_polarity.episodes import mean_facts, play
from entropy_polarity.tasks import Messages, Problem, Score, Task, distinct_problems
from entropy_polarity.tasks.games import Game
from entropy_polarity.tasks.prompts import encoded, for_tokenizer


def pass_at_k(successes: Int[np.ndarray, "*P"], samples: int, k: int) -> Float[np.ndarray, "*P"]:
    """The unbiased estimate of the chance that one of k samples is right, for each problem.

        pass@k = 1 - C(n - c, k) / C(n, k)        n samples, c of them right

    computed as a product, so that no binomial overflows. Raises ValueError unless 1 <= k <= samples and
    0 <= c <= n. Source: Chen et al., arXiv 2107.03374.

    >>> pass_at_k(np.array([0, 1, 4]), samples=4, k=2)
    array([0. , 0.5, 1. ])
    """
    successes = np.asarray(successes)
    if not 1 <= k <= samples:
        raise ValueError(f"pass_at_k: k is {k}; expected a number from 1 to the {samples} samples")
    if successes.size and (successes.min() < 0 or successes.max() > samples):
        raise ValueError(f"pass_at_k: successes must lie in [0, {samples}], got {successes.min()}..{successes.max()}")
    # C(n-c, k) / C(n, k) = Π_{i<k} (n - c - i) / (n - i)
    factors = [np.clip(samples - successes - i, 0, None) / (samples - i) for i in range(k)]
    return 1.0 - np.prod(factors, axis=0)


def bootstrap_interval(
    values: Float[np.ndarray, " P"], level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean over problems. Source: Efron 1979.

    >>> low, high = bootstrap_interval(np.array([0.0, 1.0] * 50))
    >>> low < 0.5 < high
    True
    """
    values = np.asarray(values, dtype=float)
    if values.size == 0:
        raise ValueError("bootstrap_interval: no values; expected one a problem")
    picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    tail = (1 - level) / 2
    low, high = np.quantile(values[picks].mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class Estimate:
    """A mean, or a difference of means, with its interval; 95 % unless another level was asked for."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Float[np.ndarray, " P"]) -> "Estimate":
        """The mean over problems with its bootstrap interval."""
        return cls(float(np.mean(values)), *bootstrap_interval(values))

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def paired_bootstrap(
    a: Float[np.ndarray, "S P"], b: Float[np.ndarray, "S P"], draws: int = 2000, level: float = 0.95, seed: int = 0
) -> Estimate:
    """The mean of a - b over seeds and problems, with the percentile interval of a crossed bootstrap.

    Row s of both is the same seed, column p the same problem. Every draw resamples S seeds and, on its own, P
    problems, and takes both methods at the same places:

        difference* = Σ_s Σ_p u_s v_p (a_sp - b_sp)        u ~ Multinomial(S, 1/S) / S,  v ~ Multinomial(P, 1/P) / P

    so that problems hard for every seed and seeds good on every problem both count. Where noise of single answers
    rules, it is wider than need be; of a handful of seeds it shows too little spread, of one none at all: read it
    beside `t_interval`. Raises ValueError unless the shapes agree and none is empty. Source: Owen, "The pigeonhole
    bootstrap", Annals of Applied Statistics 2007.

    >>> paired_bootstrap(np.array([[1.0, 1.0], [1.0, 1.0]]), np.array([[0.0, 0.5], [0.0, 0.5]])).value
    0.75
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape or a.ndim != 2 or a.size == 0:
        raise ValueError(f"paired_bootstrap: shapes {a.shape} and {b.shape}; expected one (seeds, problems) for both")
    (S, P), rng = a.shape, np.random.default_rng(seed)
    seeds = rng.multinomial(S, np.full(S, 1 / S), size=draws) / S
    problems = rng.multinomial(P, np.full(P, 1 / P), size=draws) / P
    means = ((seeds @ (a - b)) * problems).sum(axis=1)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Estimate(float((a - b).mean()), float(low), float(high))


def t_interval(differences: Float[np.ndarray, " S"], level: float = 0.95) -> Estimate:
    """The mean of one difference a seed, with Student's interval: mean ± t sd / √S, S - 1 degrees of freedom.

    It asks how sure the mean is for other seeds on these problems, taking differences as normal; it stays honest for
    a handful of seeds. Raises ValueError for fewer than two. Source: Student 1908.

    >>> print(t_interval(np.array([1.0, 2.0, 3.0])))
    2.000 [-0.484, 4.484]
    """
    differences = np.asarray(differences, dtype=float)
    if len(differences) < 2:
        raise ValueError(f"t_interval: {len(differences)} differences; a spread over seeds needs at least two")
    mean, error = differences.mean(), differences.std(ddof=1) / np.sqrt(len(differences))
    half = t_quantile(level, len(differences) - 1) * error
    return Estimate(float(mean), float(mean - half), float(mean + half))


def t_quantile(level: float, freedom: int) -> float:
    """The t with P(|T| <= t) = level, for T of Student's distribution with that many degrees of freedom.

    With θ = atan(t / √ν) the probability is a finite sum, inverted here by bisection of θ:

        ν even:  sin θ · Σ_i c_i cos^2i θ                    i < ν/2,      c_0 = 1, c_i = c_{i-1} (2i - 1) / 2i
        ν odd:   (θ + sin θ · Σ_i c_i cos^(2i+1) θ) · 2/π    i < (ν-1)/2,  c_0 = 1, c_i = c_{i-1} 2i / (2i + 1)

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4.

    >>> round(t_quantile(0.95, 2), 3)
    4.303
    """
    if not (0 < level < 1 and freedom >= 1):
        raise ValueError(f"t_quantile: level={level}, freedom={freedom}; expected 0 < level < 1 and at least 1")
    odd = freedom % 2
    i = np.arange(1, (freedom - odd) // 2)
    c = np.cumprod(np.concatenate([[1.0], (2 * i - 1 + odd) / (2 * i + odd)]))[: (freedom - odd) // 2]
    powers = 2 * np.arange(len(c)) + odd
    low, high = 0.0, np.pi / 2
    for _ in range(60):  # to the last bit of θ
        middle = (low + high) / 2
        inside = np.sin(middle) * (c * np.cos(middle) ** powers).sum()
        inside = (middle + inside) * 2 / np.pi if odd else inside
        low, high = (middle, high) if inside < level else (low, middle)
    return float(np.sqrt(freedom) * np.tan((low + high) / 2))


def area_under_curve(values: Float[np.ndarray, " K"]) -> float:
    """The area under a curve of one value a rollout, divided by its length: (1/K) Σ_k values_k.

    Of rewards it is the mean reward of all that was sampled in training: it grows with a higher end and with a
    faster way to it.
    """
    return float(np.mean(values))


def moving_average(values: Float[np.ndarray, " K"], window: int) -> Float[np.ndarray, " M"]:
    """Means over every `window` values in a row, K - window + 1 of them; over all values where there are fewer.

    >>> moving_average(np.array([1.0, 2.0, 3.0, 4.0]), window=3)
    array([2., 3.])
    """
    values = np.asarray(values, dtype=float)
    window = min(window, len(values))
    return np.convolve(values, np.full(window, 1 / window), mode="valid")


def steps_to_reach(steps: Sequence[int], values: Float[np.ndarray, " K"], level: float, window: int = 10) -> int | None:
    """The first of `steps` at which the moving average over `window` rollouts reaches `level`; None if it never does.

    Only whole windows count: a lucky first rollout reaches nothing.

    >>> steps_to_reach([1, 3, 5, 7], np.array([0.0, 0.2, 0.4, 0.4]), level=0.3, window=2)
    5
    """
    averages = moving_average(values, window)
    # A baseline must reach its own best, whatever the rounding of the sums.
    reached = np.flatnonzero(averages >= level - 1e-9)
    return int(steps[len(steps) - len(averages) + reached[0]]) if reached.size else None


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


class Sampled(NamedTuple):
    """Completions as token ids, padded on the right; prompts padded on the left, `prompt_mask` 0 at their padding."""

    prompt_ids: Int[Tensor, "B P"]
    prompt_mask: Int[Tensor, "B P"]
    completion_ids: Int[Tensor, "B T"]


@torch.no_grad()
def sample_tokens(
    model: Any, tokenizer: Any, prompts: Sequence[str | Messages], max_new_tokens: int, temperature: float
) -> Sampled:
    """One completion of every prompt, sampled at `temperature` from the whole vocabulary; greedy at 0."""
    batch = encoded(prompts, tokenizer)
    ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=temperature > 0,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    return Sampled(ids, mask, output[:, ids.shape[1] :])


def sample_completions(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Messages],
    samples: int,
    max_new_tokens: int,
    temperature: float,
    batch_size: int = 512,
) -> list[list[str]]:
    """The texts of `samples` completions of every prompt, sampled as `sample_tokens` does."""
    texts: list[str] = []
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    for start in range(0, len(repeated), batch_size):
        sampled = sample_tokens(model, tokenizer, repeated[start : start + batch_size], max_new_tokens, temperature)
        texts += tokenizer.batch_decode(sampled.completion_ids, skip_special_tokens=True)
    return [texts[i * samples : (i + 1) * samples] for i in range(len(prompts))]


def evaluate(
    model: Any,
    tokenizer: Any,
    task: Task | Game,
    *,
    problems: int = 200,
    samples: int = 16,
    seed: int = 0,
    temperature: float = 1.0,
) -> Evaluation:
    """pass@1, @2, @4, ... @`samples` and of the greedy answer, on the task's test split, with intervals over problems.

    The random state of the caller and the mode of the model are left as they were.
    """
    if problems < 1 or samples < 1:
        raise ValueError(f"evaluate: problems={problems} and samples={samples}; expected at least 1 of each")
    chosen: list[Problem] = distinct_problems(task, seed, "test", problems)
    was_training = model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        scores, facts = _judged(model, tokenizer, task, chosen, samples, temperature)
        likeliest, _ = _judged(model, tokenizer, task, chosen, 1, 0.0)
    model.train(was_training)
    verdicts = Counter(score.reason for row in scores for score in row)
    successes = np.array([sum(score.reward >= 1 for score in row) for row in scores])
    greedy = np.array([int(score.reward >= 1) for (score,) in likeliest])
    sizes = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k < samples] + [samples]
    return Evaluation(
        problems,
        samples,
        seed,
        temperature,
        {k: Estimate.of(pass_at_k(successes, samples, k)) for k in sizes},
        Estimate.of(greedy.astype(float)),
        {reason: verdicts[reason] / (problems * samples) for reason in task.reasons},
        successes.tolist(),
        greedy.tolist(),
        facts,
    )


def _judged(
    model: Any, tokenizer: Any, task: Task | Game, problems: list[Problem], samples: int, temperature: float
) -> tuple[list[list[Score]], dict[str, Estimate]]:
    """The scores of `samples` completions, or episodes, of each problem; and of episodes what was counted in them."""
    if isinstance(task, Game):
        repeated = [problem for problem in problems for _ in range(samples)]
        episodes = play(model, tokenizer, task, repeated, temperature=temperature)
        found = [Score(episode.reward, episode.reason) for episode in episodes]
        means = [mean_facts(episodes[i * samples : (i + 1) * samples]) for i in range(len(problems))]
        names = dict.fromkeys(name for found_in in means for name in found_in)
        facts = {name: Estimate.of(np.array([m[name] for m in means if name in m])) for name in names}
    else:
        prompts = [for_tokenizer(problem, tokenizer) for problem in problems]
        texts = sample_completions(model, tokenizer, prompts, samples, task.max_completion_tokens, temperature)
        rows = zip(problems, texts, strict=True)
        found, facts = task.scores([(problem, text) for problem, row in rows for text in row]), {}
    return [found[i * samples : (i + 1) * samples] for i in range(len(problems))], facts
