"""Controllers by numbers worked out by hand, and the bounds that hold for any trajectory."""

import json
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entropy_polarity.controllers import CONTROLLERS, Controller, Observation, balance, constant, reference, trend

nan, inf = math.nan, math.inf
ENTROPIES = st.lists(st.one_of(st.floats(0, 12), st.sampled_from([0.0, nan])), min_size=1, max_size=8)


def follow(controller: Controller, entropies: list[float]) -> tuple[list[float], list[dict], dict]:
    """λ and metrics after each rollout, and the last state."""
    state, lambdas, metrics = controller.init(), [], []
    for h in entropies:
        lam, state, measured = controller.update(Observation(h, 0.1, 0.2), state)
        lambdas.append(lam)
        metrics.append(measured)
    return lambdas, metrics, state


def targets(controller: Controller, entropies: list[float]) -> list[float]:
    return [m["polarity/entropy_reference"] for m in follow(controller, entropies)[1]]


def test_constant_is_constant_from_the_first_rollout():
    law = constant(-0.3)
    assert law.start == -0.3
    assert follow(law, [1.0, 0.1, nan])[0] == [-0.3] * 3


def test_trend_compares_two_moving_averages():
    # fast: 1, 1 - 0.4/2 = 0.8, 0.8 + 0.2/2 = 0.9;  slow: 1, 1 - 0.4/4 = 0.9, 0.9 + 0.1/4 = 0.925
    # λ = 2 (slow - fast) / slow = 0, 2 · 0.1 / 0.9, 2 · 0.025 / 0.925
    lambdas, metrics, state = follow(trend(gain=2.0, fast=2.0, slow=4.0), [1.0, 0.6, 1.0])
    assert lambdas == pytest.approx([0, 2 / 9, 2 / 37])
    assert [m["polarity/entropy_fast"] for m in metrics] == pytest.approx([1, 0.8, 0.9])
    assert [m["polarity/entropy_slow"] for m in metrics] == pytest.approx([1, 0.9, 0.925])
    assert state == pytest.approx({"fast": 0.9, "slow": 0.925})


@given(st.floats(0.5, 5), st.floats(0.5, 0.98), st.integers(2, 12))
def test_trend_leans_against_a_falling_and_a_rising_entropy(first, rate, rollouts):
    falling = [first * rate**k for k in range(rollouts)]
    assert all(lam > 0 for lam in follow(trend(), falling)[0][1:])
    assert all(lam < 0 for lam in follow(trend(), falling[::-1])[0][1:])
    assert follow(trend(), [first] * rollouts)[0] == [0] * rollouts


def test_reference_is_proportional_to_the_relative_distance_and_clipped():
    # gain (level - H) / level = 2 (0.5 - H) / 0.5: 0.4, 0, -0.4; H = 0.1 asks for 1.6 and H = 2 for -6.
    lambdas = follow(reference(gain=2.0, level=0.5, lambda_max=0.8, path="constant"), [0.4, 0.5, 0.6, 0.1, 2.0])[0]
    assert lambdas == pytest.approx([0.4, 0, -0.4, 0.8, -0.8])


def test_reference_at_the_whole_first_entropy_holds_it():
    assert follow(reference(gain=1.0, fraction=1.0), [2.0, 1.5, 2.5])[0] == pytest.approx([0, 0.25, -0.25])


def test_reference_untold_goes_to_six_tenths_of_the_first_entropy_in_fifty_rollouts():
    line = targets(reference(), [2.0] * 60)
    assert line[:50] == pytest.approx([2.0 - 0.8 * k / 50 for k in range(50)])
    assert line[50:] == pytest.approx([1.2] * 10)
    assert targets(reference(level=0.5), [2.0] * 51)[-1] == pytest.approx(0.5)
    assert targets(CONTROLLERS["thermostat"](), [2.0, 1.0]) == [2.0, 2.0]  # its own defaults hold what it finds


