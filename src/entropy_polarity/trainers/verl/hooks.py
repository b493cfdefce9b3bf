"""What is hooked of verl, and how: the table HOOKS, and the two hooks that read it when a run starts.

A hook is a function `hook(original, ...)` that is called in place of one of verl's, with its arguments. Each is put in
place right after verl imports the module it is in, and only if that looks as it did when it was tested.
"""

import functools
import inspect
import logging
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any, NamedTuple

from packaging.version import Version

from entropy_polarity.trainers.verl import driver, workers
from entropy_polarity.trainers.verl.config import KEY, method_of, prepare

logger = logging.getLogger("entropy_polarity")

TESTED_VERL = (0, 9)


class Hook(NamedTuple):
    """`replacement(original, ...)` is called in place of `target`, a "function" or "Class.method" of `module`, if that
    takes `parameters`. An optional hook is for a part of verl that need not be installed."""

    module: str
    target: str
    parameters: tuple[str, ...]
    replacement: Callable[..., Any]
    optional: bool = False

    @property
    def name(self) -> str:
        return f"{self.module}.{self.target}"


def start_run(original, self, config, *arguments, **named):
    """The trainer's constructor: what a run asks for is checked before anything is started."""
    prepared = prepare(config)
    self._polarity = None
    if prepared is not None:
        missing = missing_hook(config.actor_rollout_ref.actor.strategy)
        if missing is not None:
            raise RuntimeError(f"{KEY}: {missing}")
        self._polarity = method = driver.Reweighting(*prepared)
        logger.warning("entropy-polarity is on: method %s, settings %s", method.method, method.settings)
    return original(self, config, *arguments, **named)


def refuse_run(original, self, *arguments, **named):
    """What a trainer that has no place for a method does first: its constructor or, where that calls no other, the
    start of its workers."""
    given = inspect.signature(original).bind_partial(self, *arguments, **named).arguments
    config = given["config"] if "config" in given else self.config  # noqa: SIM401 (a constructor has none yet)
    if method_of(config) is not None:
        reason = untested_version() or "this trainer of verl's has no place for it: use its own, trainer.use_v1=true"
        raise ValueError(f"{KEY}: {reason}")
    return original(self, *arguments, **named)


_TRAINER = "verl.trainer.ppo.v1.trainer_base"
_FSDP = "verl.workers.engine.fsdp.transformer_impl"
_MEGATRON = "verl.workers.engine.megatron.transformer_impl"
_OTHER_TRAINERS = (
    Hook("verl.trainer.ppo.ray_trainer", "RayPPOTrainer.__init__", ("self", "config"), refuse_run),
    Hook(
        "verl.experimental.separation.ray_trainer",
        "SeparateRayPPOTrainer._init_resource_pools",
        ("self",),
        refuse_run,
        optional=True,
    ),
)
HOOKS = (
    Hook(_TRAINER, "PPOTrainer.__init__", ("self", "config"), start_run),
    Hook(_TRAINER, "PPOTrainer._compute_old_log_prob", ("self", "batch", "metrics"), driver.ask_for_statistics),
    Hook(_TRAINER, "PPOTrainer._compute_advantage", ("self", "batch", "metrics"), driver.apply_method),
    Hook(_TRAINER, "compute_advantage_for_multi_trajectories", ("data", "batch_keys"), driver.rewrite_advantages),
    Hook(_TRAINER, "PPOTrainer._update_actor", ("self", "batch", "metrics"), driver.restrict_masks),
    Hook(_TRAINER, "PPOTrainer._save_checkpoint", ("self",), driver.save_method),
    Hook(_TRAINER, "PPOTrainer._load_checkpoint", ("self",), driver.load_method),
    *_OTHER_TRAINERS,
    Hook("verl.workers.engine_workers", "ppo_loss", ("config", "model_output", "data"), workers.add_loss_terms),
    Hook(
        _FSDP,
        "FSDPEngineWithLMHead.prepare_model_outputs",
        ("self", "output", "output_args", "micro_batch", "logits_processor_func"),
        workers.add_fsdp_statistics,
    ),
    Hook(
        _MEGATRON,
        "MegatronEngineWithLMHead._lm_head_logits_processor",
        ("self", "logits", "label", "temperature", "batch"),
        workers.add_megatron_statistics,
        optional=True,
    ),
)
# All that is hooked of a verl that was not tested.
REFUSALS = (Hook(_TRAINER, "PPOTrainer.__init__", ("self", "config"), refuse_run), *_OTHER_TRAINERS)


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
    return _misfit(hook, module) or (None if _is_in_place(hook, module) else f"{hook.name} is not hooked")


def put(hook: Hook, module: ModuleType) -> None:
    """Put a hook in place; a second time nothing happens. What does not fit is logged, and left as it is."""
    misfit = _misfit(hook, module)
    if misfit is not None:
        logger.error("entropy-polarity cannot be used with this verl: %s", misfit)
        return
    if _is_in_place(hook, module):
        return
    owner, name = _place(hook, module)
    original = getattr(owner, name)

    @functools.wraps(original)
    def hooked(*arguments: Any, **named: Any) -> Any:
        return hook.replacement(original, *arguments, **named)

    hooked.of_entropy_polarity = True  # type: ignore[attr-defined]
    setattr(owner, name, hooked)


def _misfit(hook: Hook, module: ModuleType) -> str | None:
    """Why a hook cannot be put into `module`, or None."""
    owner, name = _place(hook, module)
    found = getattr(owner, name, None)
    if found is None:
        return f"verl has no {hook.name}"
    missing = set(hook.parameters) - inspect.signature(found).parameters.keys()
    return f"{hook.name} has no parameter {', '.join(sorted(missing))}" if missing else None


def _is_in_place(hook: Hook, module: ModuleType) -> bool:
    owner, name = _place(hook, module)
    return getattr(getattr(owner, name, None), "of_entropy_polarity", False)


def _place(hook: Hook, module: ModuleType) -> tuple[Any, str]:
    """(the module or class, None where there is none; the name in it)"""
    owner, _, name = hook.target.rpartition(".")
    return (getattr(module, owner, None) if owner else module), name
