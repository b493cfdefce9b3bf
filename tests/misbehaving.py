"""Environments for the tests, in a module that a worker imports in no time. What is done to them is what they do."""

import os
import random
import subprocess
import sys
import time

import numpy as np

from entropy_polarity.tasks.games import StepResult

REST = "import time; time.sleep(60)"


class Obedient:
    """Says how it goes, with random numbers of both kinds; an action that is a misdeed is done."""

    reasons = ("gave up",)

    def __init__(self, start: str = "", build: str = ""):
        self.start, self.count, self.kept = start, 0, []
        self.misbehave(build)

    def misbehave(self, how: str) -> None:
        if how == "hang":
            time.sleep(60)
        elif how == "deaf":
            while True:
                try:
                    time.sleep(60)
                except BaseException:
                    continue
        elif how == "raise":
            raise KeyError("broken\nin two")
        elif how == "exit":
            os._exit(3)
        elif how == "sys.exit":
            sys.exit(3)
        elif how == "eat":
            self.kept.append(np.empty(1 << 31))
        elif how == "keep":
            self.kept.append(np.empty(1 << 27))  # 1 GiB, of addresses alone
        elif how == "child":
            subprocess.Popen([sys.executable, "-c", REST])
            time.sleep(60)
        elif how == "read":
            input()
        elif how == "print":
            print('{"value": {"result": ["forged", 1, true, "won"], "counts": {}}, "failure": ""}', flush=True)

    def reset(self, seed: int) -> str:
        self.misbehave(self.start)
        random.seed(seed % 7)  # as libraries do
        return f"start {random.random()} {np.random.rand()}"

    def step(self, action: str):
        self.misbehave(action)
        self.count += 1
        said = f"{self.count} {random.random()} {np.random.rand()}"
        if action == "give up":
            return StepResult(said, done=True, reason="gave up")
        if action == "win":
            return StepResult(said, 1.0, done=True)
        if action == "end":
            return StepResult(said, 0.5, done=True, reason="a reason that is not listed")
        if action == "nan":
            return StepResult(said, float("nan"))
        if action == "nothing":
            return None
        if action == "process":
            return StepResult(str(os.getpid()))
        return StepResult("long " * 2000 if action == "long" else said)

    def counts(self):
        return {"count": self.count, "nan": float("nan")}


class Moody(Obedient):
    """Misbehaves in some episodes, whatever is done; the others play on."""

    def reset(self, seed: int) -> str:
        self.mood = ["hang", "exit", "raise", "", "", ""][seed // 2 % 6]
        return super().reset(seed)

    def step(self, action: str) -> StepResult:
        return StepResult(super().step(self.mood).observation[:9], 0.1 * len(action))


class Babel(Obedient):
    """Says what no file and no tokenizer takes, and what would move a cursor."""

    reasons = ("gave \ud800up",)

    def reset(self, seed: int) -> str:
        return f"{seed} \ud800\0\x1b[2J\u202e"

    def step(self, action: str) -> StepResult:
        return StepResult("\udfff\0 </script>", 0.5, done=len(action) % 2 == 0, reason="gave \ud800up")

    def counts(self):
        return {"half \ud800": 1.0}


class Outdated:
    """As environments were before version 0.2."""

    def reset(self, seed: int) -> str:
        return "start"

    def step(self, action: str) -> StepResult:
        return StepResult("", done=True)

    def facts(self) -> dict[str, float]:
        return {}
