"""What every row of METHODS promises, and that it decides as it did in version 0.1."""

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from batches import OUTPUTS, TOKEN_COLUMNS, outputs, rows, run, sampled_batch, split, with_columns
from cases import (
    CASES,
    IDLE,
    assert_same,
    at_one_token,
    build,
    every_case,
    flattened,
    history,
    one_hot,
    without,
)

from entropy_polarity import controllers
from entropy_polarity.methods import METHODS, make_transform
from entropy_polarity.tokens import Tokens
from entropy_polarity.transforms import Monitor

nan, inf = math.nan, math.inf
DECISIONS = json.loads((Path(__file__).parent / "golden" / "decisions.json").read_text(encoding="utf-8"))


def test_every_method_and_controller_is_tried_here():
    assert METHODS.keys() <= CASES.keys()
    assert {f"papo {name}" for name in controllers.CONTROLLERS} <= CASES.keys()
    assert {"papo", "papo constant", "grpo"} <= IDLE <= CASES.keys()


@pytest.mark.parametrize("case", sorted(CASES.keys() - IDLE))
def test_the_settings_tried_here_change_something(case):
    batches = history(1, 2, 3)
    result = run(build(case), *batches)[0]
    changed = not result.advantages.equal(batches[-1].advantages)
    terms = [term for term in (result.entropy_bonus, result.ratio_penalty) if term is not None]
    assert changed or any((term > 0).any() for term in terms)


@every_case
def test_the_order_of_the_responses_changes_nothing(case):
    transform = make_transform(*CASES[case])
    state = mixed_state = transform.init()
    monitor, mixed_monitor = Monitor(), Monitor()
    for seed in range(3):
        batch = sampled_batch(seed)
        order = torch.randperm(batch.responses, generator=torch.Generator().manual_seed(seed))
        result, state, metrics = run(transform, batch, state=state, monitor=monitor)
        mixed, mixed_state, mixed_metrics = run(
            transform, batch.of_responses(order), state=mixed_state, monitor=mixed_monitor
        )
        assert_same(mixed, result.of_responses(order))
        assert mixed_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)
    assert flattened(mixed_state) == pytest.approx(flattened(state), rel=1e-5, abs=1e-7)


def surrounded(batch: Tokens, columns: int, rows: int, garbage: float) -> Tokens:
    """The same batch out of padded columns, with responses of another prompt that are all padding, and garbage wherever
    a column is padded."""
    shape = batch.responses + rows, 6 + columns
    padded = {name: batch.unpack(getattr(batch, name), shape, garbage) for name in ("advantages", *TOKEN_COLUMNS)}
    mask = batch.unpack(torch.ones_like(batch.response, dtype=torch.bool), shape)
    return Tokens.pack(
        mask,
        **padded,
        reward=torch.cat([batch.reward, torch.ones(rows)]),
        group=torch.cat([batch.group, torch.full((rows,), 99)]),
        sample_id=torch.cat([batch.sample_id, 500 + torch.arange(rows)]),
    )


@every_case
@pytest.mark.parametrize("garbage", [nan, -inf, 1e30])
def test_padding_and_environment_tokens_are_inert(case, garbage):
    transform = make_transform(*CASES[case])
    state = dirty_state = transform.init()
    monitor, dirty_monitor = Monitor(), Monitor()
    for seed in range(2):
        batch = sampled_batch(seed)
        dirty = surrounded(batch, columns=2, rows=3, garbage=garbage)
        result, state, metrics = run(transform, batch, state=state, monitor=monitor)
        found, dirty_state, dirty_metrics = run(transform, dirty, state=dirty_state, monitor=dirty_monitor)
        assert found.responses == result.responses + 3
        assert_same(found, result, rtol=0, atol=0)
        assert dirty_metrics == metrics
    assert dirty_state == state


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize("case", [case for case in CASES if build(case).local])
def test_local_on_any_split_is_update_on_the_whole(case, parts):
    transform, batch = make_transform(*CASES[case]), sampled_batch(9)
    state = run(transform, *history(1, 2, 3))[1]
    whole = transform.update(batch, state)[0]
    pieces = [transform.local(part, state) for part in split(batch, parts)]
    assert len(pieces) == parts
    assert all(piece.index is None for piece in (whole, *pieces))
    for name in ("position", *OUTPUTS):
        if getattr(whole, name) is not None:
            assert torch.cat([getattr(piece, name) for piece in pieces]).equal(getattr(whole, name))


