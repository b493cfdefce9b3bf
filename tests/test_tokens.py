"""Tokens are packed: what padding held is gone, and no order, split or dropped token mixes up which is whose."""

import math
from dataclasses import fields, replace

import pytest
import torch
from batches import TOKEN_COLUMNS, by_row, literal, sampled_batch, split
from cases import history, rollout
from hypothesis import given
from hypothesis import strategies as st

from entropy_polarity.tokens import Tokens, concatenate, finite, is_finite, mean, share_of
from entropy_polarity.transforms import observe, token_polarity

nan, inf = math.nan, math.inf
RESPONSES = ("reward", "group", "sample_id")


def assert_equal(found: Tokens, expected: Tokens) -> None:
    """Every column, bit for bit."""
    for field in fields(Tokens):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        assert (one is None) == (other is None), field.name
        assert one is None or torch.equal(one, other), field.name


def small() -> Tokens:
    """Four responses, of 2, 0, 3 and 1 tokens, whose numbers say which they are."""
    return literal(
        mask=[[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 0, 1]],
        advantages=[[0.0, nan, 2.0], [nan] * 3, [20.0, 21.0, 22.0], [nan, nan, 32.0]],
        entropy=[[0.5, nan, 2.5], [nan] * 3, [20.5, 21.5, 22.5], [nan, nan, 32.5]],
        reward=[0.0, 1.0, 2.0, 3.0],
        sample_id=[10, 11, 12, 13],
    )


# ---- packing ---------------------------------------------------------------------------------------------


def test_packed_tokens_by_hand():
    tokens = small()
    assert tokens.response.tolist() == [0, 0, 2, 2, 2, 3]
    assert tokens.position.tolist() == [0, 2, 0, 1, 2, 2]
    assert tokens.advantages.tolist() == [0, 2, 20, 21, 22, 32]
    assert tokens.entropy.tolist() == [0.5, 2.5, 20.5, 21.5, 22.5, 32.5]
    assert tokens.reward.tolist() == [0, 1, 2, 3]
    assert tokens.logp is tokens.group is tokens.index is None
    assert tokens.responses == 4


@given(st.integers(0, 10**6), st.integers(0, 4), st.integers(0, 3), st.sampled_from([nan, inf, -inf, 1e30, -3.0]))
def test_what_padding_and_environment_tokens_hold_is_gone(seed, columns, rows, garbage):
    batch = rollout(seed)
    shape = batch.responses + rows, 5 + columns
    names = [name for name in ("advantages", *TOKEN_COLUMNS) if getattr(batch, name) is not None]
    assert len(names) == 4
    padded = {name: batch.unpack(getattr(batch, name), shape, garbage) for name in names}
    mask = batch.unpack(torch.ones_like(batch.response, dtype=torch.bool), shape)
    assert all((column == garbage).sum() + column.isnan().sum() >= (~mask).sum() for column in padded.values())
    packed = Tokens.pack(mask, **padded, sample_id=torch.arange(shape[0]))
    assert packed.responses == shape[0]
    assert_equal(replace(packed, sample_id=batch.sample_id), batch)


@pytest.mark.parametrize("tokens", [small(), *history(0, 1), rollout(2)])
def test_what_is_unpacked_is_packed_to_the_same(tokens):
    shape = tokens.responses, int(tokens.position.max()) + 1
    mask = tokens.unpack(torch.ones_like(tokens.response, dtype=torch.bool), shape)
    assert mask.dtype == torch.bool
    assert mask.sum() == len(tokens.response)
    columns = {f.name: getattr(tokens, f.name) for f in fields(Tokens)[2:] if getattr(tokens, f.name) is not None}
    columns = {name: x if name in RESPONSES else tokens.unpack(x, shape) for name, x in columns.items()}
    assert_equal(Tokens.pack(mask, **columns), tokens)


