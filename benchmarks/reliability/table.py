"""The table of docs/reliability.md, from the result files of this folder's scripts, for benchmarks/results_page.py."""

import json
from pathlib import Path
from typing import Any

from blocks import markdown

PARTS = {
    "numerics": "statistics and gradients against 80-bit floats",
    "parity": "training with λ = 0, and with `grpo`, against TRL's GRPOTrainer, bit for bit",
    "grading": "real answers, each against its own solution and against others; games by scripted players",
    "runs": "kills, damaged files, clocks, locks and links of run directories",
    "strangers": "run directories and texts of strangers, and bad input to every command",
    "sandbox": "attacks on the tool `python`",
}
MOST = 20  # rows of parts below a script's own


def table(folder: Path) -> str:
    """What each script tried, and how much of it held; below it its parts, those of one subject together."""
    rows: list[list[str]] = []
    for name, what in PARTS.items():
        path = folder / f"reliability-{name}.json"
        if not path.is_file():
            rows.append([f"**{what}**", "", "", "not run yet"])
            continue
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        where = f"[{name}.py](../benchmarks/reliability/{name}.py), {found['environment']['date'][:10]}"
        rows.append([f"**{what}**", f"{found['tried']:,}", f"{found['held']:,}", where])
        parts = grouped(found["parts"])
        if len(parts) > MOST:
            rows[-1][0] += f", in {len(found['parts'])} settings"
        else:
            rows += [[f"· {part}", f"{tried:,}", f"{held:,}", ""] for part, (tried, held) in parts.items()]
    return markdown(["what", "tried", "held", "by, and when"], rows)


def grouped(parts: dict[str, dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """(tried, held) of the parts, summed over those that are called alike up to a comma."""
    sums: dict[str, tuple[int, int]] = {}
    for part, counts in parts.items():
        subject = part.partition(",")[0]
        tried, held = sums.get(subject, (0, 0))
        sums[subject] = tried + counts["tried"], held + counts["held"]
    return sums
