"""Every row of METHODS: what all of them promise, and each one's formula by numbers worked out by hand."""

import json
import math
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import loop
import pytest
import torch
from batches import OUTPUTS, TOKEN_FACTS, in_double, literal, outputs, run, sampled_batch, with_columns
from trl import GRPOTrainer

from entropy_polarity import controllers, token_stats
from entropy_polarity.maths import predicted_entropy_change
from entropy_polarity.methods import METHODS, make_transform
from entropy_polarity.tokens import Tokens
from entropy_polarity.transforms import LossOverrides, Transform, chain, loss_terms, token_polarity
from entropy_polarity.transforms.batch import largest, mean_entropy, token_keys
from entropy_polarity.transforms.selection import clip_cov_choice
from entropy_polarity.transforms.weights import polarity_sign, shuffled_signs, token_flow

nan, inf = math.nan, math.inf
VERL = json.loads((Path(__file__).parent / "golden" / "verl.json").read_text(encoding="utf-8"))

# Every method as its row gives it, papo with every controller, and where the defaults would find nothing to do among
# so few tokens, with settings that do.
CASES: dict[str, tuple[str, dict]] = {
    **{name: (name, method.example) for name, method in METHODS.items()},
    **{f"papo {name}": ("papo", {"controller": name}) for name in controllers.CONTROLLERS},
    "papo conserving": ("papo", {"controller": "balance", "soft_sign": 0.02, "conserve": True}),
    "papo weighing": ("papo", {"controller": "constant", "lambda_": -0.4, "soft_sign": 0.02}),
    "papo steering": ("papo", {"controller": "reference", "level": 0.6}),
    "papo thermostat below": ("papo", {"controller": "thermostat", "level": 1.0, "conserve": True}),
    "papo exact": ("papo", {"controller": "balance", "sign_from": "exact", "every": 2}),
    "papo shuffled": ("papo", {"controller": "constant", "lambda_": 0.5, "sign_from": "shuffled"}),
    "papo_random_half positive": ("papo_random_half", {"size_of": "positive", "seed": 5}),
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
    assert {f"papo {name}" for name in controllers.CONTROLLERS} <= CASES.keys()
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
    decides = {"rewards": set(), "each token": set(), "whole batch": set()}
    for name, method in METHODS.items():
        decides[make_transform(name, method.example).decides_from].add(name)
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
    transform, state, broken = build(case), None, DEGENERATE[degenerate](sampled_batch(3))
    for batch in (broken, sampled_batch(4), broken):
        result, state, metrics = run(transform, batch, state=state)
        for name, column in outputs(result).items():
            assert column.isfinite().all(), name
        assert batch is broken or all(math.isfinite(value) for value in metrics.values())


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


@pytest.mark.parametrize("controller", controllers.CONTROLLERS)
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
    *(("top_entropy", {"fraction": x}, f"fraction is {x}") for x in (0.0, -0.1, 1.5)),
    *(("qae", {"quantile": x}, f"quantile is {x}") for x in (0.0, 1.0, -1.0)),
    ("dapo", {"overlong_cache": 8}, "overlong_cache=8 with max_length=None; expected max_length"),
    ("dapo", {"overlong_cache": 8, "max_length": 7}, "a cache from 1 to it"),
    ("dapo", {"overlong_cache": -1, "max_length": 7}, "overlong_cache=-1"),
    *(("entropy_advantage", {"kappa": x}, f"kappa is {x}; expected more than 1") for x in (1.0, 0.5, -2.0)),
    ("steer", {"low": 0.0}, "low=0.0 and high=1.2; expected 0 < low"),
    ("steer", {"low": 1.1}, "low=1.1 and high=1.2"),
    ("steer", {"high": 0.7}, "low=0.8 and high=0.7"),
    *(("stare", {"fraction": x}, f"fraction={x}") for x in (-0.1, 0.0, 1.5)),
    *(("stare", {"positive": x}, f"positive={x}") for x in (0.0,)),
    ("stare", {"negative": -1.0}, "negative=-1.0"),
    ("gepo", {"width": -1.0, "rate": 0.5}, "width=-1.0"),
    *(("gepo", {"width": 1.0, "rate": x}, f"rate={x}") for x in (0.0, 1.5)),
    *(("adaptive_coefficient", {"step": x}, f"step={x}") for x in (0.0, -1.0)),
    *(("adaptive_coefficient", {"maximum": x}, f"maximum={x}") for x in (-1.0,)),
    ("papo", {"controller": "thermostat", "lambda_max": 1.0}, "lambda_max is 1.0"),
    ("papo", {"controller": "thermostat", "level": 0.4, "fraction": 0.5}, "thermostat: .* both given"),
    ("papo", {"controller": "thermostat", "path": "linear"}, "thermostat: path 'linear' needs horizon"),
]
OUT_OF_RANGE = [
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


FLOATS = [
    ("top_entropy", "fraction"),
    ("qae", "quantile"),
    ("entropy_advantage", "kappa"),
    ("stare", "positive"),
    ("gepo", "rate"),
    ("papo", "soft_sign"),
]


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        *REFUSED,
        *OUT_OF_RANGE,
        *((name, {key: x}, f"{key}.* expected a finite number") for name, key in FLOATS for x in (nan, inf)),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_settings_that_make_no_method_are_refused_in_one_line(name, settings, told):
    with pytest.raises(ValueError, match=told) as refusal:
        make_transform(name, settings)
    assert "\n" not in str(refusal.value)


# ---- every formula, by hand ------------------------------------------------------------------------------


def advantages(case: Transform, *rollouts: Tokens) -> list[list[float]]:
    return run(case, *rollouts)[0].advantages.tolist()


def method(name: str, **settings) -> Transform:
    return METHODS[name].build(**settings)


def close(values: list) -> object:
    """Nested lists, to the rounding of float32."""
    return pytest.approx(values, rel=1e-5, abs=1e-6) if not isinstance(values[0], list) else [close(v) for v in values]


def test_dapo_drops_groups_with_equal_rewards():
    batch = literal(
        mask=[[1, 1], [1, 0], [1, 1], [1, 1]],
        advantages=[[0.7, 0.7], [-0.7, -0.7], [0.0, 0.0], [0.0, 0.0]],
        reward=[1.0, 0.0, 1.0, 1.0],
        group=[7, 7, 3, 3],
    )
    result, _, _ = run(method("dapo"), batch)
    assert result.mask.tolist() == [[True, True], [True, False], [False, False], [False, False]]
    assert result.advantages.equal(batch.advantages)
    assert method("dapo").loss == LossOverrides(0.2, 0.28, average="token")
    assert method("dapo", clip_low=0.1, clip_high=0.5).loss == LossOverrides(0.1, 0.5, average="token")


def test_dapo_punishes_length_before_the_advantages_are_made():
    # L = 4, c = 2: clip((2 - n) / 2, -1, 0) = 0, -1/2, -1, 0 for n = 2, 3, 5, 1, so R = 1, 1/2, -1, 0. Mean 1/8,
    # squared distances 49, 9, 81, 1 (in 64ths) sum to 140, sd √(140 / 64 / 3) = 0.853913.
    # The second group's rewards are equal before the penalty: dropped.
    lengths = [2, 3, 5, 1, 2, 4, 4, 4]
    batch = literal(
        mask=[[1] * n + [0] * (5 - n) for n in lengths],
        advantages=[[9.0] * 5] * 8,
        reward=[1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0],
        group=[0] * 4 + [1] * 4,
    )
    result, _, _ = run(method("dapo", overlong_cache=2, max_length=4), batch)
    found = result.advantages[:4, 0].tolist()
    assert found == close([x / (0.853913 + 1e-4) for x in (0.875, 0.375, -1.125, -0.125)])
    assert result.mask.sum(1).tolist() == [2, 3, 5, 1, 0, 0, 0, 0]
    # A gap of the environment's tokens is no length.
    gap = replace(batch, mask=batch.mask & (torch.arange(5) != 1))
    found = run(method("dapo", overlong_cache=2, max_length=4), gap)[0].advantages[:4, 0]
    # n = 1, 2, 4, 1: R = 1, 1, -1, 0; mean 1/4, squares 9, 9, 25, 1 (in 16ths) sum to 44: sd √(44 / 16 / 3) = 0.957427
    assert found.tolist() == close([x / (0.957427 + 1e-4) for x in (0.75, 0.75, -1.25, -0.25)])


def test_top_entropy_with_both_denominators():
    # The 0.6-quantile of 1..5 is 3.4 (of four distances 2.4 are passed): 4 and 5 are kept, 2 of 5.
    batch = literal(mask=[[1] * 5 + [0]], advantages=[[2.0] * 6], entropy=[[1.0, 5.0, 3.0, 2.0, 4.0, 99.0]])
    of_all = advantages(method("top_entropy", fraction=0.4, denominator="all"), batch)
    assert of_all == [[0, 2, 0, 0, 2, 2]]
    assert advantages(method("top_entropy", fraction=0.4), batch) == [[0, 5, 0, 0, 5, 2]]
    # The 0.5-quantile is 3 itself, which is kept: "at or above".
    assert advantages(method("top_entropy", fraction=0.5, denominator="all"), batch) == [[0, 2, 2, 0, 2, 2]]


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 1.0])
def test_top_entropy_keeps_what_trl_keeps(fraction):
    same = SimpleNamespace(pad_across_processes=lambda x, **_: x, gather=lambda x: x)
    for seed in range(20):
        batch = sampled_batch(seed, width=5 + seed % 7)
        theirs = GRPOTrainer.get_high_entropy_mask(
            SimpleNamespace(accelerator=same), batch.entropy, batch.mask, 1 - fraction
        )
        ours = run(method("top_entropy", fraction=fraction, denominator="all"), batch)[0]
        assert ours.advantages[batch.mask].equal((batch.advantages * theirs)[batch.mask])


