"""Where progress goes: one live picture in a terminal, plain lines elsewhere."""

import sys
import time
from typing import Any, Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from entropy_polarity.support.text import printable

FIRST, SHARE, LONGEST = 10.0, 0.1, 60.0  # seconds, of the whole, seconds: when a line is due


class Part:
    """A long part of what is done: how much of it, since when, and what was said of it.

    A line is due 10 s after its start or the last line if a tenth of the whole was done since, the first then and any
    after a minute in any case; and at the end, where something was said before. `now` is in seconds.
    """

    def __init__(self, what: str, total: int, now: float) -> None:
        self.what, self.total, self.start = what, total, now
        self.said_at, self.said_share, self.spoken = now, 0.0, False

    def line(self, done: float, now: float) -> str:
        """How much is done, and about how long the rest takes at the pace so far."""
        share, spent = done / self.total, now - self.start
        stands = f"{self.what}: {int(done):,} of {self.total:,} ({share:.0%})"
        if share >= 1:
            return f"{stands}, took {clock(spent)}"
        return f"{stands}, about {clock(spent / share * (1 - share))} left" if share > 0 else stands

    def due(self, done: float, now: float) -> bool:
        share, waited = done / self.total, now - self.said_at
        ended = share >= 1 and self.spoken and self.said_share < 1
        moved = share - self.said_share > SHARE - 1e-9 or not self.spoken  # tenths are not exact
        if not ended and (share >= 1 or waited < FIRST or (waited < LONGEST and not moved)):
            return False
        self.said_at, self.said_share, self.spoken = now, share, True
        return True


def clock(seconds: float) -> str:
    """
    >>> clock(5), clock(754), clock(7261)
    ('0:05', '12:34', '2:01:01')
    """
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"


class LiveOrLines:
    """A context. In it `live` is there in a terminal, to be updated; elsewhere it is None, and `line` prints."""

    refresh_per_second = 4

    def __init__(self, stream: TextIO | None) -> None:
        self.console = Console(file=stream or sys.stdout)
        self.live: Live | None = None
        self.part: Part | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.live = Live(console=self.console, refresh_per_second=self.refresh_per_second)
            self.live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.live is not None:
            self.live.__exit__(*error)

    def line(self, text: str) -> None:
        self.console.print(printable(text), highlight=False, soft_wrap=True, markup=False)

    def progress(self, what: str, done: float, total: int) -> None:
        """`done` of `total` are made of a part called `what`: shown at once in a terminal, elsewhere when it is due."""
        now = time.monotonic()
        if self.part is None or (self.part.what, self.part.total) != (what, total):
            self.part = Part(what, total, now)
        if self.live is not None:
            self.show(self.part.line(done, now))
        elif self.part.due(done, now):
            self.line(self.part.line(done, now))

    def show(self, text: str) -> None:
        """In a terminal, the line that stands for what is going on."""
        assert self.live is not None
        self.live.update(Text(printable(text), "dim"))
