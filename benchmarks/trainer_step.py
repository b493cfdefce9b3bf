"""What a training step costs with PAPO, as a ratio to TRL's own GRPO step, measured side by side in one process.

    OMP_NUM_THREADS=1 python benchmarks/trainer_step.py --steps 40 --output benchmarks/results/trainer_step.json

Steps of PolarityTrainer (all statistics, a causal controller) and GRPOTrainer alternate. Both start each step from
the same weights (learning rate 0) and the same random state, so that they generate the same completions and do
the same work. The figure is the ratio of the medians; the interval comes from a bootstrap over pairs of steps.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from entropy_polarity.policy import resolve_model
from entropy_polarity.record import environment
from entropy_polarity.tasks.countdown import Countdown
from entropy_polarity.trainers.trl import PolarityConfig, PolarityTrainer


class Stepper:
    """A trainer driven one optimiser step at a time."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        trainer.create_optimizer_and_scheduler(num_training_steps=10_000)
        trainer.current_gradient_accumulation_steps = 1
        self.batches = iter(trainer.get_train_dataloader())
        trainer.model.train()

    def step(self, seed: int) -> float:
        torch.manual_seed(seed)
        batch = next(self.batches)
        start = time.perf_counter()
        self.trainer.training_step(self.trainer.model, batch, None)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        return time.perf_counter() - start


def steppers(prompts: int, group: int, folder: str) -> tuple[Stepper, Stepper]:
    task = Countdown(numbers=(4,))
    problems = [task.problem(0, i, "train") for i in range(4096)]
    dataset = Dataset.from_dict({"prompt": [p.prompt for p in problems], "problem": list(range(len(problems)))})

    def verified(completions, problem, **_):
        return [task.score(problems[i], text).reward for i, text in zip(problem, completions, strict=True)]

    settings: dict[str, Any] = {
        "output_dir": folder, "per_device_train_batch_size": prompts * group, "num_generations": group,
        "max_completion_length": 16, "max_steps": 10_000, "learning_rate": 0.0, "report_to": "none", "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, "seed": 0,
    }  # fmt: skip

    def build(kind: type, config: Any) -> Stepper:
        path = resolve_model("embedded")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        return Stepper(
            kind(
                model=model,
                reward_funcs=verified,
                args=config,
                train_dataset=dataset,
                processing_class=AutoTokenizer.from_pretrained(path),
            )
        )

    papo = PolarityConfig(**settings, method="papo", method_settings={"controller": "trend"})
    return build(PolarityTrainer, papo), build(GRPOTrainer, GRPOConfig(**settings))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = steppers(arguments.prompts, arguments.group, folder)
        times = {"papo": [], "grpo": []}
        for seed in range(arguments.steps + 3):
            # Who goes first alternates too: the second of a pair finds warmer caches.
            order = [("papo", ours), ("grpo", theirs)][:: 1 if seed % 2 else -1]
            pair = {name: stepper.step(seed) for name, stepper in order}
            if seed >= 3:  # the first steps pay for warming up
                for name, seconds in pair.items():
                    times[name].append(seconds)
    papo, grpo = np.array(times["papo"]), np.array(times["grpo"])
    picks = np.random.default_rng(0).integers(len(papo), size=(2000, len(papo)))
    ratios = np.median(papo[picks], axis=1) / np.median(grpo[picks], axis=1)
    result = {
        "benchmark": "trainer_step",
        "completions_per_step": arguments.prompts * arguments.group,
        "steps": len(papo),
        "papo_median_seconds": float(np.median(papo)),
        "grpo_median_seconds": float(np.median(grpo)),
        "ratio": float(np.median(papo) / np.median(grpo)),
        "ratio_95": [float(q) for q in np.quantile(ratios, [0.025, 0.975])],
        "environment": environment(seed=0) | {"command": "see the top of benchmarks/trainer_step.py"},
    }
    low, high = result["ratio_95"]
    print(f"PAPO step / GRPO step = {result['ratio']:.3f}  [{low:.3f}, {high:.3f}]  over {len(papo)} pairs of steps")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