# mean A = 0, mean log p = -2: c = (A - 0)(log p + 2) = 4, 2, 0, 6, and the last token is the environment's.
COVARYING = {
    "mask": [[1, 1, 1, 1, 0]],
    "advantages": [[2.0, 2.0, -2.0, -2.0, 50.0]],
    "logp": [[0.0, -1.0, -2.0, -5.0, 50.0]],
    "old_logp": [[0.0, -1.0, -2.0, -5.0, 50.0]],
    "sample_id": [0],
}


@pytest.mark.parametrize(
    ("low", "high", "chosen"),
    [
        (1.0, 5.0, {0, 1}),
        (2.0, 5.0, {0}),  # both bounds are strict
        (1.0, 4.0, {1}),
        (1.0, 6.5, {0, 1, 3}),
        (-1.0, 1.0, {2}),
        (7.0, 9.0, set()),
    ],
)
def test_clip_cov_silences_tokens_between_its_bounds(low, high, chosen):
    found = advantages(method("clip_cov", fraction=1.0, low=low, high=high), literal(**COVARYING))[0]
    assert found == [0 if i in chosen else a for i, a in enumerate(COVARYING["advantages"][0])]
    assert method("clip_cov", clip=0.3).loss == LossOverrides(0.3, 0.3)


def test_clip_cov_leaves_tokens_alone_that_ppo_has_clipped():
    # c = 4, 2 with A > 0 and c = 6 with A < 0; ratios e^0.7 = 2.01, e^0.6 = 1.82, 1, e^-0.9 = 0.41.
    old = [[-0.7, -1.6, -2.0, -4.1, 50.0]]
    batch = literal(**COVARYING | {"old_logp": old})
    for clip, chosen in ((1.1, {0, 1, 3}), (1.0, {1, 3}), (0.7, {3}), (0.5, set())):
        found = advantages(method("clip_cov", fraction=1.0, high=9.0, clip=clip), batch)[0]
        assert {i for i, a in enumerate(found) if a == 0} == chosen


@pytest.mark.parametrize(("fraction", "count"), [(1e-9, 1), (0.49, 1), (0.5, 2), (0.74, 2), (0.75, 3)])
def test_clip_cov_silences_a_share_of_all_tokens_and_one_at_least(fraction, count):
    found = advantages(method("clip_cov", fraction=fraction, high=9.0), literal(**COVARYING))[0]
    assert found.count(0) == count  # of N = 4, three are eligible


