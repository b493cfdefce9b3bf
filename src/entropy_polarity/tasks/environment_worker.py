"""What a worker process does for tasks/environments.py: it holds the environments of the episodes that live there.

A request is JSON, and so is its answer: {"result": [observation, reward, done, reason], "counts": {...}} of a reset or
a step, {"raised": ...} where the environment raised, in a line, and null for an episode that is not here. Every
environment has a random state of its own.
"""

import importlib
import math
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from entropy_polarity.tasks.protocol import StepResult, TextEnv

MAX_LIVE = 256  # episodes; one that had to go is played again when it is needed
MAX_MESSAGE_CHARACTERS = 200


class _NoEnvironmentError(TypeError):
    """The name that was given is none of an environment's class."""


class _Live:
    """An environment and its random state: libraries reseed the global generators, and must not touch each other's."""

    def __init__(self, factory: str, settings: dict[str, Any], seed: int) -> None:
        self.randomness = random.Random(seed).getstate(), np.random.RandomState(seed % 2**32).get_state()
        with self.own_randomness():
            self.env: TextEnv = _environment_class(factory)(**settings)

    @contextmanager
    def own_randomness(self) -> Iterator[None]:
        random.setstate(self.randomness[0])
        np.random.set_state(self.randomness[1])
        try:
            yield
        finally:
            self.randomness = random.getstate(), np.random.get_state()


# By the number of the episode; the one that waited longest goes first.
_LIVE: OrderedDict[int, _Live] = OrderedDict()


def serve(request: str, *arguments: Any) -> dict[str, Any] | None:
    """The answer to a request: "check", "reset" or "step"."""
    return {"check": _check, "reset": _reset, "step": _step}[request](*arguments)


def _check(factory: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What is wrong with that class, in a line, and the reasons that it lists."""
    try:
        env = _Live(factory, settings, seed=0).env
        return {"wrong": "", "reasons": [str(reason) for reason in getattr(env, "reasons", ())]}
    except Exception as error:
        return {"wrong": str(error) if isinstance(error, _NoEnvironmentError) else _line(error)}


def _reset(
    number: int, factory: str, settings: dict[str, Any], seed: int, over: list[int], limit: int
) -> dict[str, Any] | None:
    for ended in over:
        _LIVE.pop(ended, None)
    return _answer(number, lambda: _Live(factory, settings, seed), lambda env: StepResult(env.reset(seed)), limit)


def _step(number: int, action: str, limit: int) -> dict[str, Any] | None:
    """None where the episode is not here. It is not here either after an action that went wrong."""
    live = _LIVE.pop(number, None)
    if live is None:
        return None
    return _answer(number, lambda: live, lambda env: env.step(action), limit)


def _answer(
    number: int, started: Callable[[], _Live], act: Callable[[TextEnv], StepResult], limit: int
) -> dict[str, Any]:
    """What `act` did as JSON, the observation cut to `limit` characters, with what the environment counts."""
    try:
        live = started()
        with live.own_randomness():
            observation, reward, done, reason = StepResult(*act(live.env))
        if not math.isfinite(reward):
            raise ValueError(f"a reward of {reward}")
        result = StepResult(str(observation)[:limit], float(reward), bool(done), str(reason))
        counts = _counts(live.env)
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:
        return {"raised": _line(error)}
    if not result.done:
        _LIVE[number] = live
        while len(_LIVE) > MAX_LIVE:
            _LIVE.popitem(last=False)
    return {"result": result, "counts": counts}


def _environment_class(factory: str) -> Callable[..., Any]:
    """The class of that name. What is no environment is never called."""
    module, _, name = factory.partition(":")
    found = getattr(importlib.import_module(module), name)
    if not isinstance(found, type):
        raise _NoEnvironmentError(f"it is a {type(found).__name__}; expected a class with reset, step and counts")
    missing = [method for method in ("reset", "step", "counts") if not callable(getattr(found, method, None))]
    if missing == ["counts"] and callable(getattr(found, "facts", None)):
        raise _NoEnvironmentError("its method facts is called counts since version 0.2: rename it")
    if missing:
        raise _NoEnvironmentError(f"it has no {' and no '.join(missing)}")
    return found


def _counts(env: TextEnv) -> dict[str, float]:
    try:
        counted = {str(name): float(value) for name, value in env.counts().items()}
    except Exception:
        return {}
    return {name: value for name, value in counted.items() if math.isfinite(value)}


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:MAX_MESSAGE_CHARACTERS]
