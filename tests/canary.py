"""A module that a stranger's folder may name: that it was imported can be seen."""

import os
from pathlib import Path

from entropy_polarity.tasks.games import StepResult

if "CANARY" in os.environ:  # pytest looks into every module for examples
    Path(os.environ["CANARY"]).touch()


class Env:
    def reset(self, seed: int) -> str:
        return "1-32:"

    def step(self, action: str) -> StepResult:
        return StepResult("", 1.0, done=True)

    def counts(self) -> dict[str, float]:
        return {}


def run(**settings) -> Env:
    Path(os.environ["CANARY"] + ".called").touch()
    return Env()
