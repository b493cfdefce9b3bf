"""A comparison while it runs: one table of methods and seeds in a terminal, a line for each change elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from rich.table import Table
from rich.text import Text

from entropy_polarity.report.lines import LiveOrLines
from entropy_polarity.support.text import one_line

_STYLES = {
    "waiting": "dim",
    "running": "cyan",
    "stopping": "yellow",
    "stopped": "yellow",
    "finished": "green",
    "failed": "bold red",
}


@dataclass(frozen=True)
class RunState:
    """Where one run of a comparison stands; `kind` is a key of _STYLES, `note` says why it failed."""

    label: str
    seed: int
    kind: str
    step: int
    steps: int
    note: str = ""

    def cell(self) -> Text:
        steps = f"step {self.step}/{self.steps}"
        shown = {"running": steps, "stopping": f"{steps}, stopping"}.get(self.kind, self.kind)
        return Text(shown, _STYLES[self.kind])


class ComparisonView(LiveOrLines):
    """A context: `watch(states)` with the states of all runs, as often as one likes."""

    refresh_per_second = 2

    def __init__(self, title: str, stream: TextIO | None = None) -> None:
        super().__init__(stream)
        self.title = one_line(title)
        self.said: dict[tuple[str, int], str] = {}

    def watch(self, states: Sequence[RunState]) -> None:
        if self.live is not None:
            self.live.update(self._table(states))
            return
        ended = sum(state.kind in ("finished", "failed") for state in states)
        for state in states:
            run = (state.label, state.seed)
            if self.said.get(run, "waiting") != state.kind:
                note = f": {one_line(state.note)}" if state.note else ""
                self.line(f"[{ended}/{len(states)}] {one_line(state.label)}, seed {state.seed}: {state.kind}{note}")
            self.said[run] = state.kind

    def _table(self, states: Sequence[RunState]) -> Table:
        """Methods down, seeds across; what failed is told below."""
        labels, seeds = list(dict.fromkeys(s.label for s in states)), list(dict.fromkeys(s.seed for s in states))
        cells = {(state.label, state.seed): state.cell() for state in states}
        failures = [one_line(f"{s.label}, seed {s.seed}: {s.note}") for s in states if s.note]
        table = Table(
            title=Text(self.title), title_justify="left", caption=Text("\n".join(failures), "red") if failures else None
        )
        table.add_column("method")
        for seed in seeds:
            table.add_column(f"seed {seed}")
        for label in labels:
            table.add_row(Text(one_line(label)), *(cells.get((label, seed), Text("")) for seed in seeds))
        return table
