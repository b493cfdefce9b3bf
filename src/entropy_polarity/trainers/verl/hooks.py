"""The table HOOKS of what is replaced in verl, the hooks that check or refuse a run, and how a hook is put in place.

Each is put in place right after verl imports the module it is in, and only if that looks as it did when it was tested.
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
_MARK = "of_entropy_polarity"


class Hook(NamedTuple):
    """`replacement(original, ...)` is called in place of `target`, a "function" or "Class.method" of `module`, if that
    takes the parameters that it names. An optional hook is for a part of verl that need not be installed."""

    module: str
    target: str
    replacement: Callable[..., Any]
    optional: bool = False

    @property
    def name(self) -> str:
        return f"{self.module}.{self.target}"

    @property
    def parameters(self) -> set[str]:
        """Those that `replacement` needs of its target."""
        _, *named = inspect.signature(self.replacement).parameters.values()
        return {p.name for p in named if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def start_run(original, self, config, *arguments, **named):
    """The trainer's constructor: what a run asks for is checked before anything is started."""
    prepared = prepare(config)
    self._polarity = None
    if prepared is not None:
        if (reason := why_not_hooked(config.actor_rollout_ref.actor.strategy)) is not None:
            raise RuntimeError(f"{KEY}: {reason}")
        self._polarity = method = driver.Reweighting(*prepared)
        logger.warning("entropy-polarity is on: method %s, settings %s", method.method, method.settings)
    return original(self, config, *arguments, **named)


def refuse_run(original, self, config, *arguments, **named):
    """The constructor of a trainer that has no place for a method."""
    _refuse(config)
    return original(self, config, *arguments, **named)


def refuse_workers(original, self, *arguments, **named):
    """What such a trainer does first where its constructor calls no other: it starts its workers."""
    _refuse(self.config)
    return original(self, *arguments, **named)


def _refuse(config: Any) -> None:
    if method_of(config) is not None:
        reason = untested_version() or "this trainer of verl's has no place for it: use its own, trainer.use_v1=true"
        raise ValueError(f"{KEY}: {reason}")


_TRAINER = "verl.trainer.ppo.v1.trainer_base"
_SEPARATE = "verl.experimental.separation.ray_trainer"
_FSDP = "verl.workers.engine.fsdp.transformer_impl"
_MEGATRON = "verl.workers.engine.megatron.transformer_impl"
_OTHER_TRAINERS = (
    Hook("verl.trainer.ppo.ray_trainer", "RayPPOTrainer.__init__", refuse_run),
    Hook(_SEPARATE, "SeparateRayPPOTrainer._init_resource_pools", refuse_workers, optional=True),
)
HOOKS = (
    Hook(_TRAINER, "PPOTrainer.__init__", start_run),
    Hook(_TRAINER, "PPOTrainer._compute_old_log_prob", driver.ask_for_statistics),
    Hook(_TRAINER, "PPOTrainer._compute_advantage", driver.apply_method),
    Hook(_TRAINER, "compute_advantage_for_multi_trajectories", driver.rewrite_advantages),
    Hook(_TRAINER, "PPOTrainer._update_actor", driver.restrict_masks),
    Hook(_TRAINER, "PPOTrainer._save_checkpoint", driver.save_method),
    Hook(_TRAINER, "PPOTrainer._load_checkpoint", driver.load_method),
    *_OTHER_TRAINERS,
    Hook("verl.workers.engine_workers", "ppo_loss", workers.add_loss_terms),
    Hook(_FSDP, "FSDPEngineWithLMHead.prepare_model_outputs", workers.add_fsdp_statistics),
    Hook(
        _MEGATRON, "MegatronEngineWithLMHead._lm_head_logits_processor", workers.add_megatron_statistics, optional=True
    ),
)
# All that is hooked of a verl that was not tested.
REFUSALS = (Hook(_TRAINER, "PPOTrainer.__init__", refuse_run), *_OTHER_TRAINERS)


def untested_version() -> str | None:
    """Why nothing works in the verl that is installed, or None."""
    try:
        found = version("verl")
    except PackageNotFoundError:  # a checkout of verl that is being imported
        found = getattr(sys.modules.get("verl"), "__version__", "0")
    if Version(found).release[:2] == TESTED_VERL:
        return None
    tested, following = (f"{TESTED_VERL[0]}.{TESTED_VERL[1] + more}" for more in (0, 1))
    return (
        f"entropy-polarity hooks private methods of verl {tested}, but verl {found} is installed: use "
        f"'verl>={tested},<{following}'"
    )


def why_not_hooked(strategy: str) -> str | None:
    """Why a run with this engine would not be trained as it asks, as far as this process can tell; or None."""
    if (reason := untested_version()) is not None:
        return reason
    for hook in HOOKS:
        if hook.optional and strategy not in hook.module:
            continue
        try:
            module = import_module(hook.module)
        except Exception:  # an engine need not be installed where the driver runs
            continue
        if (fault := fault_of(hook, module)) is not None:
            return fault
    return None


def fault_of(hook: Hook, module: ModuleType) -> str | None:
    """Why a hook does not work in `module`, or None."""
    found = _found(hook, module)
    return _misfit(hook, found) or (None if hasattr(found, _MARK) else f"{hook.name} is not hooked")


def put(hook: Hook, module: ModuleType) -> None:
    """Put a hook in place; a second time nothing happens. What does not fit is logged, and left as it is."""
    original = _found(hook, module)
    misfit = _misfit(hook, original)
    if misfit is not None:
        logger.error("entropy-polarity cannot be used with this verl: %s", misfit)
        return
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def hooked(*arguments: Any, **named: Any) -> Any:
        return hook.replacement(original, *arguments, **named)

    setattr(hooked, _MARK, True)
    owner, _, name = hook.target.rpartition(".")
    setattr(getattr(module, owner) if owner else module, name, hooked)


def _found(hook: Hook, module: ModuleType) -> Any:
    """What stands in `module` where the hook belongs, or None."""
    return functools.reduce(lambda owner, name: getattr(owner, name, None), hook.target.split("."), module)


def _misfit(hook: Hook, found: Any) -> str | None:
    """Why a hook cannot be put where `found` stands, or None."""
    if found is None:
        return f"verl has no {hook.name}"
    missing = hook.parameters - inspect.signature(found).parameters.keys()
    return f"{hook.name} has no parameter {', '.join(sorted(missing))}" if missing else None
