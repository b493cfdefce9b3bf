"""Evaluation: sample completions of held-out problems, count successes, and say how sure the numbers are."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from entropy_polarity.tasks import Problem, Task, distinct_problems


def pass_at_k(successes: Int[np.ndarray, " P"], samples: int, k: int) -> Float[np.ndarray, " P"]:
    """The unbiased estimate of the chance that one of k samples is right, per problem.

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
    """A mean with its 95 % bootstrap interval over problems."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Float[np.ndarray, " P"]) -> "Estimate":
        return cls(float(np.mean(values)), *bootstrap_interval(values))

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Evaluation:
    """Successes on held-out problems: pass@k by k, and how often each verdict was given (as a share)."""

    problems: int
    samples: int
    seed: int
    temperature: float
    pass_at: dict[int, Estimate]
    verdicts: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        document = asdict(self)
        document["pass_at"] = {str(k): asdict(e) for k, e in self.pass_at.items()}
        return document


@torch.no_grad()
def sample_completions(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    samples: int,
    max_new_tokens: int,
    temperature: float,
    batch_size: int = 512,
) -> list[list[str]]:
    """`samples` completions of every prompt, sampled at `temperature` from the whole vocabulary."""
    texts: list[str] = []
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    for start in range(0, len(repeated), batch_size):
        batch = tokenizer(repeated[start : start + batch_size], return_tensors="pt", padding=True, padding_side="left")
        ids = batch["input_ids"].to(model.device)
        output = model.generate(
            input_ids=ids,
            attention_mask=batch["attention_mask"].to(model.device),
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts += tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return [texts[i * samples : (i + 1) * samples] for i in range(len(prompts))]


def evaluate(
    model: Any,
    tokenizer: Any,
    task: Task,
    *,
    problems: int = 200,
    samples: int = 16,
    seed: int = 0,
    temperature: float = 1.0,
) -> Evaluation:
    """pass@1, @2, @4, ... @`samples` on the task's test split, with intervals over problems.

    The random state of the caller and the mode of the model are left as they were.
    """
    if problems < 1 or samples < 1:
        raise ValueError(f"evaluate: problems={problems} and samples={samples}; expected at least 1 of each")
    chosen: list[Problem] = distinct_problems(task, seed, "test", problems)
    was_training = model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        prompts = [problem.prompt for problem in chosen]
        completions = sample_completions(model, tokenizer, prompts, samples, task.max_completion_tokens, temperature)
    model.train(was_training)
    verdicts: Counter[str] = Counter()
    successes = np.zeros(problems, dtype=int)
    for row, (problem, texts) in enumerate(zip(chosen, completions, strict=True)):
        scores = [task.score(problem, text) for text in texts]
        verdicts.update(score.reason for score in scores)
        successes[row] = sum(score.reward > 0 for score in scores)
    sizes = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k < samples] + [samples]
    return Evaluation(
        problems,
        samples,
        seed,
        temperature,
        {k: Estimate.of(pass_at_k(successes, samples, k)) for k in sizes},
        {reason: verdicts[reason] / (problems * samples) for reason in task.reasons},
    )