def test_clip_cov_draws_at_random_and_says_how():
    # log p = -1 where A = 1 and -5 where A = -1, mean -3: c = 2 everywhere. Three of 20 tokens in each rollout.
    logp = [[-1.0] * 10 + [-5.0] * 10]
    batch = literal(advantages=[[1.0] * 10 + [-1.0] * 10], logp=logp, old_logp=logp, sample_id=[5])
    transform, counts, seen = method("clip_cov", fraction=0.15, seed=1), torch.zeros(20), set()
    state, rollouts = transform.init(), 250
    for _ in range(rollouts):
        result, state, _ = transform.update(batch, state)
        silent = result.advantages[0] == 0
        assert silent.sum() == 3
        counts += silent
        seen.add(tuple(silent.nonzero().flatten().tolist()))
    expected = rollouts * 3 / 20
    # Drawn without replacement: 19 / 17 times this has 19 degrees of freedom, above 43.8 once in a thousand.
    assert ((counts - expected) ** 2 / expected).sum() * 19 / 17 < 43.8
    assert len(seen) > 190  # of 1140 triples, 224 expected
    again = method("clip_cov", fraction=0.15, seed=1)
    assert run(again, batch, batch)[0].advantages.equal(run(transform, batch, batch)[0].advantages)
    others = [run(method("clip_cov", fraction=0.15, seed=seed), batch)[0].advantages for seed in range(20)]
    assert len({tuple(other.flatten().tolist()) for other in others}) > 15


def test_kl_cov_holds_the_tokens_with_the_largest_covariance():
    batch = literal(**COVARYING)  # c = 4, 2, 0, 6
    for fraction, held in ((1e-9, [0, 0, 0, 1]), (0.5, [1, 0, 0, 1]), (0.99, [1, 1, 0, 1]), (1.0, [1, 1, 1, 1])):
        result, _, _ = run(method("kl_cov", fraction=fraction, coefficient=0.3), batch)
        assert result.ratio_penalty[0].tolist() == close([0.3 * x for x in [*held, 0]])
        assert result.advantages.equal(batch.advantages)
    assert method("kl_cov").loss == LossOverrides(inf, inf)
    assert "reuse" in method("kl_cov").needs


def test_kl_cov_does_not_hold_a_token_at_an_infinite_distance():
    # A below the mean and log p = -inf: c = +inf. The penalty κ |log r| would make the whole loss infinite.
    batch = literal(**COVARYING | {"logp": [[0.0, -1.0, -2.0, -inf, 50.0]]})
    assert run(method("kl_cov", fraction=0.25), batch)[0].ratio_penalty[0, 3] == 0


def test_cw_grpo_by_hand():
    # c = 4, 2, 0, 6: mean 3, variance (1 + 1 + 9 + 9) / 4 = 5; w = exp(-c² / 10), Σ w = 1.899543.
    found = advantages(method("cw_grpo"), literal(**COVARYING))[0]
    weights = [4 * math.exp(-x / 10) / 1.899542 for x in (16, 4, 0, 36)]
    assert found == close([2 * weights[0], 2 * weights[1], -2 * weights[2], -2 * weights[3], 50])


def test_cw_grpo_weighs_one_on_average():
    for seed in range(5):
        batch = replace(sampled_batch(seed), advantages=torch.ones(16, 6) + torch.arange(16)[:, None])
        weight = run(method("cw_grpo"), batch)[0].advantages / batch.advantages
        assert weight[batch.mask].mean().item() == pytest.approx(1, abs=1e-6)
        assert weight[batch.mask].std() > 0.05


def test_clip_b_by_hand():
    # S = p (log p + H) with p = 1/e: 0 where H = 1, -1/e where H = 0. Of five: mean -0.2/e, sd 0.4/e, so that the one
    # stands 2 sd below the mean.
    batch = literal(
        mask=[[1, 1, 1, 1, 1, 0]],
        advantages=[[1.0, -1.0, -1.0, -1.0, -1.0, -1.0]],
        logp=[[-1.0] * 6],
        entropy=[[1.0, 1.0, 0.0, 1.0, 1.0, -80.0]],
    )
    assert advantages(method("clip_b", deviations=1.9, denominator="all"), batch) == [[1, -1, 0, -1, -1, -1]]
    assert advantages(method("clip_b", deviations=1.9), batch) == close([[1.25, -1.25, 0, -1.25, -1.25, -1]])
    assert advantages(method("clip_b", deviations=2.1), batch) == batch.advantages.tolist()
    praised = replace(batch, advantages=-batch.advantages)
    assert advantages(method("clip_b", deviations=1.9), praised) == praised.advantages.tolist()
    # It is p (log p + H): -1/e = -0.368 for p = 1/e, -2/e² = -0.271 for p = 1/e², three of 0. Mean -0.128, sd 0.159:
    # 1.51 and 0.90 sd below.
    two = literal(advantages=[[-1.0] * 5], logp=[[-1.0, -2.0, -1.0, -2.0, -3.0]], entropy=[[0.0, 0.0, 1.0, 2.0, 3.0]])
    for deviations, found in ((1.55, [-1, -1]), (1.45, [0, -1]), (0.92, [0, -1]), (0.88, [0, 0])):
        assert advantages(method("clip_b", deviations=deviations, denominator="all"), two) == [[*found, -1, -1, -1]]


def test_clip_v_by_hand():
    # Of N = 10: mean T 0.15, variance 1.25 / 10 - 0.0225, sd 0.320156; 1.5 sd = 0.48, 1.6 sd = 0.512.
    batch = literal(
        mask=[[1] * 10 + [0]],
        advantages=[[-1.0] * 9 + [1.0, -1.0]],
        sensitivity=[[0.5, 0.0, 1.0] + [0.0] * 7 + [70.0]],
    )

    def silenced(batch: Tokens, **settings) -> list[int]:
        found = advantages(method("clip_v", denominator="all", **settings), batch)[0]
        return [i for i, a in enumerate(found) if a == 0]

    assert silenced(batch, deviations=1.5, fraction=0.2) == [0, 2]
    assert silenced(batch, deviations=1.5, fraction=0.19) == [2]
    assert silenced(batch, deviations=1.5, fraction=1e-9) == [2]
    assert silenced(batch, deviations=1.6, fraction=0.2) == [2]
    assert silenced(batch, deviations=3.2, fraction=0.2) == []
    assert silenced(replace(batch, advantages=-batch.advantages), deviations=1.5, fraction=0.2) == []
    kept = advantages(method("clip_v", deviations=1.5, fraction=0.2), batch)[0]
    assert kept == close([0, -1.25, 0] + [-1.25] * 6 + [1.25, -1])


