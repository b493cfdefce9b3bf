"""What it brings and costs to keep freed memory while training on a CPU, as `papo train` does.

    OMP_NUM_THREADS=1 python benchmarks/kept_memory.py --output benchmarks/results/kept_memory.json

Of each recipe the same few steps are trained in processes of their own, by turns with and without: ratios of the mean
seconds of a step after the first, and of the peak memory of the process. Both make the same weights, bit for bit.
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from blocks import markdown

RECIPES = {"countdown": 5, "guess": 4, "keydoor": 2}  # and how many steps


def part(recipe: str, keep: bool) -> dict[str, Any]:
    """A few steps in this process."""
    from entropy_polarity.experiments.setup import TrainingRun, quiet
    from entropy_polarity.runs.recipe import load_recipe
    from entropy_polarity.support.machine import kept_memory

    quiet()
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"trainer.max_steps={RECIPES[recipe]}", "trainer.use_cpu=true"]
        loaded = load_recipe(recipe, settings)
        run = TrainingRun.from_recipe(loaded, Path(folder))
        with kept_memory() if keep else nullcontext():
            run.trainer.train()
    weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in run.model.parameters()))
    steps = [row["step_time"] for row in run.trainer.state.log_history if "step_time" in row]
    return {
        "seconds": float(np.mean(steps[1:])),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "weights": weights.hexdigest(),
    }


def measure(recipe: str, rounds: int) -> dict[str, Any]:
    made: dict[str, list[dict[str, Any]]] = {"plain": [], "kept": []}
    for _ in range(rounds):
        for kind, rows in made.items():
            command = [sys.executable, __file__, "--part", recipe, kind]
            rows.append(json.loads(subprocess.check_output(command, encoding="utf-8").splitlines()[-1]))
    if len({row.pop("weights") for rows in made.values() for row in rows}) > 1:
        raise SystemExit(f"{recipe}: the weights differ")
    return {"recipe": recipe, **made}


def table(results: list[dict[str, Any]]) -> str:
    def ratio(result: dict[str, Any], name: str) -> str:
        kept, plain = (np.median([row[name] for row in result[kind]]) for kind in ("kept", "plain"))
        each = [k[name] / p[name] for k, p in zip(result["kept"], result["plain"], strict=True)]
        return f"{kept / plain:.2f} ({min(each):.2f} to {max(each):.2f})"

    return markdown(
        ["recipe", "seconds of a step, kept / not kept (pair by pair)", "peak memory", "peak memory when kept, GiB"],
        [
            [
                r["recipe"],
                ratio(r, "seconds"),
                ratio(r, "peak_gib"),
                f"{np.median([row['peak_gib'] for row in r['kept']]):.1f}",
            ]
            for r in results
        ],
    )


def block(document: dict[str, Any]) -> str:
    """The table, and where it was made."""
    environment = document["environment"]
    machine, torch = environment["machine"], environment["packages"]["torch"]
    where = f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores; torch {torch}"
    return f"{where}; {environment['date'][:10]}.\n\n{table(document['results'])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--part", nargs=2, metavar=("RECIPE", "KIND"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(part(arguments.part[0], arguments.part[1] == "kept")))
        return
    from entropy_polarity.support.provenance import environment

    results = [measure(recipe, arguments.rounds) for recipe in RECIPES]
    print(table(results))
    if arguments.output:
        where = environment(0) | {"command": "see the top of benchmarks/kept_memory.py"}
        document = {"benchmark": "kept_memory", "environment": where, "results": results}
        arguments.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
