"""Writes what every method makes of one rollout inside TRL's trainer, for verl's environment to compare with.

    PYTHONPATH=tests:tests/trainers:examples python tests/golden/make_trl.py FILE

The committed trl.json is version 0.1's (commit 01dfe53), whose Tokens were padded; tests/trainers/test_trl_golden.py
holds the trainer to it. Matrices are (B, T); `mask` is 1 at the model tokens, and in what a method made at those that
it kept. Elsewhere the numbers mean nothing.
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path

from several_ranks import fixed
from test_trl import make_trainer
from test_trl_methods import EXAMPLES, REUSED, uneven
from torch import Tensor

from entropy_polarity.tokens import Tokens
from entropy_polarity.trainers.trl import PolarityTrainer, Rollout

COLUMNS = ("advantages", "logp", "entropy", "sensitivity")
MADE = ("advantages", "entropy_bonus", "ratio_penalty")
METHODS = {
    **EXAMPLES,
    "papo": ("papo", {"controller": "constant", "lambda_": 0.4}),
    "conserved": ("papo", {"controller": "constant", "lambda_": -0.4, "conserve": True, "soft_sign": 0.1}),
    "balance": ("papo", {"controller": "balance"}),
    "shuffled": ("papo", {"controller": "constant", "lambda_": 0.4, "sign_from": "shuffled"}),
}


def some_equal(completions, **_):
    """The first two groups have nothing to compare."""
    return [1.0 if row < 8 else reward for row, reward in enumerate(uneven(completions))]


def padded(tokens: Tokens, names: tuple[str, ...], shape: tuple[int, int]) -> dict[str, Tensor]:
    """(B, T) of each column that is there, and `mask`."""
    columns = {name: getattr(tokens, name) for name in names if getattr(tokens, name) is not None}
    columns["mask"] = tokens.advantages.new_ones(len(tokens.response))
    return {name: tokens.unpack(column, shape) for name, column in columns.items()}


def decision(method: tuple[str, dict]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(what a method saw, what it made of it) on the first rollout."""
    rollouts: list[Rollout] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(PolarityTrainer, Path(folder), method=method, **REUSED | {"max_steps": 1})
        trainer.rollout_func, trainer.reward_funcs = fixed, [some_equal]
        trainer.on_rollout = rollouts.append
        trainer.train()
    (rollout,) = rollouts
    shape = tuple(rollout.inputs["completion_ids"].shape)
    seen = padded(rollout.tokens, COLUMNS, shape) | {"reward": rollout.rewards[:, None]}
    return seen, padded(rollout.after, MADE, shape)


def written(columns: dict[str, Tensor]) -> dict[str, list[list[float]]]:
    return {
        name: [[float(f"{x:.9g}") for x in row] for row in column.double().tolist()] for name, column in columns.items()
    }


def main() -> None:
    warnings.filterwarnings("ignore")
    decisions = {name: decision(method) for name, method in METHODS.items()}
    methods = {name: {"method": METHODS[name], "made": written(made)} for name, (_, made) in decisions.items()}
    document = {"batch": written(decisions["papo"][0]), "methods": methods}
    Path(sys.argv[1]).write_text(json.dumps(document) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