def test_reference_at_a_fraction_of_the_first_entropy_holds_from_the_start():
    law = reference(gain=0.1, fraction=0.5, path="constant")
    assert follow(law, [2.0, 1.0, 0.0])[0] == pytest.approx([-0.1, 0, 0.1])  # H_ref = 0.5 · 2 = 1: λ = 0.1 (1 - H)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("constant", [0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
        ("linear", [1.0, 0.875, 0.75, 0.625, 0.5, 0.5]),
        # (1 - cos(π k / 4)) / 2 of the way from 1 to 0.5; cos(π / 4) = √½
        ("cosine", [1.0, 0.75 + math.sqrt(0.5) / 4, 0.75, 0.75 - math.sqrt(0.5) / 4, 0.5, 0.5]),
    ],
)
@pytest.mark.parametrize("end", [{"level": 0.5}, {"fraction": 0.5}])
def test_reference_paths_start_at_the_first_entropy_and_stay_at_the_end(path, expected, end):
    law = reference(path=path, horizon=4, **end)
    assert targets(law, [1.0, 0.9, 3.0, 0.2, 0.7, 0.6]) == pytest.approx(expected)  # whatever H does meanwhile


@given(st.floats(0.1, 5), st.floats(0.1, 5), st.integers(1, 12), st.sampled_from(["linear", "cosine"]))
def test_reference_paths_never_turn_back(first, level, horizon, path):
    line = targets(reference(level=level, path=path, horizon=horizon), [first] * (horizon + 2))
    assert line[0] == pytest.approx(first)
    assert line[horizon:] == pytest.approx([level, level])
    way = [(after - before) * (level - first) for before, after in pairwise(line)]
    assert min(way) >= -1e-12


@pytest.mark.parametrize(
    ("positive", "negative", "expected"),
    [
        (0.1, 0.3, 0.5),  # 0.1 (1 + 0.5) = 0.3 (1 - 0.5)
        (0.3, 0.1, -0.5),
        (0.2, 0.2, 0.0),
        (0.01, 0.99, 0.8),  # 0.98 is asked for
        (0.99, 0.01, -0.8),
        (0.0, 0.3, 0.0),  # nothing to balance with
        (0.3, 0.0, 0.0),
        (0.0, 0.0, 0.0),
        (nan, 0.3, 0.0),
    ],
)
def test_balance_asks_for_zero_net_flow(positive, negative, expected):
    assert balance().update(Observation(1.0, positive, negative), {})[0] == pytest.approx(expected)


@given(st.floats(1e-6, 10), st.floats(1e-6, 10))
def test_balance_within_its_clip_makes_both_flows_equal(positive, negative):
    lam = balance(lambda_max=0.9).update(Observation(1.0, positive, negative), {})[0]
    if abs(lam) < 0.9:
        assert positive * (1 + lam) == pytest.approx(negative * (1 - lam), rel=1e-9)


def test_which_controllers_need_the_batch_they_weigh():
    assert {name: build().causal for name, build in CONTROLLERS.items()} == {
        "trend": True,
        "reference": True,
        "thermostat": False,
        "constant": True,
        "balance": False,
    }
    assert [trend().start, reference().start, constant().start] == [0, 0, 0]


LAWS = {
    "trend": trend(gain=3.0),
    "reference": reference(level=0.5),
    "reference, falling": reference(fraction=0.3, path="cosine", horizon=5),
    "balance": balance(),
    "constant": constant(0.2),
}


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_a_state_saved_as_json_continues_the_same_trajectory(law):
    entropies = [1.0, 0.9, 0.85, 0.7, 0.75, 0.5]
    whole = follow(law, entropies)[0]
    state, resumed = law.init(), []
    for h in entropies:
        state = json.loads(json.dumps(state, allow_nan=False))
        lam, state, _ = law.update(Observation(h, 0.1, 0.2), state)
        resumed.append(lam)
    assert resumed == whole


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_an_update_leaves_the_state_it_was_given_alone(law):
    _, _, state = follow(law, [1.0, 0.8])
    before = json.dumps(state)
    law.update(Observation(0.3, 0.1, 0.2), state)
    assert json.dumps(state) == before


