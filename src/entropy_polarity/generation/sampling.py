"""Completions sampled by transformers, in batches that fit in memory."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from entropy_polarity.generation import Sampling, Tick
from entropy_polarity.generation.memory import Item, Made, first_size, in_batches
from entropy_polarity.support.modes import evaluating

LARGEST_BATCH = 512


class Sampled(NamedTuple):
    """Completions as token ids, padded on the right; prompts padded on the left, `prompt_mask` 0 at their padding."""

    prompt_ids: Int[Tensor, "B P"]
    prompt_mask: Int[Tensor, "B P"]
    completion_ids: Int[Tensor, "B T"]


class _Ticking(StoppingCriteria):
    """Stops nothing: `tick(share)` is called with each token, with the share of `longest` that is written."""

    def __init__(self, tick: Tick, longest: int) -> None:
        self.tick, self.longest, self.written = tick, longest, 0

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.written += 1
        self.tick(self.written / self.longest)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def sample_tokens(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    tick: Tick = lambda share: None,
) -> Sampled:
    """One completion of every prompt. What a model's own generation settings would add (penalties, top-k) is off.

    `tick(share)` is called with each token, with the share of `max_new_tokens` that is written.
    """
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    missing = [max(map(len, prompts)) - len(prompt) for prompt in prompts]
    padded = [[pad] * count + list(prompt) for count, prompt in zip(missing, prompts, strict=True)]
    masks = [[0] * count + [1] * len(prompt) for count, prompt in zip(missing, prompts, strict=True)]
    ids, mask = torch.tensor(padded, device=model.device), torch.tensor(masks, device=model.device)
    drawn = sampling.temperature > 0
    settings = (
        {"temperature": sampling.temperature, "top_k": 0, "top_p": sampling.top_p, "min_p": None} if drawn else {}
    )
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=drawn,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        repetition_penalty=1.0,
        stopping_criteria=StoppingCriteriaList([_Ticking(tick, max_new_tokens)]),
        **settings,
    )
    return Sampled(ids, mask, output[:, ids.shape[1] :])


class TransformersGenerator:
    """A `Generator` of a transformers model, whose mode and the caller's random state are left as they were.

    All samples of all prompts are one list, cut into batches that draw, one after the other, from a stream that starts
    at the seed: the same seed and batch sizes give the same texts on one machine, other sizes other draws of the same
    distribution. The first size is `batch_size`, or an estimate of what fits; see `in_batches`.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int | None = None) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.batch_sizes: list[int] = []
        self.watch: Callable[[float, int], None] | None = None
        self.context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def complete(
        self, prompts: Sequence[list[int]], samples: int, max_new_tokens: int, sampling: Sampling, seed: int
    ) -> list[list[list[int]]]:
        def completions_of(batch: Sequence[list[int]], tick: Tick) -> list[list[int]]:
            sampled = sample_tokens(self.model, self.tokenizer, batch, max_new_tokens, sampling, tick)
            return [_ended(row, self._ends) for row in sampled.completion_ids.tolist()]

        longest = max(map(len, prompts), default=0)
        return self.draw(prompts, samples, completions_of, seed, longest + max_new_tokens, LARGEST_BATCH)

    @property
    def _ends(self) -> set[int]:
        """The tokens after which `generate` writes padding."""
        ends = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        return {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    def draw(
        self,
        prompts: Sequence[Item],
        samples: int,
        run: Callable[[Sequence[Item], Tick], list[Made]],
        seed: int,
        tokens: int,
        largest: int,
        logit_rows: int = 1,
    ) -> list[list[Made]]:
        """What `run(batch, tick)` makes of `samples` copies of every prompt, batch by batch from the random state of
        `seed`; it calls tick with the share of the batch that is made. The other arguments are those of `first_size`.
        """
        items, done = [prompt for prompt in prompts for _ in range(samples)], 0

        def watched(batch: Sequence[Item]) -> list[Made]:
            nonlocal done

            def tick(share: float) -> None:
                if self.watch is not None:
                    self.watch(done + min(share, 1.0) * len(batch), len(items))

            made = run(batch, tick)
            tick(1.0)
            done += len(made)
            return made

        if not self.batch_sizes:
            self.batch_sizes.append(self.batch_size or first_size(self.model, tokens, largest, logit_rows))
        with evaluating(self.model), torch.random.fork_rng():
            torch.manual_seed(seed)
            made, sizes = in_batches(items, self.batch_sizes[-1], watched)
        self.batch_sizes += sizes[1:]
        return [made[start : start + samples] for start in range(0, len(made), samples)]


def _ended(completion: list[int], ends: set[int]) -> list[int]:
    """The completion up to and with the first token that ends it."""
    length = next((i + 1 for i, token in enumerate(completion) if token in ends), len(completion))
    return completion[:length]
