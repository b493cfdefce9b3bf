"""Comparing methods on paired seeds.

plan.py         what is compared: recipe, methods, seeds, baselines, constants to search
experiment.py   what `papo compare` does: check, run, summarise, write
runs.py         the training runs of a plan, several at a time, resumable after any kill
die_with_parent.py  a process that dies with its parent
summary.py      from the results of the runs to means, paired differences and intervals
search.py       one constant per method, chosen on seeds and problems of its own
"""
