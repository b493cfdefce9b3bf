"""The token batch that methods read and rewrite: `Tokens`, and `TokenStats`, what kernels know of each token.

Tokens are packed: a batch is the N tokens that the policy wrote, one after the other. Padding and the words of an
environment are not there, so that a mean is a mean and nothing needs a mask.

Dimension key, used in every signature: P prompts, G group, B responses (= P G), N model tokens of all, T columns
of a padded batch, V vocabulary, D hidden width.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


class TokenStats(NamedTuple):
    """Statistics of the policy at each sampled token, in nats, all of the tempered distribution p.

    logp         log p_a, the only field that carries a gradient
    entropy      H = -Σ_v p_v log p_v
    sum_p2       Σ_v p_v²
    sum_p2_logp  Σ_v p_v² log p_v
    sensitivity  T = C - S_a: dH per unit of policy-gradient step with advantage 1
    sampled      S_a = p_a (log p_a + H)
    correction   C = Σ_v p_v² (log p_v + H) >= 0
    """

    logp: Tensor
    entropy: Tensor
    sum_p2: Tensor
    sum_p2_logp: Tensor
    sensitivity: Tensor
    sampled: Tensor
    correction: Tensor


PER_RESPONSE = ("reward", "group", "sample_id")


@dataclass(frozen=True, eq=False)
class Tokens:
    """The N model tokens of B responses, response by response. A column that was not computed is None.

    response     the index of each token's response, from 0 to B - 1
    position     the token's place in its response, from 0; tokens of an environment are counted
    advantages   A, one value per token (a response's advantage repeated)
    logp         log p_a under the current policy, old_logp under the policy that sampled
    entropy, sensitivity   H and T, as in TokenStats
    exact_sensitivity   N T*, what the token does to the mean entropy of the N model tokens through all parameters
                 (diagnostics/exact.py), on the scale of T: equal to it where no parameter is shared
    importance   w, what the loss leaves of the policy gradient: the importance ratio while the clip lets it
                 live, 0 where it does not, times a rollout engine's correction. None means 1 everywhere
    reward, group, sample_id   one value per response
    entropy_bonus, ratio_penalty   β and κ of the loss terms -β H and κ |log r| of each token, whose H and r are those
                 of the loss's own forward pass. None means no such term
    index        where a method dropped tokens: which of the batch's these are. None: all of them
    """

    response: Int[Tensor, " N"]
    position: Int[Tensor, " N"]
    advantages: Float[Tensor, " N"]
    logp: Float[Tensor, " N"] | None = None
    old_logp: Float[Tensor, " N"] | None = None
    entropy: Float[Tensor, " N"] | None = None
    sensitivity: Float[Tensor, " N"] | None = None
    exact_sensitivity: Float[Tensor, " N"] | None = None
    importance: Float[Tensor, " N"] | None = None
    reward: Float[Tensor, " B"] | None = None
    group: Int[Tensor, " B"] | None = None
    sample_id: Int[Tensor, " B"] | None = None
    entropy_bonus: Float[Tensor, " N"] | None = None
    ratio_penalty: Float[Tensor, " N"] | None = None
    index: Int[Tensor, " N"] | None = None

    def __post_init__(self) -> None:
        count = {False: len(self.response), True: None}
        for field in fields(self):
            value, of_response = getattr(self, field.name), field.name in PER_RESPONSE
            if value is None:
                continue
            if count[of_response] is None:
                count[of_response] = len(value)
            if value.shape != (count[of_response],):
                raise ValueError(
                    f"Tokens: {field.name} has shape {tuple(value.shape)}; expected ({count[of_response]},), one value "
                    f"per {'response' if of_response else 'token'}: Tokens.pack takes padded columns"
                )

    @classmethod
    def pack(cls, mask: Bool[Tensor, "B T"], advantages: Float[Tensor, "..."], **columns: Tensor | None) -> "Tokens":
        """The tokens of a padded batch at which `mask` is True: those that the policy itself wrote.

        `advantages` are (B, T), or (B,) and then repeated; every other column of tokens is (B, T), of responses (B,).

        >>> Tokens.pack(torch.tensor([[True, False, True], [True, False, False]]), torch.tensor([0.5, -0.5])).position
        tensor([0, 2, 0])
        """
        if advantages.dim() == 1:
            advantages = advantages[:, None].expand(-1, mask.shape[1])
        response, position = mask.nonzero().unbind(1)
        packed: dict[str, Any] = {}
        for name, column in {"advantages": advantages, **columns}.items():
            expected = mask.shape[:1] if name in PER_RESPONSE else mask.shape
            if column is not None and column.shape != expected:
                raise ValueError(
                    f"Tokens.pack: {name} has shape {tuple(column.shape)}, the mask has {tuple(mask.shape)}; expected "
                    f"{tuple(expected)}"
                )
            packed[name] = column if column is None or name in PER_RESPONSE else column[mask]
        return cls(response, position, **packed)

    def unpack(self, values: Shaped[Tensor, " N"], shape: tuple[int, int], fill: float = 0) -> Shaped[Tensor, "B T"]:
        """One value per token as a padded (B, T) matrix of that shape, `fill` where there is no token of these."""
        padded = values.new_full(shape, fill)
        padded[self.response, self.position] = values
        return padded

    @property
    def responses(self) -> int:
        """B, as far as it is known: without a column of responses, those up to the last that has a token."""
        known = next((column for name in PER_RESPONSE if (column := getattr(self, name)) is not None), None)
        if known is not None:
            return len(known)
        return int(self.response.max()) + 1 if len(self.response) else 0

    def require(self, name: str) -> Tensor:
        """The column `name`. Raises ValueError if it was not computed."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"the token column {name!r} is needed but was not computed")
        return value

    def detach(self) -> "Tokens":
        """The same tokens without gradient: what transforms work on."""
        return self._map(Tensor.detach, Tensor.detach)

    def select(self, keep: Bool[Tensor, " N"]) -> "Tokens":
        """The tokens where `keep` is True, of the same responses; `index` says which of the batch's they are."""
        if keep.all():
            return self
        kept = self._map(lambda column: column[keep], lambda column: column)
        return kept if self.index is not None else replace(kept, index=keep.nonzero().flatten())

    def of_responses(self, rows: Int[Tensor, " R"]) -> "Tokens":
        """The tokens of these responses, in their order and numbered anew."""
        length = torch.bincount(self.response, minlength=self.responses)
        begin = length.cumsum(0) - length  # of each response among tokens that are sorted by response
        number = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), length[rows])
        within = torch.arange(len(number), device=rows.device)
        within = within - (length[rows].cumsum(0) - length[rows])[number]
        places = self.response.argsort(stable=True)[begin[rows][number] + within]
        return replace(self._map(lambda column: column[places], lambda column: column[rows]), response=number)

    def _map(self, of_tokens: Callable[[Tensor], Tensor], of_responses: Callable[[Tensor], Tensor]) -> "Tokens":
        known = {f.name: column for f in fields(self) if (column := getattr(self, f.name)) is not None}
        changed = {name: (of_responses if name in PER_RESPONSE else of_tokens)(x) for name, x in known.items()}
        return replace(self, **changed)