@pytest.mark.parametrize("case", [case for case in CASES if build(case).local])
def test_an_update_that_is_local_is_local_and_advance(case):
    transform = build(case)
    state = moved = transform.init()
    for batch in history(1, 2, 3):
        rewritten = transform.local(batch, moved)
        moved, found = transform.advance(batch, moved)
        expected, state, metrics = transform.update(batch, state)
        assert_same(rewritten, expected, rtol=0, atol=0)
        assert (moved, found) == (state, metrics)


@every_case
def test_a_method_with_one_half_of_an_update_has_the_other(case):
    transform = build(case)
    assert (transform.local is None) == (transform.advance is None) == (transform.decides_from != "each token")


def test_which_methods_look_at_what():
    decides = {"rewards": set(), "each token": set(), "whole batch": set()}
    for name, row in METHODS.items():
        decides[make_transform(name, row.example).decides_from].add(name)
    assert decides["rewards"] == {"dapo", "qae", "nsr", "psr"}
    assert decides["each token"] == {
        "grpo", "entropy_bonus", "adaptive_coefficient", "entropy_advantage", "w_reinforce",
        "papo", "papo_positive_only", "papo_negative_only",
    }  # fmt: skip


@every_case
def test_an_update_leaves_batch_and_state_as_they_were(case):
    transform, batch = build(case), sampled_batch(5)
    state = run(transform, *history(1, 2))[1]
    before = with_columns(batch, lambda name, column: column.clone()), json.dumps(state)
    transform.update(batch, state)
    assert json.dumps(state) == before[1]
    for f in fields(batch):
        column = getattr(batch, f.name)
        assert column is None or column.equal(getattr(before[0], f.name))


@every_case
def test_a_state_saved_as_json_continues_the_same_trajectory(case):
    transform, state, saved = make_transform(*CASES[case]), None, None
    state = saved = transform.init()
    for seed in range(5):
        batch = sampled_batch(seed, scale=2.0 + seed)
        expected, state, expected_metrics = transform.update(batch, state)
        saved = json.loads(json.dumps(saved, allow_nan=False))
        found, saved, metrics = transform.update(batch, saved)
        assert_same(found, expected, rtol=0, atol=0)
        assert metrics == expected_metrics


@every_case
def test_a_method_reads_what_it_says_it_needs_and_nothing_else(case):
    transform, full = build(case), sampled_batch(4, scale=20.0)  # so low an entropy that every gate is open
    needs = transform.needs
    assert needs <= {*TOKEN_COLUMNS, "reward", "group", "sample_id"}
    bare = Tokens(full.response, full.position, full.advantages, **{name: getattr(full, name) for name in needs})
    run(transform, bare, bare)
    for name in needs:
        with pytest.raises(ValueError, match=f"the token column '{name}' is needed but was not computed"):
            transform.update(replace(bare, **{name: None}), transform.init())


DEGENERATE = {
    "one token": lambda b: without(rows(b, 0), rows(b, 0).position > 0),
    "one group": lambda b: rows(b, 0, 1, 2, 3),
    "one response a group": lambda b: replace(b, group=b.sample_id),
    "equal rewards": lambda b: replace(b, reward=torch.ones(16), advantages=torch.zeros_like(b.advantages)),
    "a response without tokens": lambda b: without(b, (b.sample_id == 3)[b.response]),
    "a prompt without tokens": lambda b: without(b, (b.group == 2)[b.response]),
    "no tokens": lambda b: without(b, b.response >= 0),
    "one-hot everywhere": one_hot,
    "log p = -inf": lambda b: at_one_token(b, logp=-inf, importance=0.0),
    "log p = -inf twice": lambda b: at_one_token(b, logp=-inf, old_logp=-inf, importance=nan),
    "very negative log p": lambda b: at_one_token(b, logp=-1e4, old_logp=-1e4),
    "log p near the float's end": lambda b: at_one_token(b, logp=-3e38, old_logp=-3e38),
    "sensitivity NaN": lambda b: at_one_token(b, sensitivity=nan),
    "every column NaN": lambda b: at_one_token(b, **dict.fromkeys(TOKEN_COLUMNS, nan)),
}


