"""The Hugging Face hub: asked for what is no folder here, and left alone where it does not answer."""

import os
from typing import Any

SECONDS = 10.0  # to connect, and to be answered

_silent: str | None = None  # why it did not answer this process


def is_path(name: Any) -> bool:
    """Whether a model's name can only be a path: names of the hub have one slash at most, between two words."""
    return not isinstance(name, str) or name.startswith(("/", ".", "~")) or name.count("/") > 1


def why_not_asked() -> str | None:
    """None where the hub can be asked. Otherwise why not, in words: then this process takes what is in the cache of
    this machine.

    One request, and so a matter of seconds: the hub's own client would ask six times, with pauses, for every file.
    """
    global _silent
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import httpx

    if constants.HF_HUB_OFFLINE:
        return _silent or "HF_HUB_OFFLINE is set, so that the hub is not asked"
    try:
        status = get_session().head(constants.ENDPOINT, timeout=SECONDS).status_code
        if status < 500:
            return None
        said = f"status {status}"
    except httpx.TransportError as error:
        said = (str(error).splitlines() or [""])[0] or type(error).__name__
    _silent = f"the hub at {constants.ENDPOINT} cannot be reached ({said})"
    os.environ["HF_HUB_OFFLINE"] = "1"  # for processes that are started; what is loaded has read it
    constants.HF_HUB_OFFLINE = True
    return _silent
