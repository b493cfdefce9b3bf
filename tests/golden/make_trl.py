"""Writes trl.json: what every method makes of one rollout inside TRL's trainer, for verl's environment to compare with.

PYTHONPATH=tests:examples python tests/golden/make_trl.py
"""

import json
import tempfile
import warnings
from pathlib import Path
from unittest.mock import patch

from several_ranks import fixed
from test_trl import make_trainer
from test_trl_methods import EXAMPLES, REUSED, uneven

from entropy_polarity.tokens import Tokens
from entropy_polarity.trainers.trl import PolarityTrainer

HERE = Path(__file__).parent
COLUMNS = ("mask", "advantages", "logp", "entropy", "sensitivity", "reward")
MADE = ("mask", "advantages", "entropy_bonus", "ratio_penalty")
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


def written(tokens: Tokens, names: tuple[str, ...]) -> dict[str, list]:
    columns = {name: getattr(tokens, name) for name in names}
    return {
        name: [[float(f"{x:.9g}") for x in row] for row in column.double().view(len(column), -1).tolist()]
        for name, column in columns.items()
        if column is not None
    }


def decision(method) -> tuple[Tokens, Tokens]:
    """(what a method saw, what it made of it) on the first rollout."""
    seen = []

    run = PolarityTrainer._run_method

    def watched(self, local):
        decided = run(self, local)
        seen.append((local, decided.tokens))
        return decided

    with patch.object(PolarityTrainer, "_run_method", watched):
        trainer = make_trainer(PolarityTrainer, Path(tempfile.mkdtemp()), method=method, **REUSED)
        trainer.rollout_func, trainer.reward_funcs = fixed, [some_equal]
        trainer.train()
    return seen[0]


def main() -> None:
    warnings.filterwarnings("ignore")
    decisions = {name: decision(method) for name, method in METHODS.items()}
    batch = written(decisions["papo"][0], COLUMNS)
    methods = {name: {"method": METHODS[name], "made": written(after, MADE)} for name, (_, after) in decisions.items()}
    (HERE / "trl.json").write_text(json.dumps({"batch": batch, "methods": methods}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
