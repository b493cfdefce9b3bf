"""Every row of METHODS: what all of them promise, and each one's formula by numbers worked out by hand."""

import json
import math
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import loop
import pytest
import torch
from batches import OUTPUTS, TOKEN_FACTS, in_double, literal, outputs, run, sampled_batch, with_columns
from hypothesis import given
from hypothesis import strategies as st
from trl import GRPOTrainer

from entropy_polarity import phase
from entropy_polarity.methods import METHODS, make_transform
from entropy_polarity.polarity import predicted_entropy_change
from entropy_polarity.tokens import Tokens
from entropy_polarity.transforms import Loss, Transform, loss_terms, token_polarity
from entropy_polarity.transforms.batch import largest, mean_entropy, token_keys
from entropy_polarity.transforms.selection import clip_cov_choice

nan, inf = math.nan, math.inf
VERL = json.loads((Path(__file__).parent / "golden" / "verl.json").read_text())

# Every method as its row gives it, papo with every controller, and where the defaults would find nothing to do among
# so few tokens, with settings that do.
CASES: dict[str, tuple[str, dict]] = {
    **{name: (name, method.example) for name, method in METHODS.items()},
    **{f"papo {name}": ("papo", {"controller": name}) for name in phase.CONTROLLERS},
    "papo conserving": ("papo", {"controller": "balance", "soft_sign": 0.02, "conserve": True}),
    "papo weighing": ("papo", {"controller": "constant", "lambda_": -0.4, "soft_sign": 0.02}),
    "papo steering": ("papo", {"controller": "reference", "level": 0.6}),
    "papo thermostat below": ("papo", {"controller": "thermostat", "level": 1.0, "conserve": True}),
    "dapo overlong": ("dapo", {"overlong_cache": 3, "max_length": 6}),
    "adaptive_coefficient low": ("adaptive_coefficient", {"target": 5.0}),
    "top_entropy of all": ("top_entropy", {"fraction": 0.3, "denominator": "all"}),
    "clip_cov wide": ("clip_cov", {"fraction": 0.05, "low": 0.2, "clip": 0.2, "seed": 3}),
    "kl_cov wide": ("kl_cov", {"fraction": 0.1, "coefficient": 0.5}),
    "clip_b near": ("clip_b", {"deviations": 0.3}),
    "clip_v near": ("clip_v", {"deviations": 0.3, "fraction": 0.05}),
    "clip_b of all": ("clip_b", {"deviations": 0.3, "denominator": "all"}),
    "clip_v of all": ("clip_v", {"deviations": 0.3, "fraction": 0.05, "denominator": "all"}),
    "steer exponential": ("steer", {"shape": "exponential", "low": 0.7}),
    "stare on": ("stare", {"below": 5.0}),
    "stare C2": ("stare", {"below": 5.0, "variant": "C2", "fraction": 0.3}),
    "stare adaptive": ("stare", {"variant": "C2", "below": 1.6, "adaptive": True, "fraction": 0.2}),
    "entropic weak": ("entropic", {"probability": 0.2, "target": 1.3}),
    "gepo narrow": ("gepo", {"width": 0.1, "rate": 0.5}),
}
IDLE = {"grpo", "dapo", "papo", "papo constant", "adaptive_coefficient", "clip_b", "clip_v", "stare", "gepo"}
every_case = pytest.mark.parametrize("case", CASES)


def build(case: str) -> Transform:
    name, settings = CASES[case]
    return METHODS[name].build(**settings)


def assert_same(found: Tokens, expected: Tokens, **tolerance: float) -> None:
    found, expected = outputs(found), outputs(expected)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, **({"rtol": 1e-5, "atol": 1e-6} | tolerance), msg=name)


def history(*seeds: int, scale: float = 2.0) -> list[Tokens]:
    return [sampled_batch(seed, scale) for seed in seeds]


# ---- what every method promises --------------------------------------------------------------------------


