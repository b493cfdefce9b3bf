"""verl's batch as packed Tokens, and values of tokens back in verl's forms.

verl's driver has a padded batch (B, width), and what the workers send is nested, B rows of unequal length. Both are
read row by row, as far as a response goes, so that time and memory grow with the tokens and not with the padding.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from entropy_polarity.tokens import Tokens
from entropy_polarity.trainers.verl.workers import ENTROPY, SENSITIVITY


class Packing(NamedTuple):
    """Where the model's tokens stand in a batch of verl's.

    lengths   of the responses, in tokens, with what an environment said
    places    those of the model's tokens among the tokens of all responses, one response after the other; None: all
    """

    lengths: list[int]
    places: Tensor | None = None

    @classmethod
    def of(cls, mask: Tensor, lengths: list[int]) -> "Packing":
        """The packing of a padded response mask (B, width). Raises RuntimeError where the responses are not that
        long."""
        if min(lengths) >= 0 and max(lengths) == mask.shape[1]:
            model = torch.cat([row[:n] != 0 for row, n in zip(mask, lengths, strict=True)])
            written = int(model.count_nonzero())
            if written == int(mask.count_nonzero()):
                return cls(lengths, None if written == len(model) else model.nonzero().flatten())
        raise RuntimeError(
            "entropy-polarity: the tags response_len are not the lengths of the responses: whatever puts rollouts into "
            "TransferQueue has to write them, as verl's own agent loop does"
        )

    def tokens(self, batch: Any, statistics: Mapping[str, Any], keys: list[str]) -> Tokens:
        """The model's tokens of verl's padded `batch`, with the nested `statistics` of the workers."""
        # verl's keys are {prompt}_{session}_{output}
        parts = [(prompt, int(session), int(output)) for prompt, session, output in (k.rsplit("_", 2) for k in keys)]
        number = {prompt: i for i, prompt in enumerate(sorted({prompt for prompt, _, _ in parts}))}
        rank = {part: i for i, part in enumerate(sorted(parts))}
        importance = batch.get("rollout_is_weights")
        place = torch.arange(max(self.lengths), dtype=torch.int32)

        def model(column: Tensor) -> Tensor:
            return column if self.places is None else column[self.places]

        return Tokens(
            response=model(torch.from_numpy(np.repeat(np.arange(len(keys), dtype=np.int32), self.lengths))),
            position=model(torch.cat([place[:n] for n in self.lengths])),
            advantages=model(self.of_padded(batch["advantages"])),
            logp=(logp := model(self.of_padded(batch["old_log_probs"]))),
            old_logp=logp,
            entropy=model(self.of_nested(statistics[ENTROPY])),
            sensitivity=model(self.of_nested(statistics[SENSITIVITY])),
            importance=None if importance is None else model(self.of_padded(importance)),
            reward=torch.stack([row[:n].sum() for row, n in zip(batch["rm_scores"], self.lengths, strict=True)]),
            group=torch.tensor([number[prompt] for prompt, _, _ in parts]),
            sample_id=torch.tensor([rank[part] for part in parts]),
        )

    def of_padded(self, column: Tensor) -> Tensor:
        """A padded column (B, width) as one value per token of the responses."""
        return torch.cat([row[:n] for row, n in zip(column, self.lengths, strict=True)])

    def of_nested(self, column: Any) -> Tensor:
        """What the engines made, prompt and response long, each value one place before its token, likewise."""
        values, ends = column.values(), column.offsets()[1:].tolist()
        return torch.cat([values[end - 1 - n : end - 1] for end, n in zip(ends, self.lengths, strict=True)])

    def spread(self, values: Tensor, tokens: Tokens, others: Tensor | None = None) -> Tensor:
        """The values of `tokens`, of which a method may have dropped some, as one value per token of the responses. All
        the others have that of `others`, a padded column, or 0."""
        places = self.places
        if tokens.index is not None:
            places = tokens.index if places is None else places[tokens.index]
        if places is None:
            return values
        spread = values.new_zeros(sum(self.lengths)) if others is None else self.of_padded(others)
        return spread.index_copy_(0, places, values)

    def padded(self, values: Tensor, memory: Tensor) -> Tensor:
        """One value per token of the responses as a padded column, in the memory of another one."""
        if memory.dtype != values.dtype:
            memory = torch.zeros_like(memory, dtype=values.dtype)
        for row, part in zip(memory, values.split(self.lengths), strict=True):
            row[: len(part)] = part
        return memory

    def nested(self, values: Tensor) -> Tensor:
        """One value per token of the responses as a nested column."""
        return torch.nested.nested_tensor_from_jagged(values, torch.tensor([0, *self.lengths]).cumsum(0))
