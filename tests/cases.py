"""Every method as the tests try it, and small batches whose numbers are easy to follow."""

import math
from dataclasses import replace

import pytest
import torch
from batches import by_row, outputs, run, sampled_batch, with_columns

from entropy_polarity import controllers
from entropy_polarity.methods import METHODS
from entropy_polarity.tokens import Tokens
from entropy_polarity.transforms import Transform, polarity_weights

nan, inf = math.nan, math.inf

# Every method as its row gives it, papo with every controller, and where the defaults would find nothing to do among
# so few tokens, with settings that do.
CASES: dict[str, tuple[str, dict]] = {
    **{name: (name, method.example) for name, method in METHODS.items()},
    **{f"papo {name}": ("papo", {"controller": name}) for name in controllers.CONTROLLERS},
    "papo conserving": ("papo", {"controller": "balance", "soft_sign": 0.02, "conserve": True}),
    "papo weighing": ("papo", {"controller": "constant", "lambda_": -0.4, "soft_sign": 0.02}),
    "papo conserving weights": ("papo", {"controller": "constant", "lambda_": 0.5, "conserve": True}),
    "papo trend steep": ("papo", {"controller": "trend", "gain": 1.0}),
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


def flattened(state, prefix: str = "") -> dict[str, float]:
    if isinstance(state, dict | list):
        inner = state.items() if isinstance(state, dict) else enumerate(state)
        return {key: x for name, value in inner for key, x in flattened(value, f"{prefix}.{name}").items()}
    return {prefix: nan if state is None else state}


def without(tokens: Tokens, dropped: torch.Tensor) -> Tokens:
    """The batch in which these tokens never were; their responses stay."""
    return replace(tokens.select(~dropped), index=None)


def one_hot(batch: Tokens) -> Tokens:
    values = dict.fromkeys(("logp", "old_logp", "entropy", "sensitivity"), 0.0) | {"importance": 1.0}
    return with_columns(batch, lambda name, x: torch.full_like(x, values[name]) if name in values else x)


def at_one_token(batch: Tokens, **values: float) -> Tokens:
    """With these numbers at the first token of the second response."""

    def changed(name: str, column: torch.Tensor) -> torch.Tensor:
        column = column.clone()
        if name in values:
            column[(batch.response == 1) & (batch.position == 0)] = values[name]
        return column

    return with_columns(batch, changed)


def advantages(transform: Transform, *rollouts: Tokens) -> list[list[float]]:
    """What the last of these rollouts becomes: one list per response, of the tokens that were kept."""
    result = run(transform, *rollouts)[0]
    return by_row(result, result.advantages)


def method(name: str, **settings) -> Transform:
    return METHODS[name].build(**settings)


def close(values: list) -> object:
    """Nested lists, to the rounding of float32."""
    nested = any(isinstance(value, list) for value in values)
    return [close(value) for value in values] if nested else pytest.approx(values, rel=1e-5, abs=1e-6)


# mean A = 0, mean log p = -2: c = (A - 0)(log p + 2) = 4, 2, 0, 6, and the last token, the environment's, is not there.
COVARYING = {
    "mask": [[1, 1, 1, 1, 0]],
    "advantages": [[2.0, 2.0, -2.0, -2.0, 50.0]],
    "logp": [[0.0, -1.0, -2.0, -5.0, 50.0]],
    "old_logp": [[0.0, -1.0, -2.0, -5.0, 50.0]],
    "sample_id": [0],
}


CAUSAL_SETTINGS = {
    "trend": {"gain": 1.0},
    "reference": {"level": 0.4, "gain": 0.3},
    "constant": {"lambda_": 0.3},
}


def rollout(seed: int, entropy: float = 1.0, rows: int = 8, width: int = 5) -> Tokens:
    """A random rollout batch whose model tokens have about that mean entropy; every row has one at least."""
    random = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=random)

    mask = uniform(rows, width) < 0.8
    mask[:, 0] = True
    return Tokens.pack(
        mask,
        (4 * uniform(rows, 1) - 2).repeat(1, width),
        entropy=2 * entropy * uniform(rows, width),
        sensitivity=0.4 * uniform(rows, width) - 0.2,
        importance=uniform(rows, width) + 0.5,
        sample_id=torch.arange(rows),
    )


def after_three_rollouts(transform: Transform) -> controllers.State:
    state = transform.init()
    for seed, entropy in enumerate((1.0, 0.8, 0.5)):
        _, state, _ = transform.update(rollout(seed, entropy), state)
    return state


def hand_made(advantages: list[float], sensitivity: list[float], entropy: float = 1.0) -> Tokens:
    """One response."""
    return Tokens(
        response=torch.zeros(len(advantages), dtype=torch.long),
        position=torch.arange(len(advantages)),
        advantages=torch.tensor(advantages),
        entropy=torch.full((len(advantages),), entropy),
        sensitivity=torch.tensor(sensitivity),
    )


def constant_papo(lam: float, **settings) -> Transform:
    return polarity_weights(controllers.constant(lam), **settings)