def test_every_method_and_controller_is_tried_here():
    assert METHODS.keys() <= CASES.keys()
    assert {f"papo {name}" for name in phase.CONTROLLERS} <= CASES.keys()
    assert {"papo", "papo constant", "grpo"} <= IDLE <= CASES.keys()


@pytest.mark.parametrize("case", sorted(CASES.keys() - IDLE))
def test_the_settings_tried_here_change_something(case):
    batches = history(1, 2, 3)
    result = run(build(case), *batches)[0]
    changed = not result.advantages.equal(batches[-1].advantages)
    terms = [term for term in (result.entropy_bonus, result.ratio_penalty) if term is not None]
    assert changed or any((term[result.mask] > 0).any() for term in terms)


@every_case
def test_the_order_of_the_responses_changes_nothing(case):
    transform = make_transform(*CASES[case])
    state = mixed_state = transform.init()
    for seed in range(3):
        batch = sampled_batch(seed)
        order = torch.randperm(len(batch.mask), generator=torch.Generator().manual_seed(seed))
        result, state, metrics = run(transform, batch, state=state)
        mixed, mixed_state, mixed_metrics = run(transform, batch.rows(order), state=mixed_state)
        assert_same(mixed, result.rows(order))
        assert mixed_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)
    assert flattened(mixed_state) == pytest.approx(flattened(state), rel=1e-5, abs=1e-7)


def flattened(state, prefix: str = "") -> dict[str, float]:
    if isinstance(state, dict | list):
        inner = state.items() if isinstance(state, dict) else enumerate(state)
        return {key: x for name, value in inner for key, x in flattened(value, f"{prefix}.{name}").items()}
    return {prefix: nan if state is None else state}


def surrounded(batch: Tokens, columns: int, rows: int, garbage: float) -> Tokens:
    """The same batch among masked columns, masked responses of another prompt, and garbage wherever it is masked."""

    def padded(name: str, column: torch.Tensor) -> torch.Tensor:
        if column.dim() == 1:
            new = {"reward": torch.ones(rows), "group": torch.full((rows,), 99), "sample_id": 500 + torch.arange(rows)}
            return torch.cat([column, new[name]])
        if name == "mask":
            return torch.nn.functional.pad(column, (0, columns, 0, rows))
        return torch.nn.functional.pad(torch.where(batch.mask, column, garbage), (0, columns, 0, rows), value=garbage)

    return with_columns(batch, padded)


@every_case
@pytest.mark.parametrize("garbage", [nan, -inf, 1e30])
def test_padding_and_environment_tokens_are_inert(case, garbage):
    transform = make_transform(*CASES[case])
    state = dirty_state = transform.init()
    for seed in range(2):
        batch = sampled_batch(seed)
        dirty = surrounded(batch, columns=2, rows=3, garbage=garbage)
        result, state, metrics = run(transform, batch, state=state)
        found, dirty_state, dirty_metrics = run(transform, dirty, state=dirty_state)
        assert_same(found.rows(slice(0, len(batch.mask))).cut(batch.mask.shape[1]), result)
        assert not found.mask[len(batch.mask) :].any()
        assert dirty_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)
        if math.isfinite(garbage):
            for name in OUTPUTS:
                assert getattr(found, name) is None or getattr(found, name).isfinite().all()
    assert flattened(dirty_state) == pytest.approx(flattened(state), rel=1e-5, abs=1e-7, nan_ok=True)


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize("case", [case for case in CASES if build(case).local])
def test_local_on_any_split_is_update_on_the_whole(case, parts):
    transform, batch = make_transform(*CASES[case]), sampled_batch(9)
    state = run(transform, *history(1, 2, 3))[1]
    whole = transform.update(batch, state)[0]
    step = len(batch.mask) // parts
    pieces = [transform.local(batch.rows(slice(i, i + step)), state) for i in range(0, len(batch.mask), step)]
    for name in ("mask", *OUTPUTS):
        if getattr(whole, name) is not None:
            assert torch.cat([getattr(piece, name) for piece in pieces]).equal(getattr(whole, name))


