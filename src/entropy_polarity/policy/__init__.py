"""The embedded policies: 0.86M-parameter Qwen3, one that has read countdown problems, two that have watched a game."""

import os
from importlib.resources import files
from pathlib import Path

from entropy_polarity.support.hub import is_path
from entropy_polarity.support.text import one_line

EMBEDDED = "embedded"
MAX_NAME = 4096  # as long as a path can be
_WEIGHTS = {EMBEDDED: "countdown", "embedded:guess": "guess", "embedded:keydoor": "keydoor"}


def resolve_model(model: str) -> str:
    """The folder of the model: inside the package for "embedded", "embedded:guess", "embedded:keydoor", else the path
    (or hub name).

    Raises FileNotFoundError where a path-like name has no model in it.
    """
    if model in _WEIGHTS:
        return str(files("entropy_polarity.policy") / "weights" / _WEIGHTS[model])
    if "\0" in model or len(model) > MAX_NAME:
        raise FileNotFoundError(
            f"no model at {one_line(repr(model), 80)}: give a folder with config.json, or {EMBEDDED!r}"
        )
    path = Path(os.path.expanduser(model))
    if path.is_dir() and not (path / "config.json").is_file():
        adapter = (path / "adapter_config.json").is_file()
        how = "an adapter alone: merge it into its model and save that" if adapter else "config.json is missing"
        raise FileNotFoundError(f"{model} holds no model: {how}")
    if is_path(model) and not path.is_dir():
        raise FileNotFoundError(f"no model at {model}: give a folder with config.json, or {EMBEDDED!r}")
    return os.path.expanduser(model) if path.is_dir() else model