def test_entropy_advantage_by_hand():
    # A + min(0.4 H, |A| / 2)
    batch = literal(advantages=[[2.0, 2.0, -2.0, -2.0, 0.0]], entropy=[[1.0, 5.0, 1.0, 5.0, 5.0]])
    assert advantages(method("entropy_advantage", kappa=2.0), batch)[0] == close([2.4, 3.0, -1.6, -1.0, 0.0])
    assert advantages(method("entropy_advantage", kappa=4.0, alpha=0.1), batch)[0] == close([2.1, 2.5, -1.9, -1.5, 0])


def test_right_and_wrong_answers():
    batch = literal(advantages=[[0.3, 0.3]] * 3, reward=[1.0, 0.0, -0.5], group=[0, 0, 0])
    assert advantages(method("w_reinforce"), batch) == [close([0.1, 0.1]), [-1, -1], [-1, -1]]
    assert advantages(method("w_reinforce", right=2.0, wrong=0.5), batch) == [[2, 2], [-0.5, -0.5], [-0.5, -0.5]]
    wrong, right = run(method("nsr"), batch)[0], run(method("psr"), batch)[0]
    assert wrong.advantages[wrong.mask].tolist() == [-1] * 4
    assert wrong.mask.tolist() == [[False] * 2, [True] * 2, [True] * 2]
    assert right.advantages[right.mask].tolist() == [1] * 2
    assert right.mask.tolist() == [[True] * 2, [False] * 2, [False] * 2]


def test_steer_linear_by_hand():
    # p = 1/2 and H = log 2 + 2 x make (1 - p)(log p + H) = x. |O| = |A| r |x| = 0, 1, 3, 2 · 1/2 = 1, and the
    # environment's 40 is not the largest: 1.2 - 0.4 |O| / 3.
    half, doubled = math.log(0.5), math.log(0.25)
    batch = literal(
        mask=[[1, 1, 1, 1, 0]],
        advantages=[[1.0, 1.0, -3.0, -1.0, 1.0]],
        logp=[[half] * 5],
        old_logp=[[half, half, half, doubled, half]],
        entropy=[[-half + 2 * x for x in (0.0, -1.0, 1.0, 0.5, 40.0)]],
    )
    weights = [1.2, 1.2 - 0.4 / 3, 0.8, 1.2 - 0.4 / 3, 1]
    expected = [a * w for a, w in zip(batch.advantages[0].tolist(), weights, strict=True)]
    assert advantages(method("steer"), batch)[0] == close(expected)
    # k = -log 0.8 / 3: 0.8^(|O| / 3)
    weights = [1, 0.8 ** (1 / 3), 0.8, 0.8 ** (1 / 3), 1]
    expected = [a * w for a, w in zip(batch.advantages[0].tolist(), weights, strict=True)]
    assert advantages(method("steer", shape="exponential"), batch)[0] == close(expected)
    # All |O| within 0.02: k = -log 0.8 / 0.02. |O| = 0, 0.01: 1 and √0.8.
    small = replace(batch.cut(2), entropy=torch.tensor([[-half, -half + 0.02]]))
    assert advantages(method("steer", shape="exponential"), small)[0] == close([1, math.sqrt(0.8)])


def test_opefos_estimate_meets_the_textbooks_check_and_the_polarity_the_exact_value():
    """p = (0.8, 0.2), A = (0.2, -0.8), expectations over p, with H = 0.500402 and log p_v + H = (0.277259, -1.109035).

    d = -A (1 - p)² (log p + H) = (-0.2 · 0.04 · 0.277259, 0.8 · 0.64 · -1.109035) = (-0.002218, -0.567826), and
    0.8 · -0.002218 + 0.2 · -0.567826 = -0.115340. The exact first order is E[A T] = -E[A S], as E[A] = 0:
    S = p (log p + H) = (0.221807, -0.221807), and -(0.8 · 0.2 + 0.2 · 0.8) · 0.221807 = -0.070978.
    """
    p, A = torch.tensor([[0.8, 0.2]]).double(), torch.tensor([[0.2, -0.8]]).double()
    stats = token_stats(p.log().expand(2, 2), torch.tensor([0, 1]))
    batch = Tokens(
        mask=p > 0, advantages=A, logp=p.log(), entropy=stats.entropy[None], sensitivity=stats.sensitivity[None]
    )
    assert (p * token_flow(batch)).sum().item() == pytest.approx(-0.115340, abs=5e-7)
    assert (p * token_polarity(batch)).sum().item() == pytest.approx(-0.070978, abs=5e-7)


def test_opefo_by_hand():
    # Of H = log 2: p = 1/4 and A = 1: d = -9/16 (log 1/4 + log 2) = 9/16 log 2; p = 1/2: 0; p = 3/4 and A = 3:
    # d = -3/16 log 3/2. Then 1 + λ = 2 D- / (D+ + D-), 1 - λ = 2 D+ / (D+ + D-), and the third keeps its advantage.
    half, up, down = math.log(2), 9 / 16 * math.log(2), 3 / 16 * math.log(1.5)
    batch = literal(
        advantages=[[1.0, 3.0, 1.0]], logp=[[math.log(1 / 4), math.log(3 / 4), math.log(1 / 2)]], entropy=[[half] * 3]
    )
    weights = [2 * down / (up + down), 3 * 2 * up / (up + down), 1.0]
    assert advantages(method("opefo"), batch) == close([weights])
    one_sided = literal(advantages=[[1.0, -1.0]], logp=[[math.log(1 / 4), math.log(3 / 4)]], entropy=[[half] * 2])
    assert advantages(method("opefo"), one_sided) == [[1, -1]]


