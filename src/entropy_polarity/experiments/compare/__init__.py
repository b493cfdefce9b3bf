"""Comparing methods on paired seeds.

plan.py         what is compared: recipe, methods, seeds, baselines, constants to search
experiment.py   what `papo compare` does: check, run, summarise, write
runs.py         the training runs of a plan, several at a time, resumable after any kill
tied.py         a process that dies with its parent
summary.py      from the facts of the runs to means, paired differences and intervals
search.py       one constant a method, chosen on seeds and problems of its own
"""
