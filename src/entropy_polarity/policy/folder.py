"""What the folder of a model may hold: weights and settings, and nothing that is run or fetched for it.

transformers runs no code of a folder as long as trust_remote_code is off, and chat templates in a sandbox. Left are
pickled weights, an adapter's base model, and attention kernels by the name of a repository, which the library would
fetch and load.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from entropy_polarity.support.text import one_line

_KERNELS = ("attn_implementation", "experts_implementation")


def check_folder(folder: Path) -> None:
    """Raise ValueError, in a line, where the model in `folder` is none that can be trained, or would bring in more than
    the folder holds."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds an adapter, which names another model: merge the two and save that")
    if not any(folder.glob("*.safetensors")) and (pickled := sorted(folder.glob("*.bin"))):
        raise ValueError(
            f"{folder} holds its weights as a pickle ({pickled[0].name}), which can run code when it is read: convert "
            "them with save_pretrained, which writes safetensors"
        )
    config = _config(folder / "config.json")
    for name in _kernels(config):
        if "/" in name:
            raise ValueError(f"{folder} wants a kernel of the hub ({name!r} in config.json): take that line out of it")
    _check_kind(folder, config.get("model_type"))


def _config(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({one_line(error, 200)}): take another model or checkpoint") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} is damaged (a {type(found).__name__}): take another model or checkpoint")
    return found


def _kernels(config: Any) -> Iterator[str]:
    """Every implementation that a configuration, or one inside it, asks for by name."""
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        if key.removeprefix("_").removesuffix("_internal") in _KERNELS:
            yield from map(str, value.values() if isinstance(value, dict) else [value])
        yield from _kernels(value)


def _check_kind(folder: Path, kind: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"{folder} holds a model of type {one_line(repr(kind), 60)}; expected a causal language model that is part "
            "of transformers (code that comes with a model is not run)"
        )