def test_opefo_with_the_polarity_by_hand():
    # P = 0.3, -0.1: λ = (0.1 - 0.3) / 0.4 = -1/2, and 0.3 · 1/2 = 0.1 · 3/2.
    batch = literal(advantages=[[1.0, 2.0, 1.0]], sensitivity=[[0.3, -0.05, 0.0]])
    assert advantages(method("opefo_polarity"), batch) == close([[0.5, 3.0, 1.0]])
    one_sided = literal(advantages=[[1.0, -1.0]], sensitivity=[[0.3, -0.1]])
    assert advantages(method("opefo_polarity"), one_sided) == [[1, -1]]


@pytest.mark.parametrize(("name", "flow"), [("opefo", token_flow), ("opefo_polarity", token_polarity)])
@pytest.mark.parametrize("seed", range(5))
def test_opefo_leaves_no_net_flow(seed, name, flow):
    batch = in_double(sampled_batch(seed))
    assert (batch.importance == 0).any()
    result, _, _ = run(method(name), batch)
    before, after = (predicted_entropy_change(flow(tokens), batch.mask).item() for tokens in (batch, result))
    assert abs(before) > 1e-3
    assert abs(after) < 1e-15


@pytest.mark.parametrize("conserve", [False, True])
def test_balance_leaves_no_net_flow_with_a_soft_sign_either(conserve):
    batch = in_double(sampled_batch(1))
    transform = method("papo", controller="balance", soft_sign=0.05, conserve=conserve)
    result, _, metrics = run(transform, batch)
    before, after = (predicted_entropy_change(token_polarity(tokens), batch.mask).item() for tokens in (batch, result))
    assert abs(metrics["polarity/lambda"]) < 0.8
    assert abs(after) < 1e-9 * abs(before)


def test_stare_by_hand():
    # -log p = 3, 1, 2 where A > 0, 4, 5 where A < 0; the share is rounded up.
    batch = literal(
        mask=[[1, 1, 1, 1, 1, 0]],
        advantages=[[1.0, 1.0, 1.0, -1.0, -1.0, 1.0]],
        logp=[[-3.0, -1.0, -2.0, -4.0, -5.0, -99.0]],
        entropy=[[0.2] * 5 + [70.0]],
    )
    assert advantages(method("stare"), batch) == close([[1.1, 1, 1, -1, -1, 1]])
    assert advantages(method("stare", fraction=0.34), batch) == close([[1.1, 1, 1.1, -1, -1, 1]])
    assert advantages(method("stare", variant="C2", positive=2.0), batch) == close([[2, 1, 1, -1, -0.9, 1]])
    assert advantages(method("stare", below=0.2), batch) == batch.advantages.tolist()  # the gate is strict
    assert run(method("stare", below=0.2), batch)[2] == {"polarity/stare_weight": 1.0}
    assert run(method("stare", positive=1.3), batch)[2] == {"polarity/stare_weight": 1.3}
    assert 0.07 * 100 == 7.000000000000001  # and no eighth token
    hundred = literal(advantages=[[1.0] * 100], logp=[[-float(i) for i in range(100)]], entropy=[[0.1] * 100])
    assert advantages(method("stare", fraction=0.07, positive=2.0), hundred)[0].count(2.0) == 7


def test_stare_adaptive_weights_move_before_they_are_used_and_keep_their_bounds():
    low = literal(advantages=[[1.0, -1.0]], logp=[[-1.0, -1.0]], entropy=[[0.2, 0.2]])
    high, even = replace(low, entropy=torch.tensor([[0.4, 0.4]])), replace(low, entropy=torch.tensor([[0.3, 0.3]]))
    transform = method("stare", variant="C2", adaptive=True, below=float(torch.tensor(0.3)))
    state, path = transform.init(), []
    for batch in (low, low, high, even, low):
        result, state, _ = run(transform, batch, state=state)
        path.append(result.advantages[0].tolist())
    # W = 1.11, 1.12, 1.11, 1.11, 1.12 and M = 0.89, 0.88, 0.89, 0.89, 0.88; unused where H is not below.
    assert path == close([[1.11, -0.89], [1.12, -0.88], [1, -1], [1, -1], [1.12, -0.88]])
    for batch, end in ((low, {"positive": 1.5, "negative": 0.5}), (high, {"positive": 1.0, "negative": 1.0})):
        assert run(transform, *[batch] * 60)[1] == pytest.approx(end)


def test_entropic_by_hand():
    transform = method("entropic", probability=0.5)

    def batch(entropy: float) -> Tokens:
        return literal(advantages=[[1.0, -1.0, 1.0]], logp=[[-0.5, -0.6, -0.8]], entropy=[[entropy] * 3])

    # p = 0.61, 0.55, 0.45. e = 0.2, Σ e = 0.2: a = 0.202. Then e = 0, Σ e = 0.2: 0.002. Then e = -0.1, Σ e = 0.1.
    state, found = transform.init(), []
    for entropy in (0.3, 0.1, 0.0):
        result, state, metrics = run(transform, batch(entropy), state=state)
        found.append(result.advantages[0].tolist())
        assert metrics["polarity/entropic_strength"] == pytest.approx({0.3: 0.202, 0.1: 0.002, 0.0: -0.099}[entropy])
    assert found == close([[1.202, -0.798, 1], [1.002, -0.998, 1], [0.901, -1.099, 1]])
    assert advantages(transform, batch(9.0)) == close([[2, 0, 1]])  # a is clipped at 1
    assert advantages(method("entropic", probability=0.5, target=9.0), batch(0.0)) == close([[0, -2, 1]])
    assert method("entropic", probability=0.5).init() == {"error_sum": 0}