def test_which_methods_look_at_what():
    decides = {"rewards": set(), "every token": set(), "whole batch": set()}
    for name, method in METHODS.items():
        decides[make_transform(name, method.example).decides].add(name)
    assert decides["rewards"] == {"dapo", "qae", "nsr", "psr"}
    assert decides["every token"] == {
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


# The facts that a method is said to need, and "reuse" and "entropy_grad", which are none.
def needed(transform: Transform) -> set[str]:
    return {f.name for f in fields(Tokens)} & transform.needs


@every_case
def test_a_method_reads_what_it_says_it_needs_and_nothing_else(case):
    transform, full = build(case), sampled_batch(4, scale=20.0)  # so low an entropy that every gate is open
    needs = needed(transform)
    assert transform.needs - needs <= {"reuse", "entropy_grad"}
    bare = Tokens(full.mask, full.advantages, **{name: getattr(full, name) for name in needs})
    run(transform, bare, bare)
    for name in needs:
        with pytest.raises(ValueError, match=f"facts '{name}' are needed but were not computed"):
            transform.update(replace(bare, **{name: None}), transform.init())


def one_hot(batch: Tokens) -> Tokens:
    values = dict.fromkeys(("logp", "old_logp", "entropy", "sum_p2_logp", "sensitivity"), 0.0)
    values |= {"sum_p2": 1.0, "importance": 1.0}
    return with_columns(batch, lambda name, x: torch.full_like(x, values[name]) if name in values else x)


def at_one_token(batch: Tokens, **values: float) -> Tokens:
    def changed(name: str, column: torch.Tensor) -> torch.Tensor:
        column = column.clone()
        if name in values:
            column[1, 0] = values[name]
        return column

    return with_columns(batch, changed)


DEGENERATE = {
    "one token": lambda b: b.rows(slice(0, 1)).cut(1),
    "one group": lambda b: b.rows(slice(0, 4)),
    "one response a group": lambda b: replace(b, group=b.sample_id),
    "equal rewards": lambda b: replace(b, reward=torch.ones(16), advantages=torch.zeros_like(b.advantages)),
    "a response without tokens": lambda b: replace(b, mask=b.mask & (b.sample_id != 3)[:, None]),
    "a prompt without tokens": lambda b: replace(b, mask=b.mask & (b.group != 2)[:, None]),
    "no tokens": lambda b: replace(b, mask=torch.zeros_like(b.mask)),
    "one-hot everywhere": one_hot,
    "log p = -inf": lambda b: at_one_token(b, logp=-inf, importance=0.0),
    "log p = -inf twice": lambda b: at_one_token(b, logp=-inf, old_logp=-inf, importance=nan),
    "very negative log p": lambda b: at_one_token(b, logp=-1e4, old_logp=-1e4),
    "log p near the float's end": lambda b: at_one_token(b, logp=-3e38, old_logp=-3e38),
    "sensitivity NaN": lambda b: at_one_token(b, sensitivity=nan),
    "every fact NaN": lambda b: at_one_token(b, **dict.fromkeys(TOKEN_FACTS, nan)),
}


@every_case
@pytest.mark.parametrize("degenerate", DEGENERATE)
def test_a_degenerate_batch_stays_finite_and_does_not_end_the_training(case, degenerate):
    transform, state = build(case), None
    for batch in (DEGENERATE[degenerate](sampled_batch(3)), sampled_batch(4)) * 2:
        result, state, metrics = run(transform, batch, state=state)
        for name, column in outputs(result).items():
            assert column.isfinite().all(), name
    assert all(math.isfinite(value) for value in metrics.values())


# Where the denominator is the tokens kept, a token without facts is one of them or not: it moves all by 1 / N.
KEEPING = {
    case for case, (name, settings) in CASES.items()
    if name in ("top_entropy", "clip_b", "clip_v") and settings.get("denominator") != "all"
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(CASES.keys() - KEEPING))
def test_a_token_without_usable_facts_is_left_out_and_no_other(case):
    """Every other token gets what it gets where that token is no model token."""
    transform, batch = build(case), sampled_batch(3)
    mask, without = batch.mask.clone(), batch.mask.clone()
    mask[1], without[1] = torch.tensor([True] + [False] * 5), False
    # Its advantage is known: that it counts in the mean of A is right, and here it makes no difference.
    mean = batch.advantages[without].mean()
    batch = replace(batch, advantages=torch.where(batch.sample_id[:, None] == 1, mean, batch.advantages))
    broken = replace(at_one_token(batch, **dict.fromkeys(TOKEN_FACTS, nan)), mask=mask)
    state = run(transform, *history(1, 2))[1]
    found, found_state, _ = run(transform, broken, state=state)
    expected, expected_state, _ = run(transform, replace(batch, mask=without), state=state)
    assert_same(replace(found, mask=expected.mask), expected)
    assert flattened(found_state) == pytest.approx(flattened(expected_state), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("quantile", [0.2, 0.4, 0.9])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -7.3])
