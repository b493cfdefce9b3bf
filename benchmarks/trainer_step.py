"""What a training step costs with PAPO, as a ratio to TRL's own GRPO step, measured side by side in one process.

    OMP_NUM_THREADS=1 python benchmarks/trainer_step.py --prompts 8 --output benchmarks/results/trainer_step.json

Steps of PolarityTrainer (all statistics, a causal controller), of it with a forecast of every update, of it with exact
signs on every rollout, and of two GRPOTrainers alternate. All start each step from the same weights (learning rate 0)
and the same random state, so that they generate the same completions and do the same work. The figures are ratios of
medians: of PAPO to both GRPOs, of the exact signs to PAPO, and of the forecast to PAPO, there of means over the steps
that one of its slopes serves. Beside them stands that of the two GRPOs, which would be 1 on a quiet machine: the noise
of this measurement. Intervals come from a bootstrap over rounds.
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

from entropy_polarity.forecast import EVERY
from entropy_polarity.policy import resolve_model
from entropy_polarity.record import environment
from entropy_polarity.tasks.countdown import Countdown
from entropy_polarity.trainers.auditing import UpdateForecaster
from entropy_polarity.trainers.trl import PolarityConfig, PolarityTrainer


class Stepper:
    """A trainer driven one optimiser step at a time."""

    def __init__(self, trainer: Any, forecaster: UpdateForecaster | None = None) -> None:
        self.trainer, self.forecaster = trainer, forecaster
        if forecaster is not None:
            forecaster.attach(trainer)
        trainer.create_optimizer_and_scheduler(num_training_steps=10_000)
        trainer.current_gradient_accumulation_steps = 1
        self.batches = iter(trainer.get_train_dataloader())
        trainer.model.train()

    def step(self, seed: int) -> float:
        torch.manual_seed(seed)
        batch = next(self.batches)
        start = time.perf_counter()
        self.trainer.training_step(self.trainer.model, batch, None)
        where = (self.trainer.args, self.trainer.state, self.trainer.control)
        if self.forecaster is not None:
            self.forecaster.on_pre_optimizer_step(*where)
        self.trainer.optimizer.step()
        if self.forecaster is not None:
            self.forecaster.on_optimizer_step(*where)
        self.trainer.optimizer.zero_grad()
        return time.perf_counter() - start


def steppers(prompts: int, group: int, folder: str) -> dict[str, Stepper]:
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

    def build(kind: type, config: Any, forecaster: UpdateForecaster | None = None) -> Stepper:
        path = resolve_model("embedded")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        return Stepper(
            kind(
                model=model,
                reward_funcs=verified,
                args=config,
                train_dataset=dataset,
                processing_class=AutoTokenizer.from_pretrained(path),
            ),
            forecaster,
        )

    def papo(**method: Any) -> PolarityConfig:
        return PolarityConfig(**settings, method="papo", method_settings={"controller": "trend", **method})

    return {
        "papo": build(PolarityTrainer, papo()),
        "forecast": build(PolarityTrainer, papo(), UpdateForecaster()),
        "exact": build(PolarityTrainer, papo(sign_from="exact")),
        "grpo": build(GRPOTrainer, GRPOConfig(**settings)),
        "again": build(GRPOTrainer, GRPOConfig(**settings)),
    }


def shown(figure: dict[str, Any]) -> str:
    low, high = figure["interval_95"]
    return f"{figure['ratio']:.3f} [{low:.3f}, {high:.3f}]"


def cycles(seconds: np.ndarray) -> np.ndarray:
    """Means over the updates between two slopes of a forecast: a median of steps would see one kind of them only."""
    whole = len(seconds) // EVERY * EVERY
    return seconds[:whole].reshape(-1, EVERY).mean(axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainers = steppers(arguments.prompts, arguments.group, folder)
        names = list(trainers)
        times: dict[str, list[float]] = {name: [] for name in names}
        for seed in range(arguments.steps + 3):
            first = seed % len(names)  # who goes first changes: the later ones find warmer caches
            for name in names[first:] + names[:first]:
                seconds = trainers[name].step(seed)
                if seed >= 3:  # the first steps pay for warming up
                    times[name].append(seconds)
    papo, forecast, exact, grpo, again = (np.array(times[name]) for name in names)

    def ratio(top: np.ndarray, bottom: np.ndarray) -> dict[str, Any]:
        picks = np.random.default_rng(0).integers(top.shape[-1], size=(2000, top.shape[-1]))
        draws = np.median(top[..., picks], axis=-1) / np.median(
            bottom[..., picks].reshape(-1, *picks.shape), axis=(0, 2)
        )
        low, high = np.quantile(draws, [0.025, 0.975])
        return {"ratio": float(np.median(top) / np.median(bottom)), "interval_95": [float(low), float(high)]}

    result = {
        "benchmark": "trainer_step",
        "completions_per_step": arguments.prompts * arguments.group,
        "rounds": len(papo),
        "median_seconds": {name: float(np.median(values)) for name, values in times.items()},
        "papo_to_grpo": ratio(papo, np.stack([grpo, again])),
        "forecast_to_papo": ratio(cycles(forecast), cycles(papo)),
        "exact_to_papo": ratio(exact, papo),
        "grpo_to_grpo": ratio(again, grpo),
        "environment": environment(seed=0) | {"command": "see the top of benchmarks/trainer_step.py"},
    }
    print(f"PAPO step / GRPO step = {shown(result['papo_to_grpo'])}, over {len(papo)} rounds")
    print(f"with a forecast / without = {shown(result['forecast_to_papo'])}")
    print(f"exact signs on every rollout / local ones = {shown(result['exact_to_papo'])}")
    print(f"GRPO step / GRPO step = {shown(result['grpo_to_grpo'])}, the noise of this measurement")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