def test_gepo_by_hand():
    def batch(low: float, high: float) -> Tokens:
        return literal(
            mask=[[1, 1], [1, 0], [1, 1], [1, 0]],
            advantages=[[2.0, 2.0], [-2.0, -2.0]] * 2,
            entropy=[[low - 1, low + 1], [low, 80.0], [high, high], [high, 80.0]],
            group=[4, 4, 9, 9],
        )

    # Group means 1 and 3: mean 2, sd 1; low is under 1.5, high is over 2.5.
    transform = method("gepo", width=0.5, rate=0.5)
    first, state, _ = run(transform, batch(1.0, 3.0))
    assert first.advantages.tolist() == close([[1, 1], [-2, -2], [2, 2], [-0.4, -2]])
    assert state == {"low": 1.5, "high": 2.5}
    # Means 2 and 4 move them half way to 2.5 and 3.5, to 2 and 3: 2 is not under 2.
    second, state, _ = run(transform, batch(2.0, 4.0), state=state)
    assert second.advantages.tolist() == close([[2, 2], [-2, -2], [2, 2], [-0.4, -2]])
    assert state == {"low": 2.0, "high": 3.0}
    gentle = method("gepo", width=0.5, rate=0.5, low=0.9, high=0.8)
    assert advantages(gentle, batch(1.0, 3.0)) == close([[1.8, 1.8], [-2, -2], [2, 2], [-1.6, -2]])


@pytest.mark.parametrize("quantile", [0.1, 0.25, 0.4, 0.5, 0.7])
@pytest.mark.parametrize("size", [2, 5, 6, 10, 11, 16])
def test_qae_of_right_and_wrong(quantile, size):
    """With n0 wrong answers the quantile stands K (n - 1) steps into the sorted rewards: 0 up to n0 - 1, 1 from n0."""
    for wrong in range(1, size):
        reward = [1.0] * (size - wrong) + [0.0] * wrong
        batch = literal(advantages=[[5.0]] * size, reward=reward, group=[2] * size)
        place = Fraction(str(quantile)) * (size - 1)
        baseline = float(min(max(place - (wrong - 1), 0), 1))
        deviation = math.sqrt(wrong * (size - wrong) / size / (size - 1))
        expected = [(r - baseline) / (deviation + 1e-4) for r in reward]
        assert [row[0] for row in advantages(method("qae", quantile=quantile), batch)] == close(expected)
        rate = Fraction(size - wrong, size)
        if baseline == 0:  # only successes teach, where they are the rarer
            assert rate < 1 - Fraction(str(quantile)) + Fraction(1, size)
        if baseline == 1:
            assert rate > 1 - Fraction(str(quantile)) - Fraction(1, size)


def test_qae_judges_each_group_by_itself():
    # K = 1/2: medians 1 and 5; sd of 0, 1, 5 is √7, of 5, 5, 8 is √3.
    batch = literal(advantages=[[0.0]] * 6, reward=[0.0, 5.0, 1.0, 8.0, 5.0, 5.0], group=[1, 0, 1, 0, 1, 0])
    groups = {1: (1.0, math.sqrt(7)), 0: (5.0, math.sqrt(3))}
    expected = [
        [(r - groups[g][0]) / (groups[g][1] + 1e-4)]
        for r, g in zip(batch.reward.tolist(), batch.group.tolist(), strict=True)
    ]
    assert advantages(method("qae", quantile=0.5), batch) == close(expected)


def test_the_entropy_bonus_is_one_coefficient():
    batch = sampled_batch(0)
    result, _, metrics = run(method("entropy_bonus", coefficient=-0.02), batch)
    assert (result.entropy_bonus == torch.tensor(-0.02)).all()
    assert result.advantages.equal(batch.advantages)
    assert metrics == {"polarity/entropy_coefficient": -0.02}


def test_the_adaptive_coefficient_by_hand():
    transform = method("adaptive_coefficient", target=0.2, step=1e-3, maximum=2.5e-3)
    state, applied = transform.init(), []
    for entropy in (0.1, 0.1, 0.1, 0.1, 0.3, nan, 0.1, 0.2, 0.2, 0.2, 0.2, 0.1, 0.1):
        batch = literal(advantages=[[1.0]], entropy=[[entropy]])
        assert transform.local(batch, state).entropy_bonus.equal(transform.update(batch, state)[0].entropy_bonus)
        result, state, metrics = run(transform, batch, state=state)
        assert result.entropy_bonus.item() == pytest.approx(metrics["polarity/entropy_coefficient"])
        applied.append(1e3 * result.entropy_bonus.item())
    # c in thousandths: 0, 1, 2, 2.5 (the maximum), 2.5 | 0.3: 1.5, off | NaN: as it was | 0.1: 2.5 | 0.2 is not below:
    # 1.5, 0.5, 0, 0 (the minimum), off | 0.1: 1
    assert applied == close([0, 1, 2, 2.5, 2.5, 0, 0, 2.5, 0, 0, 0, 0, 1])


def test_single_branches_by_hand():
    # P = 0.1, -0.2, -0.1, 0, NaN and one that the clip has killed
    batch = literal(
        advantages=[[1.0, 2.0, -1.0, 1.0, 1.0, 1.0]],
        sensitivity=[[0.1, -0.1, 0.1, 0.0, nan, 0.1]],
        importance=[[1.0, 1.0, 1.0, 1.0, 1.0, 0.0]],
    )
    assert advantages(method("papo_positive_only"), batch) == [[1, 0, 0, 0, 0, 0]]
    assert advantages(method("papo_negative_only"), batch) == [[0, 2, -1, 0, 0, 0]]


def test_a_random_half_has_the_size_of_a_branch_and_tokens_of_both():
    batch = sampled_batch(3, scale=20.0)
    sizes = {}
    for branch in ("positive", "negative"):
        kept = run(method(f"papo_{branch}_only"), batch)[0].advantages != 0
        transform = method("papo_random_half", size_of=branch)
        random, later = (run(transform, *rollouts)[0].advantages != 0 for rollouts in ([batch], [batch, batch]))
        sizes[branch] = int((kept & batch.mask).sum())
        assert (random & batch.mask).sum() == (later & batch.mask).sum() == sizes[branch]
        assert not random.equal(kept)
        assert not random.equal(later)
        other = polarity_sign(batch) == (-1 if branch == "positive" else 1)
        assert (random & other & batch.mask).any()
    assert sizes["positive"] != sizes["negative"]


