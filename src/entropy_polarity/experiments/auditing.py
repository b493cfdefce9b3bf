"""`papo audit`: train a few updates, audit each of them, and say how far each prediction can be trusted."""

import json
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from entropy_polarity.diagnostics.audit import Audit, TokenAccount
from entropy_polarity.diagnostics.entropy import Sequences, in_eval_mode
from entropy_polarity.experiments.audit_summary import MAPPED, asymmetry, by_token, summarise
from entropy_polarity.experiments.results import provenance, read_document, write_document
from entropy_polarity.experiments.setup import TrainingRun, check_recipe, quiet
from entropy_polarity.generation import Sampling
from entropy_polarity.generation.sampling import sample_tokens
from entropy_polarity.report.audit import render_audit
from entropy_polarity.runs.recipe import Recipe
from entropy_polarity.support.files import DRAFT, LOCK, locked, refuse_links, replacing, write_text
from entropy_polarity.support.json_files import parsed
from entropy_polarity.tasks import distinct_problems
from entropy_polarity.tasks.prompts import encoded, for_tokenizer
from entropy_polarity.tasks.protocol import VerifiedTask, expect_one_turn
from entropy_polarity.trainers.trl.auditing import UpdateAuditor

AUDIT, PAGE = "audit.json", "audit.html"
RUN, TOKENS = "seed-{}.json", "tokens-{}.npz"  # what a finished seed leaves
Watch = Callable[[int, int, float, float], None]
_OURS = re.compile(rf"(part-)?(audit\.(json|html)|seed-\d+\.json|tokens-\d+\.npz)(\.part)?|trainer|{LOCK}")
LEAST = 4  # updates: three after the first, on which a forecast by the updates before is judged


def audit(
    recipe: Recipe, seeds: Sequence[int], output: Path, watch: Watch = lambda seed, step, exact, realised: None
) -> dict[str, Any]:
    """Train `recipe` with every seed and audit every update; what is finished in `output` is kept.

    `watch` is called after each. Returns the document that is written to audit.json.
    Raises ValueError or OSError for what a user can get wrong, before anything is written.
    """
    quiet()
    task, config = check_recipe(recipe, output)
    task = expect_one_turn(task, "papo audit looks at answers of one turn")
    if config.max_steps < LEAST or not seeds or len({*seeds}) < len(seeds):
        raise ValueError(
            f"{config.max_steps} updates, seeds {list(seeds)}: an audit needs {LEAST} updates or more, and different "
            "seeds, at least one"
        )
    _refuse_foreign(output)
    with locked(output, "audit"):
        kept = {seed: _finished(recipe, seed, output) for seed in seeds}
        runs = [found or _run(recipe, seed, task, output, watch) for seed, found in kept.items()]
    tokens = [_read_tokens(output / TOKENS.format(seed)) for seed in seeds]
    document = {
        "audit": 2,  # version of this layout
        "recipe": _portable(recipe),
        "environment": provenance(),
        "vocabulary": runs[0].get("vocabulary"),
        **summarise([run["updates"] for run in runs]),
        "asymmetry": asymmetry({name: np.concatenate([run[name] for run in tokens]) for name in MAPPED}),
        "runs": [{"seed": run["seed"], "updates": run["updates"]} for run in runs],
    }
    return _written(document, output)


def audited_before(file: Path, output: Path | None = None) -> dict[str, Any]:
    """The document of a former audit with its updates summarised again; `output` gets it and its page.

    The results over all tokens (the map, the deciles) stay as they were: the file does not hold the tokens.
    """
    document = read_document(file, "audit", versions=(1, 2))
    top = {name: document[name] for name in ("recipe", "environment")} | {"vocabulary": document.get("vocabulary")}
    summary = summarise([run["updates"] for run in document["runs"]])
    again = {"audit": 2, **top, **summary, "asymmetry": document["asymmetry"], "runs": document["runs"]}
    return again if output is None else _written(again, output)


def _written(document: dict[str, Any], output: Path) -> dict[str, Any]:
    output.mkdir(parents=True, exist_ok=True)
    write_document(output / AUDIT, document)
    write_text(output / PAGE, render_audit(document))
    return document