def concatenate(parts: list[Tokens]) -> Tokens:
    """One part of a batch after the other, their responses numbered on. A column that one of them lacks is None.

    `index` is kept as it is: it is that of the whole batch. Raises ValueError where only some parts have one.
    """
    if len({part.index is None for part in parts}) > 1:
        raise ValueError("concatenate: some parts have an index and others have none; expected all of them or none")
    begins, columns = [0], {}
    for part in parts:
        begins.append(begins[-1] + part.responses)
    for field in fields(Tokens):
        column = [getattr(part, field.name) for part in parts]
        if field.name == "response":
            column = [x + begin for x, begin in zip(column, begins, strict=False)]
        columns[field.name] = None if any(x is None for x in column) else torch.cat(column)
    return Tokens(**columns)


def is_finite(values: Tensor) -> Tensor:
    """Where the values are neither NaN nor infinite, in half the time of torch's own on a CPU."""
    return values.abs() < torch.inf


def finite(values: Tensor) -> Tensor:
    """The values, with 0 where they are NaN or infinite."""
    return values.nan_to_num(0.0, 0.0, 0.0)


def mean(values: Float[Tensor, " N"]) -> Tensor:
    """The mean; 0 for none."""
    return values.sum() / max(1, len(values))


def share_of(holds: Bool[Tensor, " N"]) -> float:
    """The share at which it holds; 0 for none."""
    return holds.count_nonzero().item() / max(1, len(holds))
