"""Can the entropy be put where one asks, and kept there? The thermostat beside other ways, on the embedded task.

    OMP_NUM_THREADS=1 python benchmarks/thermostat.py --jobs 2
    python benchmarks/thermostat.py --output benchmarks/results/thermostat.json
    python benchmarks/thermostat.py --table benchmarks/results/thermostat.json

Each run is GRPO on countdown with four numbers, 16 prompts x 16 completions a rollout, two updates a rollout, AdamW at
1e-4, 200 updates; what steers the entropy differs. The first command makes every run that has no file in the folder
yet, so it can be stopped and started again; a run is a few minutes on one core.

What is judged, over the second half of the run: the mean entropy against the target (2 %), and the mean absolute
deviation from the target against that of the same policy frozen at the end of the run (1.3 times), which is sampling
noise alone. After a disturbance at mid-run: how many rollouts it takes until the mean of the last ten stays within 2 %
of the target and twice its own sampling error.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from blocks import markdown
from transformers import TrainerCallback

STEPS, ROLLOUTS_FROZEN = 200, 100
TARGETS = (0.25, 0.35, 0.45, 0.55, 0.7)
SETTINGS = [
    "task.numbers=[4]",
    "trainer.per_device_train_batch_size=256",
    "trainer.learning_rate=1e-4",
    f"trainer.max_steps={STEPS}",
    "trainer.save_strategy='no'",
    "trainer.use_cpu=true",
]
PATH = {"path": "cosine", "level": 0.3, "horizon": STEPS // 2}  # falling, from where the policy starts
# Where a fixed bonus ends is measured for these on a seed of its own; the coefficient for a target lies between two.
COEFFICIENTS = (-0.05, 0.003, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3)  # a negative one is a price on entropy
SEARCH_SEED = 1000


def searched() -> dict[str, dict[str, Any]]:
    """The runs that the coefficients of the fixed bonus are chosen from."""
    methods = {f"bonus-search-{c}": {"name": "entropy_bonus", "coefficient": c} for c in COEFFICIENTS}
    return {name: {"kind": "search", "seed": SEARCH_SEED, "method": method} for name, method in methods.items()}


def tuned(folder: Path) -> dict[float, float]:
    """The coefficient for each target: between the searched ones, linear in the entropy that they end at."""
    ends = []
    for name, run in searched().items():
        entropy = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["entropy"]
        ends.append((float(np.mean(entropy[len(entropy) // 2 :])), run["method"]["coefficient"]))
    levels, coefficients = zip(*sorted(ends), strict=True)
    return {target: float(f"{np.interp(target, levels, coefficients):.3g}") for target in TARGETS}


def runs(seeds: list[int], coefficients: dict[float, float]) -> dict[str, dict[str, Any]]:
    """Every run of the table: its kind, seed, method, further trainer settings, target and disturbance."""
    every: dict[str, dict[str, Any]] = {}

    def add(kind: str, seed: int, method: dict[str, Any], target: float | str, name: str = "", **more: Any) -> None:
        every[f"{kind}-{name or target}-s{seed}"] = {
            "kind": kind, "seed": seed, "method": method, "target": target, **more
        }  # fmt: skip

    for seed in seeds:
        middle = {"name": "papo", "controller": "thermostat", "level": 0.45}
        for target in TARGETS:
            add("thermostat", seed, middle | {"level": target}, target)
        add("thermostat", seed, {"name": "papo", "controller": "thermostat", **PATH}, "path")
        for disturbance in ("learning-rate", "prompts"):
            add("thermostat", seed, middle, 0.45, disturbance, disturbance=disturbance)
        for target in TARGETS:
            add("bonus", seed, {"name": "entropy_bonus", "coefficient": coefficients[target]}, target)
            adaptive = [
                "trainer.use_adaptive_entropy=true",
                "trainer.entropy_coef=0.0",
                f"trainer.entropy_target={target}",
            ]
            add("trl-adaptive", seed, {"name": "grpo"}, target, settings=adaptive)
            add("entropic", seed, {"name": "entropic", "probability": 0.5, "target": target}, target)
    return every


class LearningRate(TrainerCallback):
    """The learning rate times `factor` from update `step` on."""

    def __init__(self, step: int, factor: float) -> None:
        self.step, self.factor = step, factor

    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
        if state.global_step == self.step:
            assert lr_scheduler is not None
            lr_scheduler.base_lrs = [rate * self.factor for rate in lr_scheduler.base_lrs]
            for group in lr_scheduler.optimizer.param_groups:
                group["lr"] *= self.factor


def train(run: dict[str, Any]) -> dict[str, Any]:
    """The entropy of every rollout, and of as many of the final policy, frozen."""
    from transformers import PrinterCallback

    from entropy_polarity.experiments.setup import prompts_of, quiet, trainer_config
    from entropy_polarity.policy.loading import load_policy
    from entropy_polarity.runs.recipe import load_recipe
    from entropy_polarity.support.provenance import environment
    from entropy_polarity.tasks import make_task
    from entropy_polarity.trainers.trl import PolarityTrainer

    quiet()
    recipe = load_recipe("countdown", [*SETTINGS, *run.get("settings", []), f"seed={run['seed']}"])
    recipe = replace(recipe, method=run["method"])
    task = make_task(**recipe.task)
    config = trainer_config(recipe, Path(tempfile.mkdtemp()), task)
    model, tokenizer = load_policy("embedded")
    dataset, reward = prompts_of(task, tokenizer, config, recipe.seed)
    if run.get("disturbance") == "prompts":
        easier, problems = prompts_of(make_task("countdown", numbers=[3]), tokenizer, config, recipe.seed)
        half = len(dataset) // 2
        for index in range(half, len(dataset)):
            reward.problems[index] = problems.problems[index]
        prompts = dataset["prompt"][:half] + easier["prompt"][half:]
        dataset = dataset.remove_columns("prompt").add_column("prompt", prompts)  # type: ignore[call-arg]
    trainer = PolarityTrainer(model, reward, config, train_dataset=dataset, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    if run.get("disturbance") == "learning-rate":
        trainer.add_callback(LearningRate(STEPS // 2, 2.0))
    rows: list[dict[str, float]] = []
    trainer.on_rollout = lambda rollout: rows.append(rollout.metrics)
    trainer.train()
    frozen = frozen_entropy(trainer, reward) if run["method"].get("controller") == "thermostat" else []
    kept = ("lambda", "entropy_reference", "entropy_filtered", "entropy_response", "entropy_drift")
    return {
        **run,
        "entropy": [row["polarity/entropy"] for row in rows],
        "frozen": frozen,
        "reward": [row["reward"] for row in trainer.state.log_history if "reward" in row],
        **{name: [row[f"polarity/{name}"] for row in rows if f"polarity/{name}" in row] for name in kept},
        "environment": {k: v for k, v in environment(run["seed"]).items() if k != "command"},
    }


def frozen_entropy(trainer: Any, reward: Any) -> list[float]:
    """Mean entropies of rollouts that nothing is learnt from, on fresh prompts."""
    entropies: list[float] = []
    trainer.on_rollout = lambda rollout: entropies.append(rollout.metrics["polarity/entropy"])
    count = trainer.args.generation_batch_size // trainer.num_generations
    for k in range(ROLLOUTS_FROZEN):
        problems = [reward.task.problem(10_000 + k, index, "train") for index in range(count)]
        reward.problems = problems
        rows = [{"prompt": p.prompt, "problem": i} for i, p in enumerate(problems)]
        trainer.model.train()
        trainer._generate_and_score_completions([row for row in rows for _ in range(trainer.num_generations)])
    return entropies


def wanted(run: dict[str, Any]) -> np.ndarray:
    """The target of every rollout."""
    length = len(run["entropy"])
    if run["target"] != "path":
        return np.full(length, run["target"])
    done = np.minimum(1, np.arange(length) / PATH["horizon"])
    return run["entropy"][0] + (PATH["level"] - run["entropy"][0]) * (1 - np.cos(np.pi * done)) / 2


def judge(run: dict[str, Any], noise: float) -> dict[str, Any]:
    """How far a run was from its target over its second half; `noise`: mean absolute deviation of a frozen policy."""
    target = wanted(run)
    off = np.array(run["entropy"]) / target - 1
    half = len(off) // 2
    verdict = {
        "bias": float(off[half:].mean()),
        "deviation": float(np.abs(off[half:]).mean()),
        "frozen_deviation": noise,
        "deviation_ratio": float(np.abs(off[half:]).mean() / noise),
        "reward": float(np.mean(run["reward"][-10:])),
    }
    if "disturbance" in run:
        means = np.convolve(off[half:], np.ones(10) / 10, "valid")
        # A mean of ten rollouts has its own sampling error; the deviation of a normal is 0.8 of its sd.
        allowed = 0.02 + 2 * noise / 0.8 / math.sqrt(10)
        outside = np.flatnonzero(np.abs(means) > allowed)
        # The last rollout of the first window from which on all are inside; with none outside nothing was disturbed.
        verdict["allowed"] = allowed
        verdict["recovered_after"] = int(outside[-1] + 1) + 10 if len(outside) else 0
    return verdict


def relative_noise(run: dict[str, Any]) -> float:
    frozen = np.array(run["frozen"])
    return float(np.abs(frozen / frozen.mean() - 1).mean())


def make(folder: Path, every: dict[str, dict[str, Any]], jobs: int) -> None:
    """Every run that has no file yet, `jobs` at a time, each in a process of its own."""
    waiting = [name for name in every if not (folder / f"{name}.json").exists()]
    working: list[tuple[str, subprocess.Popen]] = []
    while waiting or working:
        while waiting and len(working) < jobs:
            name = waiting.pop(0)
            one = json.dumps(every[name] | {"id": name})
            log = (folder / f"{name}.log").open("w", encoding="utf-8")
            process = subprocess.Popen(
                [sys.executable, __file__, "--folder", folder, "--one", one], stderr=log, stdout=log
            )
            working.append((name, process))
        name, process = working.pop(0)
        try:
            code = process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            working.append((name, process))
            continue
        print(f"{name}: {'done' if code == 0 else f'failed, see {folder}/{name}.log'}", flush=True)


def collected(folder: Path) -> list[dict[str, Any]]:
    """What is in the folder, numbers as precise as they mean something."""

    def short(value: Any) -> Any:
        return [float(f"{x:.4g}") for x in value] if isinstance(value, list) else value

    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    numbers = ("entropy", "frozen", "reward", "lambda", "entropy_filtered", "entropy_response", "entropy_drift")
    return [{name: short(v) if name in numbers else v for name, v in run.items()} for run in found]


def noise_of(results: list[dict[str, Any]], run: dict[str, Any]) -> float:
    """The frozen policy's deviation at the target: of the thermostat's run of that target and seed."""
    for other in results:
        same = all(other.get(name) == run.get(name) for name in ("target", "seed"))
        if same and other["frozen"] and "disturbance" not in other:
            return relative_noise(other)
    return math.nan


NAMES = {
    "thermostat": "thermostat",
    "bonus": "fixed bonus, tuned for the target",
    "trl-adaptive": "TRL's adaptive coefficient",
    "entropic": "EntroPIC (threshold 0.5: our guess)",
}


def table(results: list[dict[str, Any]]) -> str:
    """Held levels: method by target, the mean over the second half, its error, and the deviation against noise."""
    judged = [run for run in results if run["kind"] in NAMES and "disturbance" not in run]
    rows = []
    order = {kind: place for place, kind in enumerate(NAMES)}
    for run in sorted(judged, key=lambda run: (order[run["kind"]], str(run["target"]), run["seed"])):
        verdict = judge(run, noise_of(results, run))
        half = run["entropy"][len(run["entropy"]) // 2 :]
        target = f"falling to {PATH['level']:.2f}" if run["target"] == "path" else f"{run['target']:.2f}"
        kept = abs(verdict["bias"]) <= 0.02 and verdict["deviation_ratio"] <= 1.3
        rows.append(
            [
                NAMES[run["kind"]],
                target,
                f"{np.mean(half):.3f}",
                f"{verdict['bias']:+.1%}",
                f"{verdict['deviation_ratio']:.2f}",
                "yes" if kept else "no",
                f"{verdict['reward']:.2f}",
            ]
        )
    return markdown(
        ["what steers", "target, nats", "mean entropy", "off by", "deviation / frozen", "both kept", "reward"], rows
    )


def disturbances(results: list[dict[str, Any]]) -> str:
    """Disturbed at mid-run, target 0.45: rollouts until the entropy is back."""
    names = {"learning-rate": "the learning rate doubled", "prompts": "prompts with three numbers instead of four"}
    rows = []
    for run in results:
        if "disturbance" in run:
            verdict, half = judge(run, noise_of(results, run)), len(run["entropy"]) // 2
            recovered, after = verdict["recovered_after"], np.abs(run["lambda"][half:])
            at_bound = int(np.argmin(np.append(after, 0) > 0.8 - 1e-6))  # rollouts from mid-run on, without a break
            rows.append(
                [
                    names[run["disturbance"]],
                    f"{run['entropy'][half]:.2f}",
                    str(at_bound),
                    f"± {verdict['allowed']:.1%}",
                    str(recovered),
                    "yes" if recovered <= 15 else "no",
                ]
            )
    columns = ["at mid-run", "first entropy after", "rollouts with λ at its bound", "band", "rollouts until it is back"]
    return markdown([*columns, "within 15"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/thermostat"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[3])
    parser.add_argument("--only", default="", help="only runs whose name begins so")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--output", type=Path, help="write what the folder holds, and print the tables")
    parser.add_argument("--table", type=Path, help="print the tables of an existing result file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.folder
    if arguments.one:
        run = json.loads(arguments.one)
        path = folder / f"{run.pop('id')}.json"
        path.with_suffix(".part").write_text(json.dumps(train(run)), encoding="utf-8")
        path.with_suffix(".part").replace(path)
    elif arguments.table or arguments.output:
        results = (
            json.loads(arguments.table.read_text(encoding="utf-8"))["runs"] if arguments.table else collected(folder)
        )
        if arguments.output:
            lines = ",\n".join(json.dumps(run) for run in results)
            arguments.output.write_text(f'{{"benchmark": "thermostat", "runs": [\n{lines}\n]}}\n', encoding="utf-8")
        print(table(results), disturbances(results), sep="\n\n")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        make(folder, {n: run for n, run in searched().items() if n.startswith(arguments.only)}, arguments.jobs)
        complete = all((folder / f"{name}.json").exists() for name in searched())
        coefficients = tuned(folder) if complete else dict.fromkeys(TARGETS, math.nan)
        chosen = {n: run for n, run in runs(arguments.seeds, coefficients).items() if n.startswith(arguments.only)}
        make(folder, {n: run for n, run in chosen.items() if complete or run["kind"] != "bonus"}, arguments.jobs)


if __name__ == "__main__":
    main()
