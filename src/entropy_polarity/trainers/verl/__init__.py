"""Any method of the table in verl: importing this package puts the hooks in place; see plugin.py."""

from entropy_polarity.trainers.verl.plugin import activate

activate()
