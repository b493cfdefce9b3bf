"""Any method of the table in verl 0.9, on its cluster, without a fork: importing this package is all there is to do.

verl imports it by itself in the driver and in every worker (entry point `verl.plugins`), or is told to, by
VERL_USE_EXTERNAL_MODULES=entropy_polarity.trainers.verl. Nothing changes until a run has settings of its own:

    python -m verl.trainer.main_ppo ... +papo.method=papo +papo.controller=thermostat +papo.level=0.3

`papo.method` is a name of `papo methods`, all other keys are the method's settings. A run that asks for a method where
a hook does not work is refused; `papo doctor` says which.
"""

import logging
import sys
from importlib.abc import MetaPathFinder
from types import ModuleType

from entropy_polarity.trainers.verl.hooks import HOOKS, REFUSALS, Hook, put, untested_version

logger = logging.getLogger("entropy_polarity")


class _AfterImport(MetaPathFinder):
    """Puts each of `hooks` in place right after its module was imported."""

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
