"""Any method of the table in verl 0.9, on its cluster, without a fork: importing this module is all there is to do.

verl imports it by itself in the driver and in every worker (entry point `verl.plugins`), or is told to, by
VERL_USE_EXTERNAL_MODULES=entropy_polarity.trainers.verl. Nothing changes until a run has settings of its own:

    python -m verl.trainer.main_ppo ... +papo.method=papo +papo.controller=thermostat +papo.level=0.3

`papo.method` is a name of `papo methods`, all other keys are the method's settings. What is hooked, and what each hook
does, is the table HOOKS; each is put in place right after verl imports the module it is in, and only if that looks as
it did when it was tested. A run that asks for a method where something does not is refused; `papo doctor` says what.

verl_config.py   the settings of a run                       verl_driver.py   advantages, on the driver
verl_engine.py   statistics and loss terms, in the workers   verl_tokens.py   verl's batch as Tokens, and back
"""

import inspect
import logging
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any, NamedTuple

from packaging.version import Version

from entropy_polarity.trainers.verl import driver, workers

logger = logging.getLogger("entropy_polarity")

TESTED_VERL = (0, 9)


class Hook(NamedTuple):
    """`wrap(original)` takes the place of `target`, "function" or "Class.method" of `module`, if that has `parameters`.
    An optional one is for a part of verl that may not be installed."""

    module: str
    target: str
    parameters: tuple[str, ...]
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
    optional: bool = False

    @property
    def name(self) -> str:
        return f"{self.module}.{self.target}"


_TRAINER = "verl.trainer.ppo.v1.trainer_base"
_FSDP = "verl.workers.engine.fsdp.transformer_impl"
_MEGATRON = "verl.workers.engine.megatron.transformer_impl"
_OLD = Hook("verl.trainer.ppo.ray_trainer", "RayPPOTrainer.__init__", ("self", "config"), driver.refused)
_SEPARATE = Hook(
    "verl.experimental.separation.ray_trainer",
    "SeparateRayPPOTrainer._init_resource_pools",
    ("self",),
    driver.refused,
    optional=True,
)
HOOKS = (
    Hook(_TRAINER, "PPOTrainer.__init__", ("self", "config"), driver.trainer_init),
    Hook(_TRAINER, "PPOTrainer._compute_old_log_prob", ("self", "batch", "metrics"), driver.old_log_prob),
    Hook(_TRAINER, "PPOTrainer._compute_advantage", ("self", "batch", "metrics"), driver.advantage),
    Hook(_TRAINER, "compute_advantage_for_multi_trajectories", ("data", "batch_keys"), driver.advantages_made),
    Hook(_TRAINER, "PPOTrainer._update_actor", ("self", "batch", "metrics"), driver.update_actor),
    Hook(_TRAINER, "PPOTrainer._save_checkpoint", ("self",), driver.save_checkpoint),
    Hook(_TRAINER, "PPOTrainer._load_checkpoint", ("self",), driver.load_checkpoint),
    _OLD,
    _SEPARATE,
    Hook("verl.workers.engine_workers", "ppo_loss", ("config", "model_output", "data"), workers.policy_loss),
    Hook(
        _FSDP,
        "FSDPEngineWithLMHead.prepare_model_outputs",
        ("self", "output", "output_args", "micro_batch", "logits_processor_func"),
        workers.fsdp_outputs,
    ),
    Hook(
        _MEGATRON,
        "MegatronEngineWithLMHead._lm_head_logits_processor",
        ("self", "logits", "label", "temperature", "batch"),
        workers.megatron_outputs,
        optional=True,
    ),
)
# All that is hooked of a verl that was not tested: what says no to a run that asks for a method.
REFUSALS = (
    Hook(_TRAINER, "PPOTrainer.__init__", ("self", "config"), driver.refused),
    _OLD,
    _SEPARATE,
)