def test_shuffled_signs_are_the_same_signs_on_other_tokens():
    batch = sampled_batch(3)
    shuffled = [replace(batch, sensitivity=shuffled_signs(batch, rollout)) for rollout in (0, 0, 1)]
    signs = [polarity_sign(tokens)[batch.mask] for tokens in (batch, *shuffled)]
    assert signs[1].equal(signs[2])
    assert not signs[1].equal(signs[3])
    assert not signs[0].equal(signs[1])
    for sign in signs[1:]:
        assert sign.sort().values.equal(signs[0].sort().values)
    moved = signs[0] != 0
    assert 0.3 < (signs[0] == signs[1])[moved].float().mean() < 0.7  # chance
    assert token_polarity(shuffled[0]).abs().equal(token_polarity(batch).abs())


def test_shuffled_papo_weighs_by_the_shuffled_signs_and_hands_the_sensitivity_back():
    batch = sampled_batch(3)
    settings = {"controller": "constant", "lambda_": 0.5}
    found = run(method("papo", sign_from="shuffled", **settings), batch)[0]
    seen = replace(batch, sensitivity=shuffled_signs(batch, 0))
    assert found.advantages.equal(run(method("papo", **settings), seen)[0].advantages)
    assert found.sensitivity is batch.sensitivity


def test_exact_signs_are_used_where_they_are_known():
    # T says expand, T* says contract, and on the next rollout there is no T*
    local = literal(advantages=[[1.0, -1.0]], sensitivity=[[0.1, 0.1]], entropy=[[1.0, 1.0]])
    exact = replace(local, exact_sensitivity=torch.tensor([[-0.3, 0.2]]))
    settings = {"controller": "constant", "lambda_": 0.5}
    transform = method("papo", sign_from="exact", every=2, **settings)
    assert transform.exact_every == make_transform("papo", {"sign_from": "exact", "every": 2}).exact_every == 2
    assert advantages(transform, exact) == [[0.5, -0.5]]
    assert advantages(transform, local) == [[1.5, -0.5]]
    assert run(transform, exact)[0].sensitivity is exact.sensitivity
    assert method("papo").exact_every == 0
    twice = chain(transform, method("papo", sign_from="exact", every=3), method("grpo"))
    assert twice.exact_every == 1  # every second and every third rollout


def test_loss_terms_and_their_gradient():
    # d(-β H)/dH = -β;  d(κ |log r|)/d log p = κ sign(log r), 0 at r = 1
    logp, entropy = (torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True) for _ in range(2))
    batch = literal(
        advantages=[[1.0] * 3],
        old_logp=[[-1.5, -2.0, -2.0]],
        entropy_bonus=[[0.1, 0.2, 0.0]],
        ratio_penalty=[[0.5, 0.5, 0.7]],
    )
    assert loss_terms(replace(batch, entropy_bonus=None, ratio_penalty=None)) is None
    live = replace(batch, logp=logp, entropy=entropy)
    terms = loss_terms(live)
    assert terms.tolist() == close([[0.1 + 0.25, 0.4 + 0.0, 0.7]])
    terms.sum().backward()
    assert logp.grad.tolist() == close([[0.5, 0.0, -0.7]])
    assert entropy.grad.tolist() == close([[-0.1, -0.2, 0.0]])
    assert loss_terms(replace(live, ratio_penalty=None)).tolist() == close([[0.1, 0.4, 0.0]])
    assert loss_terms(replace(live, entropy_bonus=None)).tolist() == close([[0.25, 0.0, 0.7]])
    with pytest.raises(ValueError, match="facts 'old_logp' are needed"):
        loss_terms(replace(live, old_logp=None))


# ---- draws and means over the batch ----------------------------------------------------------------------


def test_token_keys_do_not_collide_and_look_like_coin_flips():
    def share_of_ones(keys: torch.Tensor) -> torch.Tensor:
        return torch.stack([((keys >> bit) & 1).double().mean() for bit in range(64)])

    keys = token_keys(torch.arange(1000), 1000, seed=0, rollout=0)
    assert len(keys.unique()) == 10**6
    assert abs(share_of_ones(keys) - 0.5).max() < 5 * 0.5 / 1000
    some, tolerance = keys[:200], 5 * 0.5 / math.sqrt(200_000)
    # From one position, sample, rollout or seed to the next every bit flips half of the time.
    for other in (
        keys[:200].roll(1, 1),
        keys[1:201],
        *(token_keys(torch.arange(200), 1000, *x) for x in ((0, 1), (1, 0))),
    ):
        assert abs(share_of_ones(some ^ other) - 0.5).max() < tolerance
    assert token_keys(torch.tensor([700, 3]), 10, 0, 0).equal(keys[[700, 3], :10])
    for seed, rollout in ((-1, 0), (2**63 - 1, 10**9)):
        assert len(token_keys(torch.arange(10), 10, seed, rollout).unique()) == 100


def test_equal_scores_do_not_make_a_choice_depend_on_the_order():
    """Completions of one prompt that begin alike have one log-prob there, and one advantage if they are both right."""
    batch = literal(
        advantages=[[1.0], [1.0], [1.0], [-1.0]],
        logp=[[-2.0], [-2.0], [-2.0], [-1.0]],
        entropy=[[0.1]] * 4,
        sample_id=[0, 1, 2, 3],
    )
    order = torch.tensor([2, 3, 0, 1])
    for transform in (method("stare"), method("kl_cov")):
        assert_same(run(transform, batch.rows(order))[0], run(transform, batch)[0].rows(order))


def test_the_mean_entropy_of_ragged_groups_by_hand():
    # Groups {1, 3} and {5}: sums 4 and 5, counts 2 and 1, H = 3; σ² = 2 ((4 - 6)² + (5 - 3)²) / 9 = 16 / 9
    batch = literal(
        mask=[[1, 0], [1, 0], [1, 1], [0, 0]],
        advantages=[[0.0, 0.0]] * 4,
        entropy=[[1.0, 9.0], [3.0, 9.0], [5.0, nan], [9.0, 9.0]],
        group=[0, 0, 1, 2],
    )
    assert mean_entropy(batch) == pytest.approx((3, 4 / 3))
    # Each response by itself: 3 (4 + 0 + 4) / 2 / 9 = 4 / 3
    assert mean_entropy(replace(batch, group=None)) == pytest.approx((3, math.sqrt(4 / 3)))
    assert mean_entropy(batch.rows(slice(0, 2))) == (2, 0)
    assert mean_entropy(batch.rows(slice(3, 4)))[1] == 0


