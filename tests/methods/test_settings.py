"""From a name and settings to a transform: what is refused, who takes which setting, and chains by name."""

import math
from dataclasses import replace

import pytest
from batches import run, sampled_batch
from cases import assert_same, method

from entropy_polarity.methods import chain_name, check_method, make_transform
from entropy_polarity.methods.description import describe_methods
from entropy_polarity.transforms import LossOverrides, chain

nan, inf = math.nan, math.inf

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
    ("dapo", {"max_length": 8}, "max_length=8 does nothing without overlong_cache"),
    ("clip_b", {"deviations": -1.0}, "deviations is -1.0"),
    ("clip_v", {"deviations": -1.0}, "deviations is -1.0"),
    ("entropic", {"probability": 0.5, "integral_gain": -1.0}, "integral_gain is -1.0"),
    ("adaptive_coefficient", {"target": -1.0}, "target is -1.0"),
    ("w_reinforce", {"right": -1.0}, "right is -1.0"),
    ("w_reinforce", {"wrong": -1.0}, "wrong is -1.0"),
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


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("pappo", {}, "unknown method 'pappo': did you mean 'papo'[?] Known: adaptive_coefficient, clip_b"),
        ("grpo", {"gain": 1}, "unknown setting of method 'grpo' 'gain'"),
        ("papo", {"controller": "trand"}, "unknown controller 'trand': did you mean 'trend'"),
        ("papo", {"gian": 1}, "unknown setting .*'reference' 'gian': did you mean 'gain'"),
        (
            "papo",
            {"controller": "balance", "gain": 1},
            "'gain' is no setting of papo's controller 'balance' .lambda_max., but of controller trend",
        ),
        ("papo", {"controller": "constant", "lambda": 0.1}, "did you mean 'lambda_'"),
        ("papo", {"soft_sing": 0.1}, "did you mean 'soft_sign'"),
        ("papo", {"controler": "trend"}, "did you mean 'controller'"),
        ("papo", {"soft_sign": -0.1}, "soft_sign is -0.1; expected a width >= 0"),
        ("papo", {"sign_from": "exakt"}, "is 'exakt'; expected Literal"),
        ("papo", {"sign_from": "exact", "every": 0}, "every is 0"),
        ("papo", {"every": 2}, "every is 2, sign_from 'local'; expected"),
        ("papo_random_half", {"size_of": "positve"}, "is 'positve'; expected Literal"),
        ("papo", {"soft_sign": nan}, "'soft_sign' of method 'papo' is nan"),
        ("papo", {"gain": -2}, "gain is -2"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_make_transform_names_what_was_meant(name, settings, told):
    with pytest.raises(ValueError, match=told):
        make_transform(name, settings)


def test_a_method_lists_its_settings_with_their_defaults():
    rows = {row["name"]: row for row in describe_methods()}
    assert rows["papo"]["settings"] == {
        "controller": "reference",
        "soft_sign": 0.0,
        "conserve": False,
        "sign_from": "local",
        "every": 1,
    }
    assert rows["papo"]["controllers"]["balance"] == {
        "default": False,
        "decides": "whole batch",
        "settings": {"lambda_max": 0.8},
    }
    assert [name for name, row in rows["papo"]["controllers"].items() if row["default"]] == ["reference"]
    assert rows["grpo"]["settings"] == rows["grpo"]["controllers"] == {}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"controller": 5}, "setting 'controller' of method 'papo' is 5; expected str"),
        ({"gain": "high"}, "setting 'gain' of papo's controller 'reference' is 'high'; expected float"),
        ({"conserve": "no"}, "setting 'conserve' of method 'papo' is 'no'; expected bool"),
        ({"soft_sign": "x"}, "setting 'soft_sign' of method 'papo' is 'x'; expected float"),
        ({"controller": "reference", "path": "linear", "horizon": "x"}, "setting 'horizon' .* expected int"),
        ({"controller": "reference", "path": "lnear"}, "setting 'path' .* is 'lnear'; expected .*'cosine'"),
    ],
)
def test_settings_of_the_wrong_type_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        make_transform("papo", settings)