@given(ENTROPIES, st.floats(0, 1e6), st.floats(0, 0.99), st.sampled_from(["constant", "linear", "cosine"]))
def test_lambda_never_leaves_its_bounds(entropies, gain, bound, path):
    laws = [
        trend(gain, bound),
        reference(gain, bound, path=path, horizon=3),
        reference(gain, bound, fraction=0.5, path=path, horizon=3),
        reference(gain, bound, level=0.4, path=path, horizon=3),
    ]
    for law in laws:
        assert all(-bound <= lam <= bound for lam in follow(law, entropies)[0])


@given(st.floats(0, 10), st.floats(0, 10), st.floats(0, 0.99))
def test_balance_never_leaves_its_bounds(positive, negative, bound):
    lam = balance(bound).update(Observation(1.0, positive, negative), {})[0]
    assert -bound <= lam <= bound


def test_a_law_that_asks_for_more_than_a_float_holds_is_clipped_not_dropped():
    assert follow(reference(gain=inf, level=1.0, lambda_max=0.8, path="constant"), [0.5])[0] == [0.8]


@pytest.mark.parametrize("law", [trend(), reference(), reference(level=0.9)])
@pytest.mark.parametrize("entropies", [[1.0, nan, 0.5, 0.4], [nan, 1.0, 0.5, 0.4]])
def test_one_rollout_of_unknown_entropy_does_not_end_the_control(law, entropies):
    # One token with non-finite statistics makes the mean entropy of its batch NaN.
    lambdas, _, state = follow(law, entropies)
    assert lambdas[entropies.index(nan)] == 0
    assert lambdas[-1] > 0  # the entropy fell since
    json.dumps(state, allow_nan=False)


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: constant(1.0), r"lambda_ is 1.0; expected a value from -0.999 to 0.999: no branch may be silenced"),
        (lambda: constant(-1.0), "lambda_ is -1.0"),
        (lambda: constant(nan), "lambda_ is nan"),
        (lambda: trend(gain=-1), "gain is -1; expected at least 0"),
        (lambda: trend(gain=nan), "gain is nan"),
        (lambda: trend(lambda_max=1), "lambda_max is 1; expected a value from 0 to 0.999: no branch may be silenced"),
        (lambda: trend(lambda_max=-0.1), "lambda_max is -0.1"),
        (lambda: trend(lambda_max=nan), "lambda_max is nan"),
        (lambda: trend(fast=0.5), "fast is 0.5; expected at least 1"),
        (lambda: trend(fast=5, slow=4), "slow is 4; expected at least 5"),
        (lambda: trend(fast=nan), "fast is nan"),
        (lambda: reference(gain=-1), "gain is -1"),
        (lambda: reference(lambda_max=1.5), "lambda_max is 1.5"),
        (lambda: reference(level=0.4, fraction=0.5), "level=0.4 and fraction=0.5 were both given"),
        (lambda: reference(level=0), "level is 0; expected an entropy above 0 nats"),
        (lambda: reference(level=nan), "level is nan"),
        (lambda: reference(fraction=-0.5), "fraction is -0.5; expected a positive part"),
        (lambda: reference(fraction=nan), "fraction is nan"),
        (lambda: reference(path="sine"), "path is 'sine'; expected 'constant', 'linear' or 'cosine'"),
        (lambda: reference(horizon=0), "path 'linear' needs horizon >= 1 rollouts, got 0"),
        (lambda: reference(path="cosine", horizon=-3), "got -3"),
        (lambda: balance(lambda_max=1.0), "lambda_max is 1.0"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_settings_that_make_no_controller_are_refused(build, told):
    with pytest.raises(ValueError, match=told):
        build()
