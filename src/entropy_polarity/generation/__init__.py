"""Completions of prompts, written by a `Generator`: transformers (sampling.py) or vLLM (vllm.py)."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable


class Sampling(NamedTuple):
    """How tokens are drawn: from softmax(logits / temperature), cut to the smallest set of tokens whose probabilities
    sum to at least `top_p`; the likeliest token at temperature 0."""

    temperature: float = 1.0
    top_p: float = 1.0


GREEDY = Sampling(temperature=0.0)


# What is being done, how much of it is done, of how much.
Progress = Callable[[str, float, int], None]
Tick = Callable[[float], None]  # The share of a batch that is made.


def silent(what: str, done: float, total: int) -> None:
    """A `Progress` that shows nothing."""


@runtime_checkable
class Generator(Protocol):
    """A policy that completes prompts, from token ids to token ids.

    `batch_sizes` are those that it used so far, in order, an entry for each change; `context` is how many tokens it can
    read, where that is known. `watch(done, total)`, where it is set, is told how many completions are made; a generator
    that shows its progress itself need not call it.
    """

    tokenizer: Any
    batch_sizes: list[int]
    context: int | None
    watch: Callable[[float, int], None] | None

    def complete(
        self, prompts: Sequence[list[int]], samples: int, max_new_tokens: int, sampling: Sampling, seed: int
    ) -> list[list[list[int]]]:
        """`samples` completions of every prompt, each up to and with the token that ends it, if it came to one."""
        ...
