"""Tools that a policy may call while it answers, by name: a calculator, and Python.

Off unless asked for: `--set 'task.tools=["calculator"]'`. TRL shows a policy the docstrings below, so they are written
for it. Whatever a policy sends, a tool answers with text, in bounded time.

`calculator` evaluates nothing (tasks/arithmetic.py). `python` runs code that a model wrote (tasks/sandbox.py), inside a
boundary of the operating system's (tasks/boundary.py). Where there is none it refuses, unless this environment
consents with PAPO_UNSAFE_PYTHON=1: a recipe cannot, since it may come with a stranger's run folder.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

from entropy_polarity.support.errors import unknown_name
from entropy_polarity.support.text import valid
from entropy_polarity.tasks.arithmetic import shown, value_of
from entropy_polarity.tasks.boundary import INSTALL, BoundaryError, examine
from entropy_polarity.tasks.workers import Workers

CONSENT = "PAPO_UNSAFE_PYTHON"
MAX_CODE_CHARACTERS = 10_000
SECONDS = 5.0  # of a call of `python`
MEMORY_BYTES = 1 << 30
_START_SECONDS = 30.0  # of its first call, in which a worker loads sympy


def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression. Fractions are exact.

    Args:
        expression: Numbers with + - * / // % ** (or ^) and brackets; pi, e; abs, round, floor, ceil, sqrt, exp, log,
            log2, log10, sin, cos, tan, asin, acos, atan, factorial, comb, perm, gcd, lcm, min, max. For example
            "2 * (3 + 4) ^ 2" or "comb(10, 3) / 2^10".

    Returns:
        The value, or a line that starts with "error:".
    """
    if not isinstance(expression, str):
        return f"error: the expression is {type(expression).__name__}; expected text"
    try:
        return shown(value_of(expression))
    except SyntaxError:
        return "error: this is no arithmetic expression"
    except ZeroDivisionError:
        return "error: division by zero"
    except (ArithmeticError, ValueError, TypeError, RecursionError, MemoryError) as error:
        return f"error: {error or type(error).__name__}"


def python(code: str) -> str:
    """Run Python code and return what it prints. Nothing is kept from one call to the next.

    Args:
        code: The code. It can import math, cmath, fractions, decimal, itertools, functools, collections, statistics,
            random, re, string, datetime, heapq, bisect and, where it is installed, sympy; no files, no network. The
            value of a last line that is an expression is printed too.

    Returns:
        The output, cut where it is long; what went wrong is a last line that starts with "error:".
    """
    without = _without_boundary()
    if not isinstance(code, str):
        return f"error: the code is {type(code).__name__}; expected text"
    if len(code) > MAX_CODE_CHARACTERS:
        return f"error: the code has {len(code)} characters; at most {MAX_CODE_CHARACTERS} are run"
    (outcome,) = _interpreters().map([(code, SECONDS, without)])
    return f"error: {outcome.failure}" if outcome.failure else valid(outcome.value)


TOOLS: dict[str, Callable[..., str]] = {"calculator": calculator, "python": python}


def known_tools(names: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    """The names, each once. Raises ValueError for one that is not known, BoundaryError where there is no `python` here.

    >>> known_tools(["calculater"])
    Traceback (most recent call last):
    ...
    ValueError: unknown tool 'calculater': did you mean 'calculator'? Known: calculator, python
    """
    for name in names:
        if name not in TOOLS:
            raise unknown_name("tool", name, TOOLS)
    if python.__name__ in names:
        _without_boundary()
    return tuple(dict.fromkeys(names))


def tools_of(task: Any) -> list[Callable[..., str]]:
    """The functions that a task lets its policy call; most have none."""
    return [TOOLS[name] for name in getattr(task, "tools", ())]


def _without_boundary() -> bool:
    """Whether code is to run without a boundary: there is none, and this environment consents to that."""
    lacking = examine().lacking
    if lacking and os.environ.get(CONSENT) != "1":
        raise BoundaryError(
            f"the tool python has no boundary here ({lacking}): {INSTALL}; or set {CONSENT}=1 to run what a model "
            "writes without one, with the rights of this user"
        )
    return bool(lacking)


@functools.cache
def _interpreters() -> Workers:
    return Workers(
        "entropy_polarity.tasks.sandbox:run",
        seconds=SECONDS + _START_SECONDS,
        memory_bytes=MEMORY_BYTES,
        count=1,
        isolated=True,
    )
