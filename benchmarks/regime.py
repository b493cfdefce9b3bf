"""In which regime does GRPO's entropy collapse? Chosen before any other method was run, by one criterion.

    for n in 3 4; do for rate in 1e-4 2e-4; do
      OMP_NUM_THREADS=1 papo train --method grpo --seed 100 --max-steps 200 --output runs/regime-$n-$rate \
        --set task.numbers=[$n] --set trainer.per_device_train_batch_size=256 --set trainer.learning_rate=$rate \
        --set evaluation.problems=190
    done; done   # and the other rows of the table, with their numbers, rates and updates (300 problems but for [3])
    python benchmarks/regime.py runs/regime-* --output benchmarks/results/regime.json

The criterion: the entropy falls by a quarter or more, and held-out pass@16 ends below the start by more than its
interval. Among the rates that meet it the one with the highest final pass@1 is taken.
"""

from typing import Any

from blocks import markdown
from demo_seeds import collect

from entropy_polarity.runs.record import Run


def table(results: list[dict[str, Any]]) -> str:
    rows = []
    for r in sorted(results, key=lambda r: (r["numbers"], r["learning_rate"], r["steps"])):
        (h0, h1), pass1, pass16 = r["entropy"], r["pass_at"]["1"], r["pass_at"]["16"]
        collapsed = h1 <= 0.75 * h0 and pass16["after"]["value"] < pass16["before"]["low"]
        rows.append(
            [
                ", ".join(map(str, r["numbers"])),
                f"{r['learning_rate']:g}",
                str(r["steps"]),
                f"{h0:.2f} → {h1:.2f}",
                f"{pass1['before']['value']:.3f} → {pass1['after']['value']:.3f}",
                f"{pass16['before']['value']:.3f} → {pass16['after']['value']:.3f}",
                "yes" if collapsed else "no",
            ]
        )
    return markdown(["numbers", "learning rate", "updates", "entropy, nats", "pass@1", "pass@16", "collapse"], rows)


def main() -> None:
    def setting(run: Run) -> dict[str, Any]:
        return {"numbers": run.config["task"]["numbers"], "learning_rate": run.config["trainer"]["learning_rate"]}

    collect("regime", __doc__, setting, table)


if __name__ == "__main__":
    main()