def test_equal_rewards_teach_nothing_in_a_group(quantile, reward):
    batch = replace(sampled_batch(0, groups=2, size=7), reward=torch.full((14,), reward))
    assert (run(METHODS["qae"].build(quantile), batch)[0].advantages == 0).all()
    for settings in ({}, {"overlong_cache": 3, "max_length": 6}):
        assert not run(METHODS["dapo"].build(**settings), batch)[0].mask.any()


@pytest.mark.parametrize("controller", phase.CONTROLLERS)
@pytest.mark.parametrize("soft_sign", [0.0, 0.05])
def test_without_room_for_lambda_papo_changes_no_bit(controller, soft_sign):
    bound = {"lambda_": 0.0} if controller == "constant" else {"lambda_max": 0.0}
    transform = make_transform("papo", {"controller": controller, "soft_sign": soft_sign, **bound})
    for seed in range(3):
        batch = sampled_batch(seed, scale=1.0 + seed)
        assert run(transform, *history(5, 6), batch)[0].advantages.equal(batch.advantages)


REFUSED = [
    ("grpo", {"lambda": 1}, "unknown setting of method 'grpo' 'lambda'"),
    ("clip_cov", {"fractoin": 0.1}, "did you mean 'fraction'"),
    ("kl_cov", {"coefficient": "1"}, "expected float"),
    ("clip_cov", {"seed": 1.5}, "expected int"),
    ("stare", {"variant": "C3"}, "'variant' .* expected .*'C2'"),
    ("stare", {"adaptive": 1}, "expected bool"),
    ("top_entropy", {"denominator": "some"}, "'denominator'"),
    ("dapo", {"max_length": "4096"}, "'max_length'"),
    ("entropy_bonus", {}, "needs a value for coefficient"),
    ("entropy_advantage", {}, "needs a value for kappa"),
    ("entropic", {}, "needs a value for probability"),
    ("gepo", {"width": 1.0}, "needs a value for rate"),
    ("gepo", {}, "needs a value for width, rate"),
    *(("top_entropy", {"fraction": x}, f"fraction is {x}") for x in (0.0, -0.1, 1.5, nan)),
    *(("qae", {"quantile": x}, f"quantile is {x}") for x in (0.0, 1.0, -1.0, nan)),
    ("dapo", {"overlong_cache": 8}, "overlong_cache=8 with max_length=None; expected max_length"),
    ("dapo", {"overlong_cache": 8, "max_length": 7}, "a cache from 1 to it"),
    ("dapo", {"overlong_cache": -1, "max_length": 7}, "overlong_cache=-1"),
    *(("entropy_advantage", {"kappa": x}, f"kappa is {x}; expected more than 1") for x in (1.0, 0.5, -2.0, nan)),
    ("steer", {"low": 0.0}, "low=0.0 and high=1.2; expected 0 < low"),
    ("steer", {"low": 1.1}, "low=1.1 and high=1.2"),
    ("steer", {"high": 0.7}, "low=0.8 and high=0.7"),
    *(("stare", {"fraction": x}, f"fraction={x}") for x in (-0.1, 0.0, 1.5, nan)),
    *(("stare", {"positive": x}, f"positive={x}") for x in (0.0, nan)),
    ("stare", {"negative": -1.0}, "negative=-1.0"),
    ("gepo", {"width": -1.0, "rate": 0.5}, "width=-1.0"),
    *(("gepo", {"width": 1.0, "rate": x}, f"rate={x}") for x in (0.0, 1.5, nan)),
    *(("adaptive_coefficient", {"step": x}, f"step={x}") for x in (0.0, -1.0, nan)),
    *(("adaptive_coefficient", {"maximum": x}, f"maximum={x}") for x in (-1.0, nan)),
    ("papo", {"controller": "thermostat", "lambda_max": 1.0}, "lambda_max is 1.0"),
    ("papo", {"controller": "thermostat", "level": 0.4, "fraction": 0.5}, "thermostat: .* both given"),
    ("papo", {"controller": "thermostat", "path": "linear"}, "thermostat: path 'linear' needs horizon"),
]
NOT_YET_REFUSED = [
    *(("clip_cov", {"fraction": x}, "fraction") for x in (-0.1, 1.5, nan)),
    ("clip_cov", {"low": 5.0, "high": 1.0}, "low"),
    ("clip_cov", {"clip": -0.1}, "clip"),
    *(("kl_cov", {"fraction": x}, "fraction") for x in (-0.1, 1.5, nan)),
    *(("kl_cov", {"coefficient": x}, "coefficient") for x in (-1.0, nan)),
    ("clip_b", {"deviations": nan}, "deviations"),
    ("clip_v", {"deviations": nan}, "deviations"),
    *(("clip_v", {"fraction": x}, "fraction") for x in (-0.1, 1.5, nan)),
    *(("entropy_advantage", {"kappa": 2.0, "alpha": x}, "alpha") for x in (-0.4, nan)),
    ("steer", {"high": inf}, "high"),
    ("stare", {"positive": 0.9, "adaptive": True}, "positive"),
    ("stare", {"below": nan}, "below"),
    *(("entropic", {"probability": x}, "probability") for x in (-0.1, 1.5, nan)),
    ("entropic", {"probability": 0.5, "target": nan}, "target"),
    ("entropic", {"probability": 0.5, "integral_gain": nan}, "integral_gain"),
    ("gepo", {"width": 1.0, "rate": 0.1, "low": -0.5}, "low"),
    ("gepo", {"width": 1.0, "rate": 0.1, "high": nan}, "high"),
    ("dapo", {"clip_low": -0.2}, "clip_low"),
    ("dapo", {"clip_high": nan}, "clip_high"),
    ("entropy_bonus", {"coefficient": nan}, "coefficient"),
    ("entropy_bonus", {"coefficient": inf}, "coefficient"),
    ("adaptive_coefficient", {"target": nan}, "target"),
    ("w_reinforce", {"right": nan}, "right"),
    ("papo", {"soft_sign": inf}, "soft_sign"),
]


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        *REFUSED,
        *(
            pytest.param(*row, marks=pytest.mark.xfail(strict=True, reason="src: not validated"))
            for row in NOT_YET_REFUSED
        ),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_settings_that_make_no_method_are_refused_in_one_line(name, settings, told):
    with pytest.raises(ValueError, match=told) as refusal:
        make_transform(name, settings)
    assert "\n" not in str(refusal.value)
