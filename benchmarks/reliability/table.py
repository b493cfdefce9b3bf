"""The table of docs/reliability.md, from the result files of this folder's scripts, for benchmarks/results_page.py."""

import json
from pathlib import Path
from typing import Any

from blocks import markdown

PARTS = {
    "numerics": "statistics and gradients against float64",
    "parity": "training with λ = 0, and with `grpo`, against TRL's GRPOTrainer, bit for bit",
    "grading": "real answers, each against its own solution and against others",
    "runs": "kills, damaged files, clocks, locks and links of run directories",
    "strangers": "run directories and texts of strangers, and bad input to every command",
    "sandbox": "attacks on the tool `python`",
}


def table(folder: Path) -> str:
    """What each script tried, and how much of it held; its parts in lines below it."""
    rows: list[list[str]] = []
    for name, what in PARTS.items():
        path = folder / f"reliability-{name}.json"
        if not path.is_file():
            rows.append([f"**{what}**", "", "", "not run yet"])
            continue
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        environment = found["environment"]
        where = f"[{name}.py](../benchmarks/reliability/{name}.py), {environment['date'][:10]}"
        rows.append([f"**{what}**", f"{found['tried']:,}", f"{found['held']:,}", where])
        for part, counts in found["parts"].items():
            rows.append([f"· {part}", f"{counts['tried']:,}", f"{counts['held']:,}", ""])
    return markdown(["what", "tried", "held", "by, and when"], rows)
