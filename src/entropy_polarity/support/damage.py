"""Which file of a model or a checkpoint cannot be read: libraries raise a dozen kinds of errors, and name none."""

import zipfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from entropy_polarity.support.json_files import parsed


def damaged_file(folder: Path) -> str | None:
    """A line that names the first file in `folder` that does not read as its name says; None if all do.

    Of safetensors the header is read and the sizes it gives, JSON is parsed, PyTorch's archives are compared with their
    checksums. A changed number in a tensor is seen in the last alone.
    """
    for file in sorted(folder.iterdir()):
        if file.suffix not in _LOOKS or not file.is_file():
            continue
        try:
            wrong = _LOOKS[file.suffix](file)
        except (ValueError, OSError, SafetensorError, zipfile.BadZipFile) as error:
            wrong = " ".join(str(error).split()) or type(error).__name__
        if wrong:
            return f"{file} is damaged ({wrong[:200]})"
    return None


def _safetensors(file: Path) -> None:
    with safe_open(file, framework="np") as tensors:
        tensors.keys()


def _json(file: Path) -> None:
    parsed(file.read_bytes())


def _archive(file: Path) -> str | None:
    """Of the older format, a bare pickle, nothing can be said."""
    with file.open("rb") as content:
        if content.read(1) == b"\x80":
            return None
    with zipfile.ZipFile(file) as archive:
        bad = archive.testzip()
    return f"the checksum of {bad} is another" if bad else None


_LOOKS: dict[str, Callable[[Path], str | None]] = {".safetensors": _safetensors, ".json": _json}
_LOOKS |= dict.fromkeys((".bin", ".pt", ".pth"), _archive)
