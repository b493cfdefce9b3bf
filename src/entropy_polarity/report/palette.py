"""The colours of all pages, and the looks that tell labels apart."""

from typing import NamedTuple

INK, GREY, LIGHT_GREY = "#1d2129", "#8a8f98", "#c5c9d0"
GREEN, DARK_GREEN, VIOLET = "#1b9e77", "#1b7837", "#6c3fc4"
EXPANDS, CONTRACTS = "#2166d6", "#d63031"  # a blue and a red that colour-blind eyes tell apart
# Okabe and Ito's colours, which colour-blind eyes tell apart (black is the baselines' zero line, yellow too faint);
# where there are more labels than colours, dashes and markers tell them apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#6b4c9a")
DASHES = ("solid", "dash", "dot", "dashdot")
MARKERS = ("circle", "square", "diamond", "cross")


class Look(NamedTuple):
    """How a label is drawn."""

    colour: str
    dash: str
    marker: str


def looks_of(labels: list[str]) -> dict[str, Look]:
    """The look of each label, the same in every chart of a page."""
    count = len(COLOURS)
    return {
        label: Look(COLOURS[i % count], DASHES[i // count % len(DASHES)], MARKERS[i // count % len(MARKERS)])
        for i, label in enumerate(labels)
    }


def transparent(colour: str, opacity: float) -> str:
    """A colour through which the page shows.

    >>> transparent(EXPANDS, 0.12)
    'rgba(33, 102, 214, 0.12)'
    """
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {opacity:.2f})"
