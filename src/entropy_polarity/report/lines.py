"""Where progress goes: one live picture in a terminal, plain lines elsewhere."""

import sys
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.live import Live

from entropy_polarity._text import printable


class LiveOrLines:
    """A context. In it `live` is there in a terminal, to be updated; elsewhere it is None, and `line` prints."""

    refresh_per_second = 4

    def __init__(self, stream: TextIO | None) -> None:
        self.console = Console(file=stream or sys.stdout)
        self.live: Live | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.live = Live(console=self.console, refresh_per_second=self.refresh_per_second)
            self.live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.__exit__(kind, error, trace)

    def line(self, text: str) -> None:
        self.console.print(printable(text), highlight=False, soft_wrap=True, markup=False)
