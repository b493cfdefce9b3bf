"""What `papo audit` does: train a few updates, audit each of them, and say how far each prediction can be trusted."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from entropy_polarity.agreement import agreement, average, one_ahead, sign_agreement, spearman
from entropy_polarity.asymmetry import by_probability, threshold
from entropy_polarity.audit import LEVELS, Audit, TokenAccount
from entropy_polarity.evaluate import Sampled, sample_tokens
from entropy_polarity.exact import Sequences
from entropy_polarity.experiments.evaluate import weights_of
from entropy_polarity.experiments.results import provenance, write_document
from entropy_polarity.experiments.train import (
    checked,
    load_policy,
    prompts_of,
    quiet,
    quiet_trainer,
    trainer_config,
)
from entropy_polarity.recipe import DEFAULT_RECIPE, Recipe, load_recipe, with_flags
from entropy_polarity.record import CONFIG
from entropy_polarity.report.audit import render_audit
from entropy_polarity.tasks import Task, distinct_problems
from entropy_polarity.tasks.games import Game
from entropy_polarity.tasks.prompts import for_tokenizer
from entropy_polarity.trainers.auditing import UpdateAuditor

AUDIT, PAGE = "audit.json", "audit.html"
RUN, TOKENS = "seed-{}.json", "tokens-{}.npz"  # what a finished seed leaves
Watch = Callable[[int, int, float, float], None]
MAP = 24  # cells a side of the map over p_a and H
FIRST = 5  # updates that a fitted forecast is given before it is judged
VISITS = 8  # of a state, before its tokens are added up
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# One update a rollout, made by the policy that sampled it.
ON_POLICY = (
    "trainer.num_iterations=1",
    "trainer.gradient_accumulation_steps=1",
    "trainer.steps_per_generation=1",
    "trainer.save_strategy=no",
)
OPTIMIZERS = {
    "adamw": (),
    "sgd": ("trainer.optim=sgd", "trainer.learning_rate=0.1"),
}


def audit_recipe(
    recipe: str,
    model: str | None,
    task: str | None,
    method: str,
    steps: int,
    optimizer: str,
    overrides: Sequence[str] = (),
) -> Recipe:
    """The recipe of an audit: that of the run where `model` is one, with one update a rollout. Overrides have the last
    word. Raises as `load_recipe`."""
    weights, trained = (None, None) if model is None else weights_of(model)
    if trained is not None:
        if recipe != DEFAULT_RECIPE:
            raise ValueError(f"recipe {recipe} cannot be given with the run {model}, which has its own: leave it out")
        recipe = str(Path(str(model)) / CONFIG)
    chosen = [*ON_POLICY, *OPTIMIZERS[optimizer], f"trainer.max_steps={steps}"]
    if task is not None and (trained is None or task != trained["task"]["name"]):
        chosen.append(f"task={{name={task!r}}}")
    return with_flags(load_recipe(recipe, [*chosen, *overrides], method), model=weights)


def audit(
    recipe: Recipe,
    seeds: Sequence[int],
    output: Path,
    watch: Watch = lambda seed, step, exact, realised: None,
) -> dict[str, Any]:
    """Train `recipe` with every seed and audit every update; what is finished in `output` is kept.

    `watch(seed, step, exact, realised)` is called after each. Returns the document that is written to audit.json.
    Raises ValueError or OSError for what a user can get wrong, before anything is written.
    """
    quiet()
    task, config = checked(recipe, output)
    if isinstance(task, Game):
        raise ValueError(f"papo audit looks at answers of one turn; {task.name} is a game: give another --task")
    if config.max_steps < 3 or not seeds:
        raise ValueError(
            f"{config.max_steps} updates, seeds {list(seeds)}: an audit needs 3 updates and a seed, or more"
        )
    runs = [_finished(recipe, seed, output) or _run(recipe, seed, task, output, watch) for seed in seeds]
    document = {
        "audit": 1,  # version of this layout
        "recipe": _portable(recipe),
        "environment": provenance(),
        **summarise([run["updates"] for run in runs]),
        "asymmetry": asymmetry(_read_tokens([output / TOKENS.format(seed) for seed in seeds])),
        "runs": [{"seed": run["seed"], "updates": run["updates"]} for run in runs],
    }
    write_document(output / AUDIT, document)
    (output / PAGE).write_text(render_audit(document))
    return document


def _finished(recipe: Recipe, seed: int, output: Path) -> dict[str, Any] | None:
    """The run of that seed, if a former call came to its end. Raises ValueError where the file is of another recipe."""
    file = output / RUN.format(seed)
    if not file.is_file():
        return None
    run = json.loads(file.read_text())
    if run["recipe"] != json.loads(json.dumps(_portable(recipe))):
        raise ValueError(f"{output} holds an audit of another recipe: give another --output")
    return run


def _run(recipe: Recipe, seed: int, task: Task, output: Path, watch: Watch) -> dict[str, Any]:
    config = trainer_config(replace(recipe, seed=seed), output / "trainer", task)
    model, tokenizer = load_policy(recipe.policy.model)
    output.mkdir(parents=True, exist_ok=True)
    trainer = quiet_trainer(model, tokenizer, config, *prompts_of(task, tokenizer, config, seed))
    prompts = [
        for_tokenizer(problem, tokenizer)
        for problem in distinct_problems(task, seed, "test", recipe.evaluation.problems)
    ]
    updates: list[dict[str, Any]] = []
    tokens: list[TokenAccount] = []

    def note(step: int, found: Audit) -> None:
        accounts = {name: asdict(account) for name, account in found.accounts.items()}
        updates.append({"step": step, "momentum": found.momentum, **accounts})
        if found.tokens is not None:
            tokens.append(found.tokens)
            updates[-1]["tokens"] = _by_token(found.tokens)
        watch(seed, step, found.accounts["batch"].exact, found.accounts["batch"].realised)

    def held_out(step: int) -> Sequences:
        """New completions of held-out problems by the policy as it is; the random state of the run stays."""
        devices = [trainer.accelerator.device] if trainer.accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(step)
            model.eval()
            sampled = sample_tokens(model, tokenizer, prompts, task.max_completion_tokens, config.temperature)
            model.train()
        return _sequences(sampled, tokenizer.eos_token_id)

    UpdateAuditor(note, held_out).attach(trainer)
    trainer.train()
    if len(updates) < 3:
        raise ValueError(
            f"seed {seed}: only {len(updates)} updates had a token to look at; take more steps, a larger batch, or a "
            "task whose groups differ in reward"
        )
    _write_tokens(output / TOKENS.format(seed), tokens)
    run = {"seed": seed, "recipe": _portable(recipe), "updates": updates}
    write_document(output / RUN.format(seed), run)
    return run


def _write_tokens(file: Path, updates: Sequence[TokenAccount]) -> None:
    """All tokens of a run, a column each, as numpy reads them without pickle."""
    columns = {
        name: torch.cat(column).numpy()
        for name, column in zip(TokenAccount._fields, zip(*updates, strict=True), strict=True)
    }
    draft = file.with_name(f"part-{file.name}")
    np.savez_compressed(draft, allow_pickle=False, **columns)
    draft.replace(file)


def _read_tokens(files: Sequence[Path]) -> dict[str, np.ndarray]:
    loaded = [np.load(file, allow_pickle=False) for file in files]
    return {name: np.concatenate([run[name] for run in loaded]).astype(float) for name in TokenAccount._fields}


def _portable(recipe: Recipe) -> dict[str, Any]:
    return {key: value for key, value in recipe.to_dict().items() if key not in ("title", "cost", "expected", "seed")}


def _sequences(sampled: Sampled, end: int) -> Sequences:
    """Prompts and completions, each completion up to its end token."""
    ended = (sampled.completion_ids == end).int()
    written = ended.cumsum(1) - ended == 0
    attention = torch.cat([sampled.prompt_mask, written.to(sampled.prompt_mask.dtype)], dim=1)
    mask = torch.nn.functional.pad(written, (sampled.prompt_ids.size(1), 0))
    return Sequences(torch.cat([sampled.prompt_ids, sampled.completion_ids], dim=1), mask, attention)


# ---- what the numbers say ------------------------------------------------------------------------------


def summarise(updates: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    """Over the updates of all runs: each level against what came, on the batch's own states and on held-out ones."""
    levels = {states: {name: _level(updates, states, name) for name in LEVELS} for states in ("batch", "held_out")}
    batch, held_out = (
        found | {"gap": _gap(found), "cheap": _cheap(updates, states)} for states, found in levels.items()
    )
    tokens = {}
    for name in updates[0][0]["tokens"]:
        known = [row["tokens"][name] for rows in updates for row in rows if row["tokens"][name] is not None]
        tokens[name] = float(np.mean(known)) if known else None
    return {**batch, "held_out": held_out, "tokens": tokens}