def _refuse_foreign(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file: give a folder as --output")
    drafted = ((DRAFT.fullmatch(p.name), p.name) for p in output.glob("*"))
    names = (draft["name"] if draft else name for draft, name in drafted)
    if strange := sorted(name for name in names if not _OURS.fullmatch(name)):
        raise FileExistsError(f"{output} is no folder of an audit (it holds {strange[0]}): give another --output")
    refuse_links(output)


def _finished(recipe: Recipe, seed: int, output: Path) -> dict[str, Any] | None:
    """The run of that seed if a former call finished it: both of its files are there. Raises ValueError where the file
    is of another recipe, or one of the two cannot be read."""
    file = output / RUN.format(seed)
    if not file.is_file():
        return None
    try:
        run = parsed(file.read_bytes())
        same = run["recipe"] == parsed(json.dumps(_portable(recipe)))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}): remove it, and the seed is trained again") from None
    if not same:
        raise ValueError(f"{output} holds an audit of another recipe: give another --output")
    tokens = output / TOKENS.format(seed)
    if not tokens.is_file():
        return None
    _read_tokens(tokens)
    return run


def _run(recipe: Recipe, seed: int, task: VerifiedTask, output: Path, watch: Watch) -> dict[str, Any]:
    run = TrainingRun.from_recipe(replace(recipe, seed=seed), output / "trainer", task=task)
    prompts = [
        encoded(for_tokenizer(problem, run.tokenizer), run.tokenizer)
        for problem in distinct_problems(task, seed, "test", recipe.evaluation.problems)
    ]
    updates: list[dict[str, Any]] = []
    tokens: list[TokenAccount] = []

    def note(step: int, found: Audit) -> None:
        accounts = {name: asdict(account) for name, account in found.accounts.items()}
        updates.append({"step": step, "momentum": found.momentum, **accounts})
        if found.tokens is not None:
            tokens.append(found.tokens)
            updates[-1]["tokens"] = by_token(found.tokens)
        watch(seed, step, found.accounts["batch"].exact, found.accounts["batch"].realised)

    def held_out(step: int) -> Sequences:
        length, temperature = task.max_completion_tokens, run.config.temperature
        return held_out_states(run.model, run.tokenizer, prompts, length, temperature, step)

    UpdateAuditor(note, held_out).attach(run.trainer)
    run.trainer.train()
    pressed = sum(bool((found.pressure != 0).any()) for found in tokens)
    if len(updates) < LEAST or not pressed:
        raise ValueError(
            f"seed {seed}: {len(updates)} updates had a token to look at, {pressed} one with an advantage; an audit "
            f"needs {LEAST} and 1: take more steps, a larger batch, or a task whose groups differ in reward"
        )
    _write_tokens(output / TOKENS.format(seed), tokens)
    vocabulary = run.model.config.get_text_config().vocab_size
    found = {"seed": seed, "recipe": _portable(recipe), "vocabulary": vocabulary, "updates": updates}
    write_document(output / RUN.format(seed), found)
    return found


def held_out_states(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int, temperature: float, seed: int
) -> Sequences:
    """New completions of `prompts` by the policy as it is; its modes, and the random state of the run, stay."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), in_eval_mode(model):
        torch.manual_seed(seed)
        sampled = sample_tokens(model, tokenizer, prompts, max_new_tokens, Sampling(temperature))
    ended = (sampled.completion_ids == tokenizer.eos_token_id).int()
    written = ended.cumsum(1) - ended == 0  # up to the end token
    attention = torch.cat([sampled.prompt_mask, written.to(sampled.prompt_mask.dtype)], dim=1)
    mask = torch.nn.functional.pad(written, (sampled.prompt_ids.size(1), 0))
    return Sequences(torch.cat([sampled.prompt_ids, sampled.completion_ids], dim=1), mask, attention)


def _write_tokens(file: Path, updates: Sequence[TokenAccount]) -> None:
    """Write the statistics of all tokens of a run, one array each, as numpy reads them without pickle."""
    columns = zip(TokenAccount._fields, zip(*updates, strict=True), strict=True)
    arrays = {name: torch.cat(column).numpy() for name, column in columns}
    with replacing(file) as written:
        np.savez_compressed(written, allow_pickle=False, **arrays)


def _read_tokens(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as columns:
            return {name: columns[name].astype(float) for name in MAPPED}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is damaged ({error}): remove it, and the seed is trained again") from None


def _portable(recipe: Recipe) -> dict[str, Any]:
    return {key: value for key, value in recipe.to_dict().items() if key not in ("title", "cost", "expected", "seed")}
