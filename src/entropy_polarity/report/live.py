"""A run while it runs: one live panel in a terminal, a plain line per step elsewhere."""

import time
from collections import deque
from typing import Any, TextIO

from rich.console import Group
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from entropy_polarity.report.lines import LiveOrLines, clock
from entropy_polarity.support.text import one_line

_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[float], width: int = 40) -> str:
    """The last `width` values as little bars, scaled between their own minimum and maximum.

    >>> sparkline([0.0, 0.5, 1.0])
    '▁▄█'
    """
    shown = values[-width:]
    low, high = min(shown), max(shown)
    span = (high - low) or 1.0
    return "".join(_BARS[int((value - low) / span * (len(_BARS) - 1) + 0.5 - 1e-9)] for value in shown)


class LiveView(LiveOrLines):
    """A context: `say(line)` for stages, `watch(row)` for each step's metrics."""

    def __init__(self, title: str, max_steps: int, stream: TextIO | None = None) -> None:
        super().__init__(stream)
        self.title, self.max_steps = one_line(title), max_steps
        self.latest: dict[str, float] = {}
        self.row: dict[str, Any] = {}
        self.curves: dict[str, list[float]] = {"reward": [], "polarity/entropy": []}
        self.ticks: deque[tuple[int, float]] = deque(maxlen=21)
        self.stage = ""

    def say(self, line: str) -> None:
        self.stage = one_line(line)
        self._say_or_draw(line)

    def show(self, text: str) -> None:
        self.stage = text
        self._say_or_draw(text)

    def watch(self, row: dict[str, Any]) -> None:
        """A step's metrics. Where several updates are made on a rollout, its reward and polarity are in the first row
        alone; "update" and "updates" say which of them this is."""
        self.row = {name: value for name, value in row.items() if isinstance(value, int | float)}
        self.latest |= self.row
        self.ticks.append((int(self.row["step"]), time.monotonic()))
        for name, values in self.curves.items():
            if name in self.row:
                values.append(self.row[name])
        self._say_or_draw(self._line())

    def _say_or_draw(self, line: str) -> None:
        if self.live is None:
            self.line(line)
        else:
            self.live.update(self._panel())

    def _line(self) -> str:
        fields = [
            ("reward", "reward", ".3f"),
            ("entropy", "polarity/entropy", ".3f"),
            ("lambda", "polarity/lambda", "+.3f"),
            ("D+", "polarity/positive_flow", ".4f"),
            ("D-", "polarity/negative_flow", ".4f"),
        ]
        if self.row.get("update", 1) > 1:  # what belongs to the rollout was said with its first update
            fields = [("entropy", "entropy", ".3f"), ("gradient norm", "grad_norm", ".3f")]
        known = [f"{label} {self.row[key]:{form}}" for label, key, form in fields if key in self.row]
        return "  ".join([self._place(), *known, f"left {self._left()}"])

    def _place(self) -> str:
        """Which step this is, and where several updates are made on a rollout, which of them."""
        updates = int(self.row.get("updates", 1))
        of = f", update {int(self.row['update'])} of {updates} on its rollout" if updates > 1 else ""
        return f"step {int(self.latest.get('step', 0))}/{self.max_steps}{of}"

    def _left(self) -> str:
        if len(self.ticks) < 2:
            return "?"
        (first, start), (last, end) = self.ticks[0], self.ticks[-1]
        return clock((end - start) / max(1, last - first) * max(0, self.max_steps - last))

    def _panel(self) -> Panel:
        step = int(self.latest.get("step", 0))
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim")
        grid.add_column(justify="right", min_width=8)
        grid.add_column()

        def add(label: str, key: str, shown: str, extra: str = "", colour: str = "") -> None:
            curve = Text(sparkline(self.curves[key]), colour) if self.curves.get(key) else extra
            grid.add_row(label, shown.format(self.latest[key]) if key in self.latest else "-", curve)

        add("reward", "reward", "{:.3f}", colour="green")
        add("entropy", "polarity/entropy", "{:.3f}", colour="blue")
        add("λ", "polarity/lambda", "{:+.3f}", "above 0: towards expansion, below: towards contraction")
        add("D+ expands", "polarity/positive_flow", "{:.4f}")
        add("D- contracts", "polarity/negative_flow", "{:.4f}")
        add("gradient norm", "grad_norm", "{:.3f}", "of each update; what is above is the rollout's")
        progress = Table.grid(padding=(0, 2))
        progress.add_row(
            self._place(),
            ProgressBar(total=self.max_steps, completed=step, width=40),
            f"{self._left()} left" if step else "",
        )
        return Panel(Group(progress, grid, Text(self.stage, "dim")), title=Text(self.title), title_align="left")
