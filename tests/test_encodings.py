"""Files are UTF-8 wherever they are written and read: the locale's encoding decides nothing."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "tests", "benchmarks", "examples")
NOT_OF_FILES = ("os", "tarfile", "zipfile", "webbrowser", "image", "Image")  # their open() knows no encoding


def without_encoding(tree: ast.AST) -> Iterator[ast.Call]:
    """Calls that read or write text in the encoding of the locale."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        if "encoding" in keywords:
            continue
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        if isinstance(call.func, ast.Attribute) and name in ("read_text", "write_text"):  # of a Path; ours is UTF-8
            yield call
        elif name in ("open", "fdopen"):
            owner = getattr(getattr(call.func, "value", None), "id", "")
            if name == "open" and owner in NOT_OF_FILES:
                continue
            first = 1 if isinstance(call.func, ast.Name) or name == "fdopen" else 0  # the mode's place
            mode = keywords.get("mode", call.args[first] if len(call.args) > first else ast.Constant("r"))
            if not (isinstance(mode, ast.Constant) and "b" in str(mode.value)):
                yield call
        elif any(isinstance(v := keywords.get(k), ast.Constant) and v.value for k in ("text", "universal_newlines")):
            yield call


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_and_every_process_is_read_as_utf_8(folder):
    found = [
        f"{file.relative_to(ROOT)}:{call.lineno}"
        for file in sorted((ROOT / folder).rglob("*.py"))
        for call in without_encoding(ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert not found, f'say encoding="utf-8" in {", ".join(found)}'
