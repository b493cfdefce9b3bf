"""From the name of a model to the model: whole, without code that comes with it, from the hub only where it must be."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from entropy_polarity.policy import resolve_model
from entropy_polarity.policy.folder import check_folder
from entropy_polarity.support.damage import damaged_file
from entropy_polarity.support.hub import why_not_asked
from entropy_polarity.support.text import one_line
from entropy_polarity.support.weights import load_whole


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
