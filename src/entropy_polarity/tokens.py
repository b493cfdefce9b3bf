"""Per-token facts of a rollout batch: what every other file reads, and nothing that decides.

Dimension key, used in every signature: P prompts, G group, B responses (= P G), T tokens, V vocabulary,
D hidden width.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
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


_PER_RESPONSE = ("reward", "group", "sample_id")


@dataclass(frozen=True)
class Tokens:
    """Aligned facts of one rollout batch (or of some rows of it). What was not computed is None.

    mask         True where the policy itself wrote the token; padding and environment tokens are False
    advantages   A, one value a token (a response's advantage repeated)
    logp         log p_a under the current policy, old_logp under the policy that sampled
    entropy, sum_p2, sum_p2_logp, sensitivity   as in TokenStats
    exact_sensitivity   N T*, what the token does to the mean entropy of the N model tokens through all parameters
                 (exact.py), on the scale of T: equal to it where no parameter is shared
    importance   w, what the loss leaves of the policy gradient: the importance ratio while the clip lets it
                 live, 0 where it does not, times a rollout engine's correction. None means 1 everywhere
    reward, group, sample_id   one value a response
    entropy_bonus, ratio_penalty   β and κ of the loss terms -β H and κ |log r| of each token, whose H and r are those
                 of the loss's own forward pass. None means no such term
    """

    mask: Bool[Tensor, "B T"]
    advantages: Float[Tensor, "B T"]
    logp: Float[Tensor, "B T"] | None = None
    old_logp: Float[Tensor, "B T"] | None = None
    entropy: Float[Tensor, "B T"] | None = None
    sum_p2: Float[Tensor, "B T"] | None = None
    sum_p2_logp: Float[Tensor, "B T"] | None = None
    sensitivity: Float[Tensor, "B T"] | None = None
    exact_sensitivity: Float[Tensor, "B T"] | None = None
    importance: Float[Tensor, "B T"] | None = None
    reward: Float[Tensor, " B"] | None = None
    group: Int[Tensor, " B"] | None = None
    sample_id: Int[Tensor, " B"] | None = None
    entropy_bonus: Float[Tensor, "B T"] | None = None
    ratio_penalty: Float[Tensor, "B T"] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            expected = self.mask.shape[:1] if field.name in _PER_RESPONSE else self.mask.shape
            if value is not None and value.shape != expected:
                raise ValueError(
                    f"Tokens: {field.name} has shape {tuple(value.shape)}, the mask has {tuple(self.mask.shape)}; "
                    f"expected {tuple(expected)}: every field describes the same responses"
                )

    def require(self, name: str) -> Tensor:
        """The field `name`. Raises ValueError if it was not computed."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"the token facts {name!r} are needed but were not computed")
        return value

    def detach(self) -> "Tokens":
        """The same facts without gradient: what transforms work on."""
        return self._map(Tensor.detach)

    def rows(self, index: Int[Tensor, " N"] | slice) -> "Tokens":
        """The same facts for some of the responses."""
        return self._map(lambda column: column[index])

    def cut(self, width: int) -> "Tokens":
        """The same facts for the first `width` positions."""
        return self._map(lambda column: column[:, :width] if column.dim() == 2 else column)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Tokens":
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: change(column) for name, column in columns.items() if column is not None})


def concatenate(parts: list[Tokens]) -> Tokens:
    """Join batches along the responses; shorter ones are padded with masked zeros to the longest."""
    width = max(part.mask.shape[1] for part in parts)

    def join(name: str) -> Tensor | None:
        columns = [getattr(part, name) for part in parts]
        if any(column is None for column in columns):
            return None
        return torch.cat(
            [
                torch.nn.functional.pad(column, (0, width - column.shape[1])) if column.dim() == 2 else column
                for column in columns
            ]
        )

    return Tokens(**{f.name: join(f.name) for f in fields(Tokens)})  # type: ignore[arg-type]


def masked_mean(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Tensor:
    """Mean of `values` where `mask` is True; 0 for an empty mask. What is masked out may be NaN."""
    return torch.where(mask, values, 0.0).sum() / mask.count_nonzero().clamp(min=1)


def masked_fraction(holds: Bool[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> float:
    """The share of the places where `mask` is True at which `holds` is; 0 for an empty mask."""
    return ((holds & mask).count_nonzero() / mask.count_nonzero().clamp(min=1)).item()


def is_finite(values: Tensor) -> Tensor:
    """Where the values are neither NaN nor infinite, in half the time of torch's own on a CPU."""
    return values.abs() < torch.inf


def finite(values: Tensor) -> Tensor:
    """The values, with 0 where they are NaN or infinite."""
    return values.nan_to_num(0.0, 0.0, 0.0)
