"""The embedded policy: a 0.86M-parameter Qwen3 that has read countdown problems, shipped inside the package."""

from importlib.resources import files
from pathlib import Path

EMBEDDED = "embedded"


def resolve_model(model: str) -> str:
    """The folder of the model: the embedded one for "embedded", else the path (or hub name) as given.

    Raises FileNotFoundError where a path-like name has no model in it.
    """
    if model == EMBEDDED:
        return str(files("entropy_polarity.policy") / "weights" / "countdown")
    path = Path(model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{model} holds no model: config.json is missing")
    looks_like_a_path = model.startswith(("/", "./", "../", "~")) or model.count("/") > 1
    if looks_like_a_path and not path.expanduser().is_dir():
        raise FileNotFoundError(f"no model at {model}: give a folder with config.json, or {EMBEDDED!r}")
    return str(path.expanduser()) if path.expanduser().is_dir() else model
