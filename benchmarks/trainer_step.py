"""What a training step costs with PAPO, as a ratio to TRL's own GRPO step, measured side by side in one process.

    OMP_NUM_THREADS=1 python benchmarks/trainer_step.py --prompts 8 --output benchmarks/results/trainer_step.json
    python benchmarks/trainer_step.py --device cuda --size 0.6b --prompts 16 --group 8 --updates 2 \\
        --only-grpo-and-papo --output benchmarks/results/trainer_step_cuda.json

Steps of PolarityTrainer (all statistics, a causal controller), of it with a forecast of every update, of it with exact
signs on every rollout, and of two GRPOTrainers alternate. All start each step from the same weights (learning rate 0)
and the same random state, so that they generate the same completions and do the same work. The figures are ratios of
medians: of PAPO to both GRPOs, of the exact signs to PAPO, and of the forecast to PAPO, there of means over the steps
that one of its slopes serves. Beside them stands that of the two GRPOs, which would be 1 on a quiet machine: the noise
of this measurement. Intervals come from a bootstrap over rounds.

With two `--updates` a rollout every other step generates nothing: "papo_update_to_grpo_update" is of these alone, and
the others are of whole rollouts. The models of `--size` but "embedded" have random weights, and their reward is the
parity of what they wrote. On a GPU a step's peak memory is counted above what it starts with.
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
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from entropy_polarity.diagnostics.forecast import EVERY
from entropy_polarity.policy import resolve_model
from entropy_polarity.support.provenance import environment
from entropy_polarity.tasks.countdown import Countdown
from entropy_polarity.trainers.trl import PolarityConfig, PolarityTrainer
from entropy_polarity.trainers.trl.auditing import UpdateForecaster

WARM_UP_ROLLOUTS = 3

# Of models with random weights: layers, width, heads and key-value heads, width of the perceptron, vocabulary.
SIZES = {
    "tiny": (2, 32, 2, 1, 64, 1000),
    "135m": (30, 576, 9, 3, 1536, 49_152),  # as SmolLM2-135M
    "0.6b": (28, 1024, 16, 8, 3072, 151_936),  # as Qwen3-0.6B
}


def random_model(size: str) -> Qwen3ForCausalLM:
    """A Qwen3 of that size with random weights, in bfloat16."""
    layers, width, heads, kv_heads, perceptron, vocabulary = SIZES[size]
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=perceptron, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=width // heads, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).bfloat16()


class Stepper:
    """A trainer driven one optimiser step at a time."""

    def __init__(self, trainer: Any, forecaster: UpdateForecaster | None = None) -> None:
        self.trainer, self.forecaster, self.peak_bytes = trainer, forecaster, 0
        if forecaster is not None:
            forecaster.attach(trainer)
        trainer.create_optimizer_and_scheduler(num_training_steps=10_000)
        trainer.current_gradient_accumulation_steps = 1
        self.batches = iter(trainer.get_train_dataloader())
        trainer.model.train()

    def step(self, seed: int) -> float:
        torch.manual_seed(seed)
        batch = next(self.batches)
        held = self.settle()
        start = time.perf_counter()
        self.trainer.training_step(self.trainer.model, batch, None)
        where = (self.trainer.args, self.trainer.state, self.trainer.control)
        if self.forecaster is not None:
            self.forecaster.on_pre_optimizer_step(*where)
        self.trainer.optimizer.step()
        if self.forecaster is not None:
            self.forecaster.on_optimizer_step(*where)
        self.trainer.optimizer.zero_grad()
        if self.on_gpu:
            torch.cuda.synchronize()
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated() - held)
        return time.perf_counter() - start

    @property
    def on_gpu(self) -> bool:
        return self.trainer.args.device.type == "cuda"

    def settle(self) -> int:
        """Wait for a GPU and count its peak from now on; the bytes that are held."""
        if not self.on_gpu:
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()


def steppers(arguments: argparse.Namespace, folder: str) -> dict[str, Stepper]:
    embedded = arguments.size == "embedded"
    task = Countdown(numbers=(4,))
    problems = [task.problem(0, i, "train") for i in range(4096)]
    dataset = Dataset.from_dict({"prompt": [p.prompt for p in problems], "problem": list(range(len(problems)))})

    def verified(completions, problem, **_):
        return [task.score(problems[i], text).reward for i, text in zip(problem, completions, strict=True)]

    def parity(completion_ids, **_):
        return [float(sum(ids) % 2) for ids in completion_ids]

    settings: dict[str, Any] = {
        "output_dir": folder, "per_device_train_batch_size": arguments.prompts * arguments.group,
        "num_generations": arguments.group, "num_iterations": arguments.updates, "max_steps": 10_000,
        "max_completion_length": 128 if arguments.device == "cuda" else 16, "learning_rate": 0.0, "report_to": "none",
        "use_cpu": arguments.device == "cpu", "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True,
        "seed": 0,
    }  # fmt: skip

    def build(kind: type, config: Any, forecaster: UpdateForecaster | None = None) -> Stepper:
        path = resolve_model("embedded")
        model = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            if embedded
            else random_model(arguments.size)
        )
        return Stepper(
            kind(
                model=model,
                reward_funcs=verified if embedded else parity,
                args=config,
                train_dataset=dataset,
                processing_class=AutoTokenizer.from_pretrained(path),
            ),
            forecaster,
        )

    def papo(**method: Any) -> PolarityConfig:
        return PolarityConfig(**settings, method="papo", method_settings={"controller": "trend", **method})

    built = {"papo": build(PolarityTrainer, papo())}
    if not arguments.only_grpo_and_papo:
        built["forecast"] = build(PolarityTrainer, papo(), UpdateForecaster())
        built["exact"] = build(PolarityTrainer, papo(sign_from="exact"))
    return built | {name: build(GRPOTrainer, GRPOConfig(**settings)) for name in ("grpo", "again")}


def shown(figure: dict[str, Any]) -> str:
    low, high = figure["interval_95"]
    return f"{figure['ratio']:.3f} [{low:.3f}, {high:.3f}]"


def cycles(seconds: np.ndarray, length: int) -> np.ndarray:
    """Means over `length` steps, along the last dimension: a median of steps would see one kind of them only."""
    whole = seconds.shape[-1] // length * length
    return seconds[..., :whole].reshape(*seconds.shape[:-1], -1, length).mean(axis=-1)


def ratio(top: np.ndarray, bottom: np.ndarray) -> dict[str, Any]:
    """The ratio of the medians of two figures a round, (rounds,) or (series, rounds), with a bootstrap over rounds."""
    picks = np.random.default_rng(0).integers(top.shape[-1], size=(2000, top.shape[-1]))
    draws = np.median(top[..., picks], axis=-1) / np.median(bottom[..., picks].reshape(-1, *picks.shape), axis=(0, 2))
    low, high = np.quantile(draws, [0.025, 0.975])
    return {"ratio": float(np.median(top) / np.median(bottom)), "interval_95": [float(low), float(high)]}


def figures(times: dict[str, np.ndarray], updates: int) -> dict[str, dict[str, Any]]:
    """The ratios of a result file from the seconds of each trainer's steps, `updates` of them a rollout."""
    whole = {name: cycles(seconds, updates) for name, seconds in times.items()}
    both = np.stack([whole["grpo"], whole["again"]])
    found = {"papo_to_grpo": ratio(whole["papo"], both), "grpo_to_grpo": ratio(whole["again"], whole["grpo"])}
    if updates > 1:
        later = {name: seconds[updates - 1 :: updates] for name, seconds in times.items()}
        found["papo_update_to_grpo_update"] = ratio(later["papo"], np.stack([later["grpo"], later["again"]]))
    if "forecast" in times:
        found["forecast_to_papo"] = ratio(cycles(times["forecast"], EVERY), cycles(times["papo"], EVERY))
        found["exact_to_papo"] = ratio(whole["exact"], whole["papo"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", choices=["embedded", *SIZES], default="embedded")
    parser.add_argument("--updates", type=int, default=1, help="on each rollout")
    parser.add_argument("--only-grpo-and-papo", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    warm_up = WARM_UP_ROLLOUTS * arguments.updates
    with tempfile.TemporaryDirectory() as folder:
        trainers = steppers(arguments, folder)
        names = list(trainers)
        times: dict[str, list[float]] = {name: [] for name in names}
        for seed in range(arguments.steps * arguments.updates + warm_up):
            first = seed % len(names)  # who goes first changes: the later ones find warmer caches
            for name in names[first:] + names[:first]:
                seconds = trainers[name].step(seed)
                if seed >= warm_up:
                    times[name].append(seconds)
    ratios = figures({name: np.array(seconds) for name, seconds in times.items()}, arguments.updates)
    result = {
        "benchmark": "trainer_step",
        "size": arguments.size,
        "updates": arguments.updates,
        "completions_per_step": arguments.prompts * arguments.group,
        "rounds": arguments.steps,
        "median_seconds": {name: float(np.median(values)) for name, values in times.items()},
        **ratios,
        "peak_bytes": {name: trainer.peak_bytes for name, trainer in trainers.items() if trainer.on_gpu},
        "environment": environment(seed=0) | {"command": "see the top of benchmarks/trainer_step.py"},
    }
    if arguments.device == "cuda":
        result |= {"device": "cuda", "card": torch.cuda.get_device_name()}
    for name, figure in ratios.items():
        print(f"{name.replace('_', ' ')} = {shown(figure)}, over {arguments.steps} rounds")
    print("grpo to grpo is the noise of this measurement")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
