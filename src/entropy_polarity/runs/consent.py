"""What a run folder names is not used until this command line says it again.

A run folder may come from anybody, and its recipe can name a class to import, a data set or a model of the hub, a tool
that runs what the policy writes, a service to report to. To resume, evaluate or audit the run would import, fetch and
run all that. So a setting that reaches beyond the folder counts only where the command line repeats it, as
`--set KEY=VALUE`; until then nothing is imported or fetched, not even to look at it. A recipe file that is given by
name is the user's own word.
"""

import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from entropy_polarity.runs.recipe import apply_override, flattened
from entropy_polarity.support.hub import is_path
from entropy_polarity.support.text import one_line

# Settings of TRL's that are text, lists, tables or switches, and yet only say how to compute. Numbers always do. What
# is not here may name a server, a repository, a file or code: report_to, push_to_hub, deepspeed, model_init_kwargs, ...
_ONLY_COMPUTE = """
activation_checkpointing activation_checkpointing_kwargs average_tokens_across_devices bf16 bf16_full_eval
cast_lm_head_to_fp32 chat_template_kwargs dataloader_drop_last dataloader_pin_memory disable_dropout eval_strategy
fp16 fp16_full_eval full_determinism gradient_checkpointing gradient_checkpointing_kwargs
importance_sampling_level logging_strategy loss_type lr_scheduler_kwargs lr_scheduler_type
mask_truncated_completions multi_objective_aggregation optim remove_unused_columns reward_weights save_only_model
save_strategy scale_rewards shuffle_dataset statistics_head sync_ref_model tf32 use_adaptive_entropy
use_bias_correction_kl use_cache use_cpu use_vllm vllm_enable_sleep_mode vllm_importance_sampling_correction
vllm_importance_sampling_mode
"""
_NAMES = frozenset(_ONLY_COMPUTE.split())
_HARMLESS = {"report_to": "none", "vllm_mode": "colocate"}
_RUNS_CODE = "python"  # of the tools


def check_said_again(folder: str, recipe: Mapping[str, Any], said: Sequence[str]) -> None:
    """Raise ValueError, with what to add to the command line, for settings of `recipe` that reach beyond the folder
    it came from and are not among the overrides `said`. A model is not looked at here: see `stay_offline`."""
    missing = {key: value for key, value in _unsaid(recipe, said).items() if key != "policy.model"}
    if missing:
        settings = flattened(recipe.get("task", {}).get("settings", {})) if "task.factory" in missing else {}
        given = f" (made with {', '.join(f'{key}={value!r}' for key, value in settings.items())})" if settings else ""
        raise ValueError(
            one_line(
                f"{folder} names what is not its own{given}; nothing of it was imported or fetched. "
                f"If you trust it, say it again: {' '.join(map(shlex.quote, _flags(missing)))}",
                limit=2000,  # the end is what is to be copied
            )
        )


def stay_offline(folder: str, recipe: Mapping[str, Any], said: Sequence[str]) -> None:
    """Keep this process off the hub where `recipe` names a model of it that `said` does not: one that is on this
    machine already is taken, another is a ValueError. Has to be called before anything imports huggingface_hub."""
    model = _unsaid(recipe, said).get("policy.model")
    if model is None:
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        there = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        raise ValueError(one_line(f"{folder} was trained from {model!r}, which is neither here nor a name")) from None
    if not isinstance(there, str):
        again = shlex.quote(f"--set=policy.model={model}")
        raise ValueError(
            one_line(f"{folder} was trained from {model}, which is not on this machine: to ask the hub, add {again}")
        )


def said_again(recipe: Mapping[str, Any]) -> list[str]:
    """The flags that say again all that `recipe` names, for the process that wrote it and starts another one on it."""
    return _flags(dict(_reaching(recipe)))


def _flags(settings: Mapping[str, Any]) -> list[str]:
    """As one word each; a text is written as TOML would where it could be taken for something else."""
    return [f"--set={key}={value if _is_a_word(value) else json.dumps(value)}" for key, value in settings.items()]


def _is_a_word(value: Any) -> bool:
    """Whether an override that ends in it, bare, sets exactly this text."""
    if not isinstance(value, str) or not value.isprintable():
        return False
    read: dict[str, Any] = {}
    apply_override(read, f"value={value}")
    return read["value"] == value


def _unsaid(recipe: Mapping[str, Any], said: Sequence[str]) -> dict[str, Any]:
    own: dict[str, Any] = {}
    for override in said:
        apply_override(own, override)
    repeated = flattened(own)
    return {key: value for key, value in _reaching(recipe) if key not in repeated or repeated[key] != value}


def _reaching(recipe: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The settings, by dotted key, that name code, something of the hub, or a service."""
    task, trainer = recipe.get("task", {}), recipe.get("trainer", {})
    if "factory" in task:
        yield "task.factory", task["factory"]
    if isinstance(tools := task.get("tools"), list | tuple) and _RUNS_CODE in tools:
        yield "task.tools", list(tools)
    if "data" in task and not _is_here(task["data"]):
        yield "task.data", task["data"]
    model = recipe.get("policy", {}).get("model", "embedded")
    if not (str(model).partition(":")[0] == "embedded" or _is_here(model) or is_path(model)):
        yield "policy.model", model
    for key, value in trainer.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        nothing = value is False or value in (None, [], "", _HARMLESS.get(key))
        if not (number or nothing or key in _NAMES):
            yield from flattened(value, f"trainer.{key}.").items()


def _is_here(name: Any) -> bool:
    return isinstance(name, str) and "\0" not in name and Path(os.path.expanduser(name)).exists()
