"""From the name of a model to the model: whole, without code that comes with it, from the hub only where it must be.

transformers runs no code of a folder as long as trust_remote_code is off, and chat templates in a sandbox. Left are
pickled weights, an adapter's base model, and attention kernels by the name of a repository, which the library would
fetch and load.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from entropy_polarity.policy import resolve_model
from entropy_polarity.support.damage import damaged_file
from entropy_polarity.support.hub import why_not_asked
from entropy_polarity.support.json_files import json_object
from entropy_polarity.support.text import one_line
from entropy_polarity.support.weights import load_whole

_KERNELS = ("attn_implementation", "experts_implementation")


def load_policy(model: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder, a hub name or "embedded", in float32. No code that comes with it is run, and the
    hub is asked for nothing but a name that is no folder.

    Raises ValueError or OSError, in a line, for what is no causal language model, for weights that are not those of the
    model, and for a folder that would bring in more than safetensors and settings. A name of the hub is the caller's
    own word: what its configuration asks for, such as a kernel, is transformers' to fetch.
    """
    path = resolve_model(model)
    local = Path(path).is_dir()
    if local:
        check_folder(Path(path))
    silent = None if local else why_not_asked()
    here_only = local or silent is not None
    try:
        policy = load_whole(
            AutoModelForCausalLM.from_pretrained,
            path,
            dtype=torch.float32,
            local_files_only=here_only,
            trust_remote_code=False,
            use_safetensors=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=here_only, trust_remote_code=False)
    except Exception as error:  # of a dozen kinds, where a file is damaged or strange
        damage = damaged_file(Path(path)) if local else None
        if damage is not None:
            raise ValueError(f"{damage}: take another model or checkpoint") from None
        said = one_line(error) if silent is None else f"nothing in this machine's cache, and {silent}"
        hint = "" if local else " (no such folder here)"
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(f"cannot load a model from {one_line(repr(model), 200)}{hint}: {said}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return policy, tokenizer


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
    config = json_object(folder / "config.json", "take another model or checkpoint")
    for name in _kernels(config):
        if "/" in name:
            raise ValueError(f"{folder} wants a kernel of the hub ({name!r} in config.json): take that line out of it")
    if (kind := config.get("model_type")) not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"{folder} holds a model of type {one_line(repr(kind), 60)}; expected a causal language model that is part "
            "of transformers (code that comes with a model is not run)"
        )


def _kernels(config: Any) -> Iterator[str]:
    """Every implementation that a configuration, or one inside it, asks for by name."""
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        if key.removeprefix("_").removesuffix("_internal") in _KERNELS:
            yield from map(str, value.values() if isinstance(value, dict) else [value])
        yield from _kernels(value)
