"""Would the slope of a few parameters do? What each part of the model foretells of the realised entropy change.

    OMP_NUM_THREADS=1 python benchmarks/parts.py --output benchmarks/results/parts.json

Two formulas, each restricted to a part of the parameters: -<g, G>, the gradients of mean entropy and loss, and
<ḡ, δ>, the forecast of `Forecaster`. Both are compared with what came, on the states that were trained on. The
embeddings are tied to the head: their part is the local formula with a state-similarity factor (the inner product of
two states' last hidden states stands between their gradients in the logits), and what embeds the input, and the cross
terms of the two. `--from FILE` summarises the updates of a former result again.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from blocks import markdown
from torch import nn

from entropy_polarity.diagnostics.entropy import entropy_gradient, trainable_parameters
from entropy_polarity.diagnostics.forecast import Forecaster, dot, parameter_change
from entropy_polarity.experiments.flags import audit_recipe
from entropy_polarity.experiments.results import provenance, write_document
from entropy_polarity.experiments.setup import TrainingRun, quiet
from entropy_polarity.runs.recipe import DEFAULT_RECIPE, Recipe, with_flags
from entropy_polarity.statistics.agreement import agreement_of
from entropy_polarity.trainers.trl.auditing import UpdateForecaster
from entropy_polarity.trainers.trl.sequences import concatenate_sequences

FORMULAS = {"shared": "-<g, G>", "forecast": "<ḡ, δ>"}


def parts_of(model: nn.Module) -> dict[str, Callable[[str], bool]]:
    """The parts that are tried, and which parameters belong to each."""
    layers = sorted({int(name.split(".")[2]) for name in trainable_parameters(model) if ".layers." in name})
    return {
        "all parameters": lambda name: True,
        "embeddings and head": lambda name: "embed_tokens" in name or "lm_head" in name,
        "norms": lambda name: "norm" in name,
        **{f"layer {i}": lambda name, i=i: f".layers.{i}." in name for i in layers},
        "attention": lambda name: "self_attn" in name,
        "MLPs": lambda name: ".mlp." in name,
    }


class Parts(UpdateForecaster):
    """Notes what each part of the model foretells of every update, and what came. The run stays as it is."""

    def __init__(self) -> None:
        super().__init__(share=1.0)  # all sequences: for what came
        self.cheap = Forecaster()
        self.updates: list[dict[str, Any]] = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self._seen:
            return
        self.sequences, self._seen = concatenate_sequences(self._seen), []
        model, t = self.trainer.accelerator.unwrap_model(self.trainer.model), self.trainer.temperature
        self.cheap.observe(model, self.sequences, temperature=t)
        self.before, g = entropy_gradient(model, self.sequences, temperature=t)
        self.shared = {n: 0.0 if p.grad is None else -dot(g[n], p.grad) for n, p in trainable_parameters(model).items()}
        self.step = self._open.enter_context(parameter_change(model))

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._open.close()
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        after, _ = entropy_gradient(model, self.sequences, temperature=self.trainer.temperature)
        forecast = {name: dot(part, self.step[name]) for name, part in self.cheap.average_gradient.items()}
        told = {"shared": self.shared, "forecast": forecast}
        sums = {
            formula: {part: sum(v for n, v in values.items() if has(n)) for part, has in parts_of(model).items()}
            for formula, values in told.items()
        }
        self.updates.append({"realised": after - self.before, **sums})


def measured(recipe: Recipe, folder: Path) -> list[dict[str, Any]]:
    trainer = TrainingRun.from_recipe(recipe, folder).trainer
    parts = Parts()
    parts.attach(trainer)
    trainer.train()
    return parts.updates


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each formula and part: the agreement with what came."""

    def of(formula: str, part: str) -> dict[str, Any]:
        pairs = [
            (np.array([u[formula][part] for u in run["updates"]]), np.array([u["realised"] for u in run["updates"]]))
            for run in runs
        ]
        return asdict(agreement_of(pairs))

    return {formula: {part: of(formula, part) for part in runs[0]["updates"][0][formula]} for formula in FORMULAS}


def table(document: dict[str, Any]) -> str:
    found = document["summary"]
    head = ["parameters", *(f"{formula}: {what}" for formula in FORMULAS.values() for what in ("Spearman", "signs"))]
    rows = [
        [part] + [_shown(found[formula][part][what]) for formula in FORMULAS for what in ("spearman", "sign_agreement")]
        for part in found["shared"]
    ]
    return markdown(head, rows)


def _shown(e: dict[str, float]) -> str:
    return f"{e['value']:.2f} [{e['low']:.2f}, {e['high']:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--from", dest="finished", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.finished:
        document = json.loads(arguments.finished.read_text(encoding="utf-8"))
        write_document(arguments.output, document | {"summary": summary(document["runs"])})
        return
    quiet()
    recipe = audit_recipe(DEFAULT_RECIPE, None, None, "grpo", arguments.steps)
    runs = []
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            runs.append({"seed": seed, "updates": measured(with_flags(recipe, seed=seed), Path(folder))})
    document = {"parts": 1, "environment": provenance(), "summary": summary(runs), "runs": runs}
    write_document(arguments.output, document)
    print(table(document))


if __name__ == "__main__":
    main()
