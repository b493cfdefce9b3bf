"""The entropy that PAPO holds on tasks where nothing is searched, from one run of GRPO on each, with a seed of its own.

On countdown the search chose the level 0.3 (search.toml), where GRPO ended at 0.2642 nats: 1.14 times as much. The
same share of the entropy over GRPO's last ten rollouts is the level elsewhere:

    for task in guess keydoor gym-countdown; do
      OMP_NUM_THREADS=1 papo train $task --method grpo --seed 100 --set trainer.use_cpu=true --output runs/level-$task
    done
    OMP_NUM_THREADS=1 papo train guess --method grpo --seed 100 --set trainer.use_cpu=true \\
      --set trainer.learning_rate=1e-3 --max-steps 150 --output runs/level-guess-fast
    python benchmarks/levels.py runs/level-* --output benchmarks/results/levels.json

With --add the file's other runs stay in it.
"""

from typing import Any

from blocks import markdown
from demo_seeds import collect

from entropy_polarity.runs.record import Run

SHARE = 0.3 / 0.2642


def level(result: dict[str, Any]) -> float:
    return round(SHARE * result["entropy"][1], 2)


def table(results: list[dict[str, Any]]) -> str:
    rows = []
    for r in sorted(results, key=lambda r: r["task"]):
        pass1 = r["pass_at"]["1"]
        rows.append(
            [
                r["task"],
                f"{r['learning_rate']:g}",
                str(r["steps"]),
                f"{r['entropy'][0]:.2f} → {r['entropy'][1]:.2f}",
                f"{pass1['before']['value']:.3f} → {pass1['after']['value']:.3f}",
                f"{level(r):.2f}",
            ]
        )
    return markdown(["task", "learning rate", "updates", "entropy, nats", "pass@1", "PAPO's level"], rows)


def main() -> None:
    def setting(run: Run) -> dict[str, Any]:
        return {"task": run.config["task"]["name"], "learning_rate": run.config["trainer"]["learning_rate"]}

    collect("levels", __doc__, setting, table)


if __name__ == "__main__":
    main()
