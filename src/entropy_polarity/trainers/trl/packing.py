"""From TRL's padded batches to packed tokens, and what a method made of the tokens back into the batch."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from entropy_polarity.tokens import Tokens
from entropy_polarity.trainers.loss_terms import BONUS, PENALTY

# Extra columns that travel with TRL's batch through its shuffle and split, one value per response.
REWARD, GROUP, SAMPLE_ID = "polarity_reward", "polarity_group", "polarity_sample_id"
# Where a method dropped tokens from the loss: all that the policy wrote, (B, T).
WRITTEN = "polarity_model_tokens"


def loss_mask(inputs: dict[str, Any]) -> Bool[Tensor, "B T"]:
    """The tokens that TRL's loss is about."""
    mask = inputs["completion_mask"].bool()
    return mask & inputs["tool_mask"].bool() if "tool_mask" in inputs else mask


def at(tokens: Tokens, padded: Shaped[Tensor, "B ..."]) -> Shaped[Tensor, " N"]:
    """The values of a padded column at the tokens: of (B, T), or of (B,) or (B, 1) repeated over each response."""
    if padded.dim() == 1 or padded.size(1) == 1:
        return padded.flatten()[tokens.response]
    return padded[tokens.response, tokens.position]


def packed(inputs: dict[str, Any], **columns: Float[Tensor, "B T"] | None) -> Tokens:
    """The tokens of a batch that the policy wrote, dropped ones too, with these padded columns and the batch's own."""
    return Tokens.pack(
        inputs[WRITTEN] if WRITTEN in inputs else loss_mask(inputs),
        inputs["advantages"],
        reward=inputs.get(REWARD),
        group=inputs.get(GROUP),
        sample_id=inputs.get(SAMPLE_ID),
        entropy_bonus=inputs.get(BONUS),
        ratio_penalty=inputs.get(PENALTY),
        **columns,
    )


def without_dropped(inputs: dict[str, Any], tokens: Tokens) -> Tokens:
    """Those of the packed tokens of a batch that are in its loss."""
    return tokens.select(at(tokens, loss_mask(inputs))) if WRITTEN in inputs else tokens


def advantages_for_trl(inputs: dict[str, Any], tokens: Tokens) -> Float[Tensor, "..."]:
    """The advantages of `tokens` as TRL reads them; other places keep what they have in `inputs`.

    They are (B,) where all tokens of each response have the same, as TRL's own are: losses and metrics of whole
    sequences are then TRL's. Else (B, T).
    """
    given, made = inputs["advantages"].to(tokens.advantages.dtype), tokens.advantages
    if given.dim() == 1:
        of_response = given.clone()
        of_response[tokens.response] = made  # any one of a response's tokens
        if torch.equal(of_response[tokens.response], made):
            return of_response
        given = given[:, None].expand(inputs["completion_mask"].shape)
    return given.index_put((tokens.response, tokens.position), made)


def for_the_loss(inputs: dict[str, Any], decided: Tokens, count: int) -> dict[str, Any]:
    """TRL's batch with what a method decided on its tokens, of which `count` are left on all processes.

    Where some were dropped, TRL's `tool_mask` takes them out of the loss and `num_items_in_batch` out of its
    denominator; the model still attends to them.
    """
    batch = inputs | {"advantages": advantages_for_trl(inputs, decided)}
    shape = tuple(inputs["completion_mask"].shape)
    for name, column in ((BONUS, decided.entropy_bonus), (PENALTY, decided.ratio_penalty)):
        if column is not None:
            batch[name] = decided.unpack(column, shape)
    if decided.index is not None:
        batch[WRITTEN] = loss_mask(inputs)
        batch["tool_mask"] = decided.unpack(inputs["completion_mask"].new_ones(len(decided.response)), shape)
        batch["num_items_in_batch"] = torch.full_like(inputs["num_items_in_batch"], count)
    return batch