def test_values_are_unpacked_to_their_places():
    tokens = small()
    padded = tokens.unpack(tokens.advantages, (4, 4), fill=-1.0)
    assert padded.tolist() == [[0, -1, 2, -1], [-1] * 4, [20, 21, 22, -1], [-1, -1, 32, -1]]
    kept = tokens.select(tokens.advantages > 20)
    assert kept.unpack(kept.advantages, (4, 3)).tolist() == [[0] * 3, [0] * 3, [0, 21, 22], [0, 0, 32]]
    whole = tokens.unpack(tokens.position + 1, (4, 3))
    assert whole.dtype == torch.long
    assert whole.tolist() == [[1, 0, 3], [0] * 3, [1, 2, 3], [0, 0, 3]]


def test_one_advantage_of_each_response_is_repeated():
    mask = torch.tensor([[True, False, True], [False, True, False], [False] * 3])
    repeated = Tokens.pack(mask, torch.tensor([0.5, -0.5, 9.0]))
    assert repeated.advantages.tolist() == [0.5, 0.5, -0.5]
    assert_equal(repeated, Tokens.pack(mask, torch.tensor([[0.5] * 3, [-0.5] * 3, [9.0] * 3])))
    assert Tokens.pack(mask, torch.zeros(3), entropy=None).entropy is None