def _level(updates: Sequence[list[dict[str, Any]]], states: str, name: str) -> dict[str, Any] | None:
    accounts = [[row[states] for row in rows] for rows in updates]
    if any(account[name] is None for rows in accounts for account in rows):
        return None
    return asdict(agreement([(_column(rows, name), _column(rows, "realised")) for rows in accounts]))


def _cheap(updates: Sequence[list[dict[str, Any]]], states: str) -> dict[str, Any]:
    """Forecasts that a training can afford, and two that know nothing of polarity; each as it is, and in nats by a line
    that is fitted to the updates so far."""
    runs = [[row[states] for row in rows] for rows in updates]
    realised = [_column(rows, "realised") for rows in runs]
    forecasts = {
        "local": [_column(rows, "local") for rows in runs],
        "forecast": [_column(rows, "forecast") for rows in runs],
        "the last change": [np.concatenate([[0.0], values[:-1]]) for values in realised],
    }
    if all(row["momentum"] is not None for rows in updates for row in rows):
        momentum = updates[0][0]["momentum"]
        forecasts["momentum"] = [average(values, momentum) for values in forecasts["local"]]
    size = float(np.mean(np.abs(np.concatenate(realised)))) or 1.0

    def judged(forecast: list[np.ndarray]) -> dict[str, Any]:
        pairs = list(zip(forecast, realised, strict=True))
        said = [(one_ahead(x, y)[FIRST:], y[FIRST:]) for x, y in pairs]
        fitted = None
        if all(len(y) >= 3 for _, y in said):
            error = np.mean(np.abs(np.concatenate([x - y for x, y in said])))
            fitted = {"error": float(error) / size, "sign_agreement": asdict(agreement(said))["sign_agreement"]}
        return asdict(agreement(pairs)) | {"fitted": fitted}

    falls = float(np.mean(np.concatenate(realised) < 0))
    return {name: judged(forecast) for name, forecast in forecasts.items()} | {"falls": falls}


