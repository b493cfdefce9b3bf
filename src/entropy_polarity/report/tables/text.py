"""A table of texts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """The name of a column, and the sentence that explains it."""

    name: str
    text: str


@dataclass(frozen=True)
class TextTable:
    """A table: its title, its columns, and its cells, row by row."""

    title: str
    columns: list[Column]
    rows: list[list[str]]