def test_the_standard_error_of_the_mean_entropy_is_that_of_clustered_data():
    """Prompts differ in entropy and in the length of their completions, and the two go together."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    means, errors, naive = [], [], []
    for _ in range(400):
        difficulty = normal(16, 1, 1)
        length = (8 + 3 * difficulty + normal(16, 4, 1)).clamp(1, 16)
        entropy = (1 + 0.3 * difficulty + 0.1 * normal(16, 4, 1) + 0.2 * normal(16, 4, 16)).flatten(0, 1)
        mask = (torch.arange(16) < length).flatten(0, 1)
        batch = Tokens(mask, torch.zeros_like(entropy), entropy=entropy, group=torch.arange(64) // 4)
        mean, error = mean_entropy(batch)
        means.append(mean)
        errors.append(error)
        naive.append(entropy[mask].std().item() / math.sqrt(mask.sum()))
    spread = torch.tensor(means).std().item()  # known to 1 / √800 = 3.5 %
    assert torch.tensor(errors).square().mean().sqrt().item() == pytest.approx(spread, rel=0.12)
    assert sum(naive) / len(naive) < 0.4 * spread


def test_the_largest_by_hand():
    scores = torch.tensor([[3.0, nan, 1.0], [inf, 2.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    for count, expected in ((0, []), (1, [3]), (2, [0, 3]), (3, [0, 3, 4]), (9, [0, 2, 3, 4])):
        assert largest(scores, mask, count).flatten().nonzero().flatten().tolist() == expected


# ---- verl's own functions --------------------------------------------------------------------------------


def verl_tokens(batch: dict) -> Tokens:
    columns = {name: torch.tensor(batch[name], dtype=getattr(torch, batch["dtype"])) for name in
               ("advantages", "log_prob", "old_log_prob")}  # fmt: skip
    return Tokens(
        torch.tensor(batch["mask"]).bool(),
        columns["advantages"],
        logp=columns["log_prob"].requires_grad_(),
        old_logp=columns["old_log_prob"],
    )


def policy_loss(tokens: Tokens, low: float, high: float, dual_clip: float = inf) -> torch.Tensor:
    """The clipped surrogate, mean over the tokens; where A < 0 the ratio counts up to `dual_clip`."""
    ratio, a = (tokens.logp - tokens.old_logp).exp(), tokens.advantages
    surrogate = torch.min(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
    surrogate = torch.where(a < 0, torch.max(surrogate, dual_clip * a), surrogate)
    return -surrogate[tokens.mask].mean()


@pytest.mark.parametrize("index", range(len(VERL["cases"])))
def test_loss_and_gradient_are_verls(index):
    case = VERL["cases"][index]
    name, batch, settings = case["policy_loss"], VERL["batches"][case["batch"]], case["settings"]
    tokens = verl_tokens(batch)
    facts, selected = tokens.detach(), torch.zeros_like(tokens.mask)
    for row, column in case.get("selected", ()):
        selected[row, column] = True
    low, high = settings.get("clip_ratio_low"), settings.get("clip_ratio_high")
    if name == "clip_cov":
        bounds = settings["clip_cov_lb"], settings["clip_cov_ub"], low
        keys = torch.tensor(batch["keys"])
        chosen = clip_cov_choice(facts, keys, settings["clip_cov_ratio"], *bounds)
        assert chosen.equal(selected)
        assert clip_cov_choice(facts, keys, 1.0, *bounds).sum() == case["eligible"]
        silenced = tokens.advantages.masked_fill(chosen, 0)
        loss = loop.policy_loss(replace(tokens, advantages=silenced), (low, high))
        torch.testing.assert_close(policy_loss(replace(tokens, advantages=silenced), low, high), loss)
    elif name == "kl_cov":
        transform = method("kl_cov", fraction=settings["kl_cov_ratio"], coefficient=settings["ppo_kl_coef"])
        decided = run(transform, facts)[0]
        assert (decided.ratio_penalty > 0).equal(selected)
        live = replace(tokens, ratio_penalty=decided.ratio_penalty)
        loss = loop.policy_loss(live, (transform.loss.clip_low, transform.loss.clip_high))
        loss = loss + loss_terms(live)[tokens.mask].mean()
    else:
        loss = policy_loss(tokens, low, high, settings["clip_ratio_c"])
    gradient = torch.tensor(case["gradient"], dtype=tokens.advantages.dtype)
    assert loss.item() == pytest.approx(case["loss"], rel=1e-6)
    (found,) = torch.autograd.grad(loss, tokens.logp)
    torch.testing.assert_close(found, gradient, rtol=1e-6, atol=1e-6 * gradient.abs().max().item())


def test_the_cases_of_verl_are_not_idle():
    assert {case["policy_loss"] for case in VERL["cases"]} == {"clip_cov", "kl_cov", "vanilla"}
    for batch in VERL["batches"].values():
        assert not all(map(all, batch["mask"]))
    with_choice = [case for case in VERL["cases"] if case["policy_loss"] == "clip_cov" and case["selected"]]
    assert any(len(case["selected"]) < case["eligible"] for case in with_choice)


def test_a_completion_that_nothing_could_judge_teaches_nothing():
    """Its reward is NaN: advantage 0, in no group statistic, and the others are as without it."""
    rewards, group = [1.0, 0.0, nan, 1.0, 1.0], [0, 0, 0, 1, 1]
    batch = literal(mask=[[1]] * 5, advantages=[[0.7], [-0.7], [0.0], [0.0], [0.0]], reward=rewards, group=group)
    others = [0, 1, 3, 4]
    for name in ("dapo", "qae", "w_reinforce", "nsr", "psr"):
        whole = run(method(name), batch)[0]
        without = run(method(name), batch.rows(torch.tensor(others)))[0]
        assert whole.advantages[others].equal(without.advantages), name
        assert whole.mask[others].equal(without.mask), name
        assert whole.advantages[2].item() == 0, name
