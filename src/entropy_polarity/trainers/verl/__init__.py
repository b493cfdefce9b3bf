"""Any method of the table in verl: importing this package puts the hooks in place; see plugin.py."""

from entropy_polarity.trainers.verl.hooks import HOOKS, fault_of, missing_hook, untested_version
from entropy_polarity.trainers.verl.plugin import activate

__all__ = ["HOOKS", "activate", "fault_of", "missing_hook", "untested_version"]

activate()
