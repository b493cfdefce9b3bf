"""What several tasks check of their settings, each in one wording."""

import importlib.util
from typing import Any

from entropy_polarity.tasks.protocol import Task


def check_installed(task: Task, package: str, extra: str) -> None:
    """Raise ImportError, with what to install, where a package that the task needs is missing."""
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        raise ImportError(f"task {task.name} needs {package}: pip install 'entropy-polarity[{extra}]'")


def check_positive(task: Task, *limits: str) -> None:
    """Raise ValueError where one of these settings of the task is given and not positive."""
    for limit in limits:
        value: Any = getattr(task, limit)
        if value is not None and not value > 0:
            raise ValueError(f"task {task.name}: {limit} is {value}; expected a positive number")