# ---- chains by name --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dapo+papo", ["dapo", "papo"], ("dapo", "papo")])
def test_a_chain_has_a_name(name):
    settings = {"clip_high": 0.3, "controller": "constant", "lambda_": 0.5}
    transform, batch = make_transform(name, settings), sampled_batch(2)
    batch = replace(batch, reward=batch.reward.masked_fill(batch.group == 2, 1.0))  # something to drop
    assert transform.loss == LossOverrides(0.2, 0.3, "token")
    assert transform.needs == {"reward", "group", "entropy", "sensitivity"}
    both = chain(method("dapo", clip_high=0.3), method("papo", controller="constant", lambda_=0.5))
    found, expected = run(transform, batch), run(both, batch)
    assert_same(found[0], expected[0], rtol=0, atol=0)
    assert found[1:] == expected[1:]
    assert found[0].index.equal((batch.group != 2)[batch.response].nonzero().flatten())
    assert chain_name(name) == "dapo+papo"


def test_a_setting_that_two_methods_of_a_chain_take_stands_in_the_table_of_one():
    settings = {"clip_v": {"fraction": 0.5}, "top_entropy": {"fraction": 0.3, "denominator": "all"}}
    batch = sampled_batch(1)
    found = run(make_transform("top_entropy+clip_v", settings | {"deviations": 0.3}), batch)[0]
    first = run(method("top_entropy", fraction=0.3, denominator="all"), batch)[0]
    expected = run(method("clip_v", deviations=0.3, fraction=0.5), first)[0]
    assert_same(found, expected, rtol=0, atol=0)
    assert not expected.advantages.equal(first.advantages)
    with pytest.raises(ValueError, match=r"setting 'fraction' .* is one of .*: write it as clip_v\.fraction"):
        make_transform("top_entropy+clip_v", {"fraction": 0.5})


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("dapo+dapo", {}, "'dapo[+]dapo' names a method twice"),
        ("dapo+pappo", {}, "unknown method 'pappo': did you mean 'papo'"),
        ("dapo+", {}, "unknown method 'dapo[+]'"),
        ([], {}, r"unknown method \[\]"),
        ({"x": 1}, {}, "unknown method {'x': 1}"),
        ("papo+qae", {}, "methods papo and qae do not go together: one that makes advantages anew .* put it first"),
        ("papo+nsr", {}, "put it first"),
        ("papo+w_reinforce", {}, "put it first"),
        ("papo+dapo", {"overlong_cache": 2, "max_length": 9}, "put it first"),
        ("dapo+papo", {"gian": 1.0}, "'dapo[+]papo' 'gian': did you mean 'gain'"),
        ("dapo+papo", {"papo": {"clip_high": 1.0}}, "'clip_high'"),
        ("dapo+papo", {"clip_high": "1"}, "setting 'clip_high' of method 'dapo' is '1'; expected float"),
        ("dapo+entropic", {}, "method 'entropic' needs a value for probability"),
        ("dapo+clip_cov", {}, "methods dapo and clip_cov do not go together: .* sets clip_low to 0.2, another to 1.0"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_methods_that_make_no_chain_are_refused_in_one_line(name, settings, told):
    for check in (make_transform, check_method):
        with pytest.raises(ValueError, match=told) as refusal:
            check(name, settings)
        assert "\n" not in str(refusal.value)


def test_two_entropy_bonuses_add_up():
    batch = sampled_batch(1)
    transform = make_transform("entropy_bonus+adaptive_coefficient", {"coefficient": 0.01, "target": 9.0})
    state = transform.update(batch, transform.init())[1]
    assert transform.local(batch, state).entropy_bonus[0].item() == pytest.approx(0.01 + 1e-4)
    assert transform.update(batch, state)[0].entropy_bonus[0].item() == pytest.approx(0.01 + 1e-4)


def test_a_chain_makes_advantages_anew_where_its_first_method_does():
    assert not make_transform("papo+dapo").replaces_advantages
    assert make_transform("qae+papo").replaces_advantages
