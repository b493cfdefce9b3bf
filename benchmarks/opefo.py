"""Is OPEFO's λ near 0.001?

Its λ = (D- - D+) / (D- + D+) on the rollouts of a run of plain GRPO, with both estimates of a token's entropy change:
d = -A (1 - p)² (log p + H), OPEFO's, and P = A T, the exact first order.

    OMP_NUM_THREADS=1 python benchmarks/opefo.py --output benchmarks/results/opefo.json

One seed of `grpo` on countdown with four numbers, strictly on-policy (one update a rollout), 60 rollouts: about five
minutes on one core. A summary of the paper says that λ stays within 0.00025 to 0.00175 without a clip.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from blocks import markdown

from entropy_polarity.experiments.results import provenance, write_document
from entropy_polarity.experiments.setup import TrainingRun, quiet
from entropy_polarity.maths import branch_flows
from entropy_polarity.runs.recipe import load_recipe
from entropy_polarity.tokens import Tokens
from entropy_polarity.transforms.weights import token_flow, token_polarity

PUBLISHED = (0.00025, 0.00175)
RULES = {"opefo": token_flow, "opefo_polarity": token_polarity}


def balance(tokens: Tokens, rule: str) -> float | None:
    """The λ of one rule on one rollout; None where a branch is empty."""
    positive, negative = (x.item() for x in branch_flows(RULES[rule](tokens).double()))
    return (negative - positive) / (negative + positive) if min(positive, negative) > 0 else None


def record(seed: int, rollouts: int, prompts: int) -> list[dict[str, Any]]:
    """A run of GRPO, and of each of its rollouts the entropy and the λ of both rules."""
    recipe = load_recipe(
        "countdown",
        [
            'method={name="grpo"}', f"seed={seed}", f"trainer.max_steps={rollouts}", "trainer.num_iterations=1",
            f"trainer.per_device_train_batch_size={16 * prompts}", "trainer.use_cpu=true", 'trainer.save_strategy="no"',
        ],
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        trainer = TrainingRun.from_recipe(recipe, Path(folder)).trainer

        def note(rollout: Any) -> None:
            found = {rule: balance(rollout.tokens, rule) for rule in RULES}
            rows.append({"entropy": rollout.metrics["polarity/entropy"], **found})

        trainer.on_rollout = note
        trainer.train()
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float | int]]:
    """Of each rule: median and range of λ, and on how many rollouts it lies where the summary says."""
    found = {}
    for rule in RULES:
        values = [row[rule] for row in rows if row[rule] is not None]
        low, high = PUBLISHED
        found[rule] = {
            "rollouts": len(values),
            "median": statistics.median(values),
            "smallest": min(values),
            "largest": max(values),
            "smallest_size": min(map(abs, values)),
            "within_published": sum(low <= value <= high for value in values),
        }
    return found


def table(result: dict[str, Any]) -> str:
    head = ["estimate", "rollouts", "λ: median", "from", "to", "smallest λ in size", "within 0.00025 to 0.00175"]
    names = {"opefo": "d, `opefo`", "opefo_polarity": "P, `opefo_polarity`"}
    rows = []
    for rule, found in result["summary"].items():
        numbers = [f"{found[name]:+.3f}" for name in ("median", "smallest", "largest")]
        size = f"{found['smallest_size']:.4f}"
        rows.append([names[rule], str(found["rollouts"]), *numbers, size, str(found["within_published"])])
    return markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rollouts", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=16)
    arguments = parser.parse_args()
    rows = record(arguments.seed, arguments.rollouts, arguments.prompts)
    result = {"benchmark": "opefo", "environment": provenance(), "seed": arguments.seed, "published": PUBLISHED}
    result |= {"summary": summary(rows), "rollouts": rows}
    print(table(result))
    write_document(arguments.output, result)


if __name__ == "__main__":
    main()