def test_a_packed_column_keeps_its_gradient():
    padded = torch.zeros(2, 3, requires_grad=True)
    tokens = Tokens.pack(torch.tensor([[True, False, True], [False, True, False]]), torch.zeros(2), logp=padded)
    (tokens.logp * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert padded.grad.tolist() == [[1, 0, 2], [0, 3, 0]]


@pytest.mark.parametrize(
    ("column", "told"),
    [
        ({"reward": torch.zeros(3)}, r"reward has shape \(3,\), the mask has \(2, 4\); expected \(2,\)"),
        ({"group": torch.zeros(2, 1)}, r"group has shape \(2, 1\), .* expected \(2,\)"),
        ({"entropy": torch.zeros(1, 4)}, r"entropy has shape \(1, 4\), .* expected \(2, 4\)"),
        ({"entropy": torch.zeros(2, 3)}, r"entropy has shape \(2, 3\), .* expected \(2, 4\)"),
        ({"entropy": torch.zeros(8)}, r"entropy has shape \(8,\)"),
        ({"advantages": torch.zeros(2, 1)}, "advantages"),  # it would broadcast: one value per token is expected
        ({"advantages": torch.zeros(3)}, r"advantages has shape \(3, 4\), .* expected \(2, 4\)"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_columns_of_different_responses_are_not_packed(column, told):
    columns = {"advantages": torch.zeros(2, 4)} | column
    with pytest.raises(ValueError, match=f"Tokens.pack: {told}") as refusal:
        Tokens.pack(torch.tensor([[True] * 4, [False] * 4]), **columns)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("column", "told"),
    [
        ({"position": torch.arange(2)}, r"position has shape \(2,\); expected \(3,\), one value per token"),
        ({"entropy": torch.zeros(2)}, r"entropy has shape \(2,\); expected \(3,\), one value per token"),
        ({"logp": torch.zeros(3, 1)}, r"logp has shape \(3, 1\); expected \(3,\)"),
        ({"advantages": torch.zeros(1, 3)}, r"advantages .*: Tokens.pack takes padded columns"),
        ({"index": torch.arange(4)}, "index has shape"),
        ({"group": torch.zeros(3).long()}, r"group has shape \(3,\); expected \(2,\), one value per response"),
        ({"sample_id": torch.zeros(2, 1).long()}, r"sample_id has shape \(2, 1\); expected \(2,\)"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_tokens_of_different_lengths_are_refused(column, told):
    place = torch.tensor([0, 0, 1])
    columns = {"response": place, "position": place, "advantages": torch.zeros(3), "reward": torch.zeros(2)}
    with pytest.raises(ValueError, match=f"Tokens: {told}") as refusal:
        Tokens(**columns | column)
    assert "\n" not in str(refusal.value)


# ---- which are left, and in what order -------------------------------------------------------------------


def test_selected_tokens_say_which_they_are():
    tokens = small()
    kept = tokens.select(tokens.advantages != 20)
    assert kept.index.tolist() == [0, 1, 3, 4, 5]
    assert by_row(kept, kept.entropy) == [[0.5, 2.5], [], [21.5, 22.5], [32.5]]
    assert kept.position.tolist() == [0, 2, 1, 2, 2]
    assert kept.reward is tokens.reward
    assert kept.responses == 4
    again = kept.select(torch.tensor([False, True, False, True, True]))
    assert again.index.tolist() == [1, 4, 5]
    assert again.advantages.tolist() == [2, 22, 32]
    assert tokens.advantages[again.index].equal(again.advantages)
    nothing = again.select(torch.zeros(3, dtype=torch.bool))
    assert nothing.index.tolist() == []
    assert nothing.responses == 4


def test_all_tokens_are_the_same_tokens():
    tokens = small()
    assert tokens.select(torch.ones(6, dtype=torch.bool)) is tokens
    kept = tokens.select(tokens.response > 0)
    assert kept.select(torch.ones(4, dtype=torch.bool)).index.tolist() == [2, 3, 4, 5]
    nothing = tokens.select(tokens.response > 9)
    assert nothing.select(torch.ones(0, dtype=torch.bool)) is nothing


@given(st.integers(0, 10**6), st.integers(1, 4))
def test_index_leads_back_to_the_batch_however_often_tokens_are_dropped(seed, times):
    batch, random = rollout(seed), torch.Generator().manual_seed(seed)
    left = batch
    for _ in range(times):
        left = left.select(torch.rand(len(left.response), generator=random) < 0.7)
    index = torch.arange(len(batch.response)) if left.index is None else left.index
    assert len(index) == len(left.response)
    for name in ("response", "position", "advantages", "entropy", "sensitivity"):
        assert getattr(batch, name)[index].equal(getattr(left, name))


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize(
    ("chosen", "response", "advantages"),
    [
        ([3, 1, 0, 2], [0, 2, 2, 3, 3, 3], [32, 0, 2, 20, 21, 22]),
        ([2], [0, 0, 0], [20, 21, 22]),
        ([1, 3], [1], [32]),
        ([1], [], []),
        ([0, 0], [0, 0, 1, 1], [0, 2, 0, 2]),
        ([], [], []),
    ],
)
def test_some_responses_in_another_order_by_hand(chosen, response, advantages, columns):
    tokens = small() if columns else replace(small(), reward=None, sample_id=None)
    found = tokens.of_responses(torch.tensor(chosen, dtype=torch.long))
    assert found.response.tolist() == response
    assert found.advantages.tolist() == advantages
    assert found.entropy.equal(found.advantages + 0.5)
    assert found.position.equal((found.advantages % 10).long())
    assert found.index is None
    if columns:
        assert found.reward.tolist() == chosen
        assert found.sample_id.tolist() == [10 + row for row in chosen]
        assert found.responses == len(chosen)


def test_responses_in_another_order_keep_what_was_dropped():
    kept = small().select(small().advantages != 21)
    turned = kept.of_responses(torch.tensor([3, 2, 1, 0]))
    assert by_row(turned, turned.index) == [[5], [2, 4], [], [0, 1]]
    back = turned.of_responses(torch.tensor([3, 2, 1, 0]))
    assert_equal(back, kept)


@given(st.integers(0, 10**6))
def test_an_order_and_its_inverse_are_the_batch(seed):
    batch = sampled_batch(seed % 7)
    order = torch.randperm(batch.responses, generator=torch.Generator().manual_seed(seed))
    turned = batch.of_responses(order)
    for row, was in enumerate(order.tolist()):
        assert turned.entropy[turned.response == row].equal(batch.entropy[batch.response == was])
    assert turned.group.equal(batch.group[order])
    assert_equal(turned.of_responses(order.argsort()), batch)


def test_tokens_that_are_not_in_the_order_of_responses_are_found():
    response, position = torch.tensor([1, 0, 1, 0]), torch.tensor([0, 0, 1, 3])
    tokens = Tokens(response, position, torch.tensor([10.0, 0.0, 11.0, 3.0]))
    found = tokens.of_responses(torch.tensor([0, 1]))
    assert found.response.tolist() == [0, 0, 1, 1]
    assert found.advantages.tolist() == [0, 3, 10, 11]


def test_the_number_of_responses():
    assert small().responses == 4
    bare = replace(small(), reward=None, sample_id=None)
    assert bare.responses == 4
    assert bare.select(bare.response < 3).responses == 3  # as far as it is known
    assert bare.select(bare.response > 9).responses == 0
    assert replace(bare, group=torch.arange(7)).responses == 7


# ---- joined ----------------------------------------------------------------------------------------------


def test_concatenated_responses_are_numbered_on():
    one = small()
    two = literal(mask=[[0, 1], [1, 1]], advantages=[[nan, 41.0], [50.0, 51.0]], entropy=[[nan, 1.0], [2.0, 3.0]],
                  reward=[4.0, 5.0], sample_id=[10, 15])  # fmt: skip
    joined = concatenate([one, two, one])
    assert joined.response.tolist() == [0, 0, 2, 2, 2, 3, 4, 5, 5, 6, 6, 8, 8, 8, 9]
    assert joined.position.tolist() == [0, 2, 0, 1, 2, 2, 1, 0, 1, 0, 2, 0, 1, 2, 2]
    assert joined.advantages.tolist() == [0, 2, 20, 21, 22, 32, 41, 50, 51, 0, 2, 20, 21, 22, 32]
    assert joined.reward.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    assert joined.sample_id.tolist() == [10, 11, 12, 13, 10, 15, 10, 11, 12, 13]
    assert joined.responses == 10
    assert_equal(joined.of_responses(torch.tensor([4, 5])), two)
    assert_equal(concatenate([two]), two)
    assert observe(replace(joined, sensitivity=joined.entropy)).entropy == pytest.approx(joined.entropy.mean().item())


def test_a_column_that_one_part_lacks_is_not_there():
    joined = concatenate([replace(small(), reward=None), replace(small(), entropy=None)])
    assert joined.reward is joined.entropy is None
    assert joined.sample_id.tolist() == [10, 11, 12, 13] * 2
    assert joined.advantages.tolist() == [0, 2, 20, 21, 22, 32] * 2


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_the_parts_of_a_batch_are_the_batch(parts):
    assert_equal(concatenate(split(small(), parts)), small())
    kept = small().select(small().advantages != 21)  # its index stays that of the whole batch
    assert_equal(concatenate(split(kept, parts)), kept)


def test_parts_of_which_only_some_dropped_tokens_are_not_joined():
    with pytest.raises(ValueError, match="some parts have an index and others have none"):
        concatenate([small(), small().select(small().advantages != 21)])


# ---- columns ---------------------------------------------------------------------------------------------


def test_a_column_that_was_not_computed_is_named():
    batch = rollout(0)
    with pytest.raises(ValueError, match="the token column 'sensitivity' is needed but was not computed"):
        token_polarity(replace(batch, sensitivity=None))
    with pytest.raises(ValueError, match="the token column 'entropy' is needed but was not computed"):
        observe(replace(batch, entropy=None))
    assert batch.require("entropy") is batch.entropy


def test_detached_tokens_are_the_same_columns_without_gradient():
    batch = small()
    live = replace(batch, logp=torch.full((6,), -0.5, requires_grad=True) * 2)
    assert live.detach().logp.equal(live.logp)
    assert live.logp.requires_grad
    assert not live.detach().logp.requires_grad
    assert live.detach().group is None
    assert_equal(live.detach(), replace(batch, logp=torch.full((6,), -1.0)))


def test_the_mean_and_the_share_of_nothing_are_zero():
    assert mean(torch.tensor([1.0, 4.0])).item() == 2.5
    assert mean(torch.tensor([])).item() == 0
    assert share_of(torch.tensor([True, False, False, True])) == 0.5
    assert share_of(torch.tensor([], dtype=torch.bool)) == 0


def test_what_is_finite():
    values = torch.tensor([1.0, nan, inf, -inf, -3e38])
    assert is_finite(values).tolist() == [True, False, False, False, True]
    assert finite(values).tolist() == values.where(is_finite(values), torch.tensor(0.0)).tolist()