def installed_version() -> str:
    """That of the package, or of a checkout of verl that is being imported."""
    try:
        return version("verl")
    except PackageNotFoundError:
        return getattr(sys.modules.get("verl"), "__version__", "0")


def untested_version() -> str | None:
    """Why nothing works in the verl that is installed, or None."""
    found = installed_version()
    if Version(found).release[:2] == TESTED_VERL:
        return None
    tested, following = (f"{TESTED_VERL[0]}.{TESTED_VERL[1] + more}" for more in (0, 1))
    return (
        f"entropy-polarity hooks private methods of verl {tested}, but verl {found} is installed: use "
        f"'verl>={tested},<{following}'"
    )


def problem_of(hook: Hook, module: ModuleType) -> str | None:
    """Why a hook cannot be put into `module`, or None."""
    place, name = _place(hook, module)
    found = getattr(place, name, None)
    if found is None:
        return f"verl has no {hook.name}"
    missing = set(hook.parameters) - inspect.signature(found).parameters.keys()
    return f"{hook.name} has no parameter {', '.join(sorted(missing))}" if missing else None


def missing_hook(strategy: str) -> str | None:
    """Why a run with this engine would not be trained as it asks, as far as this process can tell; or None."""
    reason = untested_version()
    if reason is not None:
        return reason
    for hook in HOOKS:
        if hook.optional and strategy not in hook.module:
            continue
        try:
            module = import_module(hook.module)
        except Exception:  # an engine need not be installed where the driver runs
            continue
        fault = fault_of(hook, module)
        if fault is not None:
            return fault
    return None


def fault_of(hook: Hook, module: ModuleType) -> str | None:
    """Why a hook does not work in `module`, or None."""
    return problem_of(hook, module) or (None if _is_in_place(hook, module) else f"{hook.name} is not hooked")


def _is_in_place(hook: Hook, module: ModuleType) -> bool:
    place, name = _place(hook, module)
    return getattr(getattr(place, name, None), "of_entropy_polarity", False)


def _place(hook: Hook, module: ModuleType) -> tuple[Any, str]:
    """(the module or class, None where there is none; the name in it)"""
    owner, _, name = hook.target.rpartition(".")
    return (getattr(module, owner, None) if owner else module), name


def put(hook: Hook, module: ModuleType) -> None:
    """Put a hook in place; a second time nothing happens. What does not fit is logged, and left as it is."""
    problem = problem_of(hook, module)
    if problem is not None:
        logger.error("entropy-polarity cannot be used with this verl: %s", problem)
        return
    place, name = _place(hook, module)
    if not _is_in_place(hook, module):
        wrapped = hook.wrap(getattr(place, name))
        wrapped.of_entropy_polarity = True  # type: ignore[attr-defined]
        setattr(place, name, wrapped)


class _AfterImport(MetaPathFinder):
    """Calls `put` for those of `hooks` that are of a module, right after the module was imported."""

    def __init__(self, hooks: tuple[Hook, ...]) -> None:
        self.hooks = hooks

    def find_spec(self, name, path, target=None):
        hooks = [hook for hook in self.hooks if hook.module == name]
        if not hooks:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((s for f in others if (s := f.find_spec(name, path, target)) is not None), None)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_hook(module: ModuleType) -> None:
            run(module)
            for hook in hooks:
                put(hook, module)

        spec.loader.exec_module = run_and_hook  # type: ignore[method-assign]
        return spec


def activate() -> None:
    """Put every hook in place, now or when its module is imported. Idempotent; a verl that was not tested is left
    alone, but refuses a run that asks for a method."""
    reason = untested_version()
    if reason is not None:
        logger.error("%s; nothing of it is changed", reason)
    hooks = HOOKS if reason is None else REFUSALS
    if not any(type(finder).__name__ == _AfterImport.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(hooks))
    for hook in hooks:
        if hook.module in sys.modules:
            put(hook, sys.modules[hook.module])
