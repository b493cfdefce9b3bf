"""One wording for one mistake: a name that is not known."""

from collections.abc import Iterable
from difflib import get_close_matches


def unknown_name(kind: str, given: str, known: Iterable[str]) -> ValueError:
    """A ValueError that names what was given, the nearest known name and all known names.

    >>> str(unknown_name("method", "pappo", ["grpo", "papo"]))
    "unknown method 'pappo': did you mean 'papo'? Known: grpo, papo"
    """
    names = sorted(known)
    near = get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    # A list nobody can read helps nobody: TRL's configuration alone has over two hundred fields.
    listed = f"Known: {', '.join(names)}" if len(names) <= 30 else f"{len(names)} names are known"
    return ValueError(f"unknown {kind} {given!r}: {hint}{listed}")
