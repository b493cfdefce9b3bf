"""Text of other people: models, environments, tables and run folders say what they like.

`valid` is for text that comes in, `printable` and `one_line` for text that goes to a terminal or onto a page.
"""

import re
from typing import Any

LONGEST_LINE = 600  # characters of an error or a status: what a library says can be pages long
# Neither UTF-8 nor a tokenizer takes half a surrogate pair, and NUL ends a text for whatever is written in C.
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
# C0 and C1 (escape sequences begin there), separators of lines that only some programs know, and what turns the
# direction of writing, so that a line reads as another.
_NOT_PRINTABLE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def valid(text: str) -> str:
    r"""The text with U+FFFD for every lone surrogate and NUL: any file and any tokenizer takes it.

    >>> valid("a\ud800b\0")
    'a�b�'
    """
    return _NO_TEXT.sub("\ufffd", text)


def valid_parts(value: Any) -> Any:
    """`valid` for every text in lists and dictionaries, keys included."""
    if isinstance(value, str):
        return valid(value)
    if isinstance(value, dict):
        return {valid_parts(key): valid_parts(item) for key, item in value.items()}
    return [valid_parts(item) for item in value] if isinstance(value, list | tuple) else value


def printable(text: Any) -> str:
    r"""The text with escapes for what would move the cursor, colour the terminal, or turn the direction of writing.

    Line ends and tabs stay; a carriage return before a line end goes.

    >>> printable("\x1b[2Jgone \u202egpj.exe\r\n")
    '\\x1b[2Jgone \\u202egpj.exe\n'
    """
    return _NOT_PRINTABLE.sub(_escape, str(text).replace("\r\n", "\n"))


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def one_line(text: Any, limit: int = LONGEST_LINE) -> str:
    """As `printable`, on one line, cut where it is longer than `limit`."""
    return cut(" ".join(printable(text).split()), limit)


def cut(text: str, limit: int) -> str:
    """The first `limit` characters, and where there are more, how many.

    >>> cut("abcdef", 4), cut("abcd", 4)
    ('abcd … (2 more characters)', 'abcd')
    """
    more = len(text) - limit
    return text if more <= 0 else f"{text[:limit]} … ({more:,} more characters)"
