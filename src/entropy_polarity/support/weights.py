"""Weights of a file against the model that reads them: what does not fit is an error, never a random number."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_ON_META = {"output_loading_info": True, "ignore_mismatched_sizes": True, "device_map": "meta"}
_SHOWN, _LONGEST = 2, 80  # names of weights in the line, and characters of each


def load_whole(load: Callable[..., Any], place: str | Path, **settings: Any) -> Any:
    """`load(place, **settings)`, a `from_pretrained`, if every weight of the model was read and none was left over.

    transformers fills what a file lacks with random numbers and says so in its log alone. What is tied or made anew
    (an output head that is the embedding, rotary buffers) is no fault: its own rules say what a file need not hold.
    Of an adapter the weights below it are looked at too. `ignore_mismatched_sizes=True` is a user's word that shapes
    may differ. Raises ValueError in one line otherwise.
    """
    try:
        model, found = load(place, **settings | {"output_loading_info": True})
    except RuntimeError:  # other shapes, which transformers tells in its log alone: look again, without the numbers
        _, found = load(place, **settings | _ON_META)
        check_loaded(place, found)
        raise
    check_loaded(place, found, settings.get("ignore_mismatched_sizes", False))
    if getattr(model, "_hf_peft_config_loaded", False):  # what was found is about the adapter then
        for below in {config.base_model_name_or_path for config in model.peft_config.values()}:
            check_whole(type(model).from_pretrained, below, local_files_only=True)
    return model


def check_whole(load: Callable[..., Any], place: str | Path, **settings: Any) -> None:
    """Raise ValueError as `load_whole` does, on the "meta" device: no memory is taken."""
    check_loaded(place, load(place, **settings | _ON_META)[1])


def check_loaded(place: str | Path, found: dict[str, Any], mismatched_is_allowed: bool = False) -> None:
    """Raise ValueError where `found`, the loading info of a `from_pretrained`, has a weight that does not fit."""
    shapes = [] if mismatched_is_allowed else sorted(found["mismatched_keys"])
    differ = [f"{_short(name)} has {list(given)} where {list(wanted)} fits" for name, given, wanted in shapes]
    told = [
        _told(sorted(map(_short, found["missing_keys"])), "missing in the file, which would be random"),
        _told(sorted(map(_short, found["unexpected_keys"])), "in the file and nowhere in the model"),
        _told(differ, "of another shape"),
    ]
    if any(told):
        raise ValueError(
            f"the weights in {place} are not those of the model in its config.json: {'; '.join(filter(None, told))}. "
            "Save the model again, or take the folder that belongs to the file"
        )


def _told(names: Sequence[str], what: str) -> str:
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{more})" if names else ""


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[:_LONGEST]}..."