def _column(accounts: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([account[name] for account in accounts])


def _gap(levels: dict[str, Any]) -> dict[str, float | None]:
    """What of the variance of the realised change the local formula leaves, and what closes it: differences of r²."""
    known = {name: None if level is None else level["pearson"]["value"] ** 2 for name, level in levels.items()}
    known |= {"preconditioned": known["shared"]} if known["preconditioned"] is None else {}
    steps = [known["local"], known["shared"], known["preconditioned"], known["exact"], 1.0]
    names = ("shared parameters", "learning rate and metric", "momentum and decay", "second order")
    return {"local leaves": 1 - steps[0]} | {
        name: after - before for name, before, after in zip(names, steps[:-1], steps[1:], strict=True)
    }


def _by_token(tokens: TokenAccount) -> dict[str, float | None]:
    """One update, token by token: the local formula against its own state's change, and against exact polarity."""
    moved = tokens.pressure != 0
    local, change = ((tokens.pressure * tokens.sensitivity)[moved].numpy(), tokens.change[moved].numpy())
    sensitivity, exact = tokens.sensitivity.numpy(), tokens.exact_sensitivity.numpy()
    together, of_state = _by_state(tokens)
    enough = len(together) >= 3
    return {
        "local_spearman": spearman(local, change),
        "local_sign_agreement": sign_agreement(local, change),
        "states": len(together),
        "state_spearman": spearman(together, of_state) if enough else None,
        "state_sign_agreement": sign_agreement(together, of_state) if enough else None,
        "sensitivity_spearman": spearman(sensitivity, exact),
        "sensitivity_sign_agreement": sign_agreement(sensitivity, exact),
    }


def _by_state(tokens: TokenAccount) -> tuple[np.ndarray, np.ndarray]:
    """Σ c T over all tokens of a state, and its change, for the states that were visited `VISITS` times or more."""
    _, place, visits = tokens.state.unique(return_inverse=True, return_counts=True)
    together, change = (
        torch.zeros(len(visits), dtype=column.dtype).index_add(0, place, column)
        for column in (tokens.pressure * tokens.sensitivity, tokens.change)
    )
    often = visits >= VISITS
    return together[often].numpy(), (change / visits)[often].numpy()


def asymmetry(tokens: dict[str, np.ndarray]) -> dict[str, Any]:
    """The asymmetry map of all tokens that were trained on, and how far C moves the threshold from e^-H."""
    p, entropy = tokens["p"], tokens["entropy"]
    border, plain = threshold(entropy, tokens["correction"].clip(min=0)), np.exp(-entropy)
    quantiles = zip(map(str, QUANTILES), np.quantile(border / plain, QUANTILES).tolist(), strict=True)
    area = ((0.0, 1.0), (0.0, float(entropy.max()) or 1.0))
    cells, p_edges, entropy_edges = np.histogram2d(p, entropy, bins=MAP, range=area)
    return {
        "tokens": len(p),
        "by_probability": by_probability(p, tokens["pressure"], tokens["sensitivity"], tokens["change"]),
        "threshold_over_exp_minus_entropy": dict(quantiles),
        "between": float(np.mean((p > plain) & (p < border))),
        "map": {"p": p_edges.tolist(), "entropy": entropy_edges.tolist(), "tokens": cells.astype(int).tolist()},
    }
