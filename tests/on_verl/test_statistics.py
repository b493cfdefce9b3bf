"""The workers' part: verl's own engine methods, wrapped, on a model output of our making."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("verl", reason="verl needs an environment of its own: make verl-test")

from gloo import spawned
from on_verl.megatron_part import LENGTHS, VOCABULARY, megatron_part, output
from verl.utils import tensordict_utils as tu
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from entropy_polarity.kernels.reference import reference_token_stats
from entropy_polarity.trainers.verl.workers import ASKED, ENTROPY, SENSITIVITY


def engine(gathered=lambda column, pad: column):
    made = object.__new__(FSDPEngineWithLMHead)
    made.engine_config = SimpleNamespace(
        entropy_checkpointing=False, entropy_from_logits_with_chunking=False, entropy_from_logits_chunk_size=8
    )
    made.compute_entropy_from_logits = lambda logits: -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    made._gather_and_unpad_packed = gathered
    return made


def micro_batch(packed=True, **flags):
    ids = torch.nested.as_nested_tensor([torch.zeros(n, dtype=torch.long) for n in LENGTHS], layout=torch.jagged)
    settings = {"use_remove_padding": packed, "calculate_entropy": True, "temperature": 0.7, **flags}
    return tu.get_tensordict({"input_ids": ids}, settings)


def made(engine, logits, arguments, batch):
    return FSDPEngineWithLMHead.prepare_model_outputs(engine, SimpleNamespace(logits=logits), arguments, batch, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_have_the_statistics_of_the_tempered_policy(dtype):
    logits, tokens, arguments = output(dtype)
    expected = reference_token_stats(logits.double() / 0.7, tokens)
    columns = made(engine(), logits[None].clone(), arguments, micro_batch(**{ASKED: True}))
    for name, value in ((ENTROPY, expected.entropy), (SENSITIVITY, expected.sensitivity)):
        assert columns[name].offsets().tolist() == [0, 5, 7, 14]
        torch.testing.assert_close(columns[name].values().double(), value, rtol=1e-5, atol=1e-6)


def test_padded_rows_have_the_same():
    logits, _, arguments = output()
    packed = made(engine(), logits[None], arguments, micro_batch(**{ASKED: True}))
    wide = torch.full((len(LENGTHS), 7, VOCABULARY), torch.nan)
    for row, part in enumerate(logits.split(LENGTHS)):
        wide[row, : len(part)] = part
    columns = made(engine(), wide, arguments, micro_batch(packed=False, **{ASKED: True}))
    for name in (ENTROPY, SENSITIVITY):
        assert columns[name].offsets().tolist() == packed[name].offsets().tolist()
        torch.testing.assert_close(columns[name].values(), packed[name].values())


@pytest.mark.parametrize("packed", [True, False])
def test_verls_own_outputs_stay_as_they_are(packed):
    logits, _, arguments = output()
    if not packed:
        wide = torch.zeros(len(LENGTHS), 7, VOCABULARY)
        for row, part in enumerate(logits.split(LENGTHS)):
            wide[row, : len(part)] = part
    given = logits[None] if packed else wide
    asked = made(engine(), given.clone(), arguments, micro_batch(packed, **{ASKED: True}))
    plain = made(engine(), given.clone(), arguments, micro_batch(packed))
    original = FSDPEngineWithLMHead.prepare_model_outputs.__wrapped__(
        engine(), SimpleNamespace(logits=given.clone()), arguments, micro_batch(packed), None
    )
    assert plain.keys() == original.keys() == {"log_probs", "entropy"}
    for name, column in original.items():
        assert torch.equal(plain[name].values(), column.values())
        assert torch.equal(asked[name].values(), column.values())


def test_parts_of_a_sequence_go_through_verls_own_gather():
    """Sequence parallelism: this process has a part of the packed row, with padding at its end."""
    logits, tokens, arguments = output(padding=2)
    seen = []

    def gather(column, pad):
        seen.append((len(column), pad))
        return column[: len(column) - pad]

    columns = made(engine(gather), logits[None], arguments, micro_batch(**{ASKED: True}))
    expected = reference_token_stats(logits.double()[:-2] / 0.7, tokens[:-2])
    assert seen[:2] == [(16, 2), (16, 2)]
    torch.testing.assert_close(columns[SENSITIVITY].values().double(), expected.sensitivity, rtol=1e-5, atol=1e-6)


def test_several_temperatures_in_a_batch_are_refused():
    logits, _, arguments = output()
    batch = micro_batch(**{ASKED: True})
    del batch["temperature"]
    batch["temperature"] = torch.tensor([0.7, 1.0, 0.7])
    with pytest.raises(ValueError, match="one temperature for a batch"):
        made(engine(), logits[None], arguments, batch)
    batch["temperature"] = torch.full((3,), 0.7)
    columns = made(engine(), logits[None], arguments, batch)
    of_one_number = made(engine(), logits[None], arguments, micro_batch(**{ASKED: True}))
    assert torch.equal(columns[SENSITIVITY].values(), of_one_number[SENSITIVITY].values())


@pytest.mark.parametrize("packed", [True, False])
def test_the_inputs_are_those_verl_prepares(packed):
    """verl's own preparation, with its padding to a length: there it puts a temperature of 1."""
    logits, tokens, _ = output()
    its = engine(lambda column, pad: column[: len(column) - pad] if pad else column)
    its.pad_to_length, its.use_ulysses_sp = None, False
    its._get_packed_pad_size = lambda length: 2
    batch = micro_batch(packed, **{ASKED: True})
    offsets = batch["input_ids"].offsets()
    # the token that a state foretells is the next in its row: verl rolls all rows together
    batch["input_ids"] = torch.nested.nested_tensor_from_jagged(tokens.roll(1), offsets)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    batch["position_ids"] = torch.nested.nested_tensor_from_jagged(positions, offsets)
    _, arguments = FSDPEngineWithLMHead.prepare_model_inputs(its, batch)
    if packed:
        assert arguments["temperature_rmpad"].unique().tolist() == pytest.approx([0.7, 1.0])
        given = torch.cat([logits, torch.randn(2, VOCABULARY)])[None]
    else:
        given = torch.zeros(len(LENGTHS), max(LENGTHS), VOCABULARY)
        for row, part in enumerate(logits.split(LENGTHS)):
            given[row, : len(part)] = part
    columns = made(its, given, arguments, batch)
    expected = reference_token_stats(logits.double() / 0.7, tokens)
    for name, value in ((ENTROPY, expected.entropy), (SENSITIVITY, expected.sensitivity)):
        torch.testing.assert_close(columns[name].values().double(), value, rtol=1e-5, atol=1e-6)


def test_megatrons_vocabulary_in_two_parts_has_the_statistics_of_the_whole(tmp_path):
    pytest.importorskip("megatron.core")
    spawned(megatron_part, 2, str(tmp_path))
    logits, tokens, _ = output()
    expected = reference_token_stats(logits.double()[:-1] / 0.7, tokens[:-1])
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        asked, plain = results[True], results[False]
        assert plain.keys() == {"sum_pi_squared", "entropy"}
        for name, column in plain.items():
            assert torch.equal(asked[name], column)
        for name, value in ((ENTROPY, expected.entropy), (SENSITIVITY, expected.sensitivity)):
            assert asked[name].shape == (1, len(tokens))
            torch.testing.assert_close(asked[name][0, :-1].double(), value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(plain["entropy"][0, :-1].double(), expected.entropy, rtol=1e-4, atol=1e-5)