@every_case
@pytest.mark.parametrize("degenerate", DEGENERATE)
def test_a_degenerate_batch_stays_finite_and_does_not_end_the_training(case, degenerate):
    transform, state, broken = build(case), None, DEGENERATE[degenerate](sampled_batch(3))
    monitor = Monitor()
    for batch in (broken, sampled_batch(4), broken):
        result, state, metrics = run(transform, batch, state=state, monitor=monitor)
        for name, column in outputs(result).items():
            assert column.isfinite().all(), name
        assert batch is broken or all(math.isfinite(value) for value in metrics.values())


# Where the denominator is the tokens kept, a token without statistics is one of them or not: it moves all by 1 / N.
KEEPING = {
    case for case, (name, settings) in CASES.items()
    if name in ("top_entropy", "clip_b", "clip_v") and settings.get("denominator") != "all"
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(CASES.keys() - KEEPING))
def test_a_token_without_usable_statistics_is_left_out_and_no_other(case):
    """Every other token gets what it gets where that token is no model token."""
    transform, batch = build(case), sampled_batch(3)
    of_one = batch.response == 1
    # Its advantage is known: that it counts in the mean of A is right, and here it makes no difference.
    batch = replace(batch, advantages=torch.where(of_one, batch.advantages[~of_one].mean(), batch.advantages))
    broken = without(at_one_token(batch, **dict.fromkeys(TOKEN_COLUMNS, nan)), of_one & (batch.position > 0))
    state = run(transform, *history(1, 2))[1]
    found, found_state, _ = run(transform, broken, state=state)
    expected, expected_state, _ = run(transform, without(batch, of_one), state=state)
    assert_same(found.select(found.response != 1), expected)
    assert flattened(found_state) == pytest.approx(flattened(expected_state), rel=1e-5, abs=1e-9)


# ---- what version 0.1 decided ----------------------------------------------------------------------------


def golden_batches() -> list[Tokens]:
    def tensor(name: str, values: list) -> torch.Tensor:
        whole = name in ("response", "position", "group", "sample_id")
        return torch.tensor(values, dtype=torch.long if whole else torch.float64)

    return [Tokens(**{name: tensor(name, x) for name, x in batch.items()}) for batch in DECISIONS["batches"]]


def test_every_method_has_its_decisions():
    assert METHODS.keys() == {case["method"] for case in DECISIONS["cases"].values()}
    for name, settings in CASES.values():
        assert any(case["method"] == name for case in DECISIONS["cases"].values()), settings


@pytest.mark.parametrize("case", DECISIONS["cases"])
def test_a_method_decides_what_version_0_1_decided(case):
    case = DECISIONS["cases"][case]
    transform, monitor = make_transform(case["method"], case["settings"]), Monitor()
    state = transform.init()
    # Batches and states are float64; shares of tokens, of which some scale advantages, were float32 then.
    for batch, expected in zip(golden_batches(), case["rollouts"], strict=True):
        result, state, metrics = run(transform, batch, state=state, monitor=monitor)
        assert (None if result.index is None else result.index.tolist()) == expected["kept"]
        for name in OUTPUTS:
            column = getattr(result, name)
            assert (column is None) == (name not in expected)
            assert column is None or column.tolist() == pytest.approx(expected[name], rel=1e-6, abs=1e-9)
        assert metrics == pytest.approx(expected["metrics"], rel=1e-6, abs=1e-9)
    saved = flattened({"entropy": monitor.entropy, "inner": state})
    assert saved == pytest.approx(flattened(case["state"]), rel=1e-9, abs=1e-12)
