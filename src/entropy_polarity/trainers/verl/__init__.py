"""Any method of the table in verl: importing this package puts the hooks in place; see plugin.py."""

from entropy_polarity.trainers.verl.hooks import HOOKS, fault_of, untested_version, why_not_hooked
from entropy_polarity.trainers.verl.plugin import activate

__all__ = ["HOOKS", "activate", "fault_of", "untested_version", "why_not_hooked"]

activate()
