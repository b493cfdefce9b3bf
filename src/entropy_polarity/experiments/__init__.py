"""What the commands do: setup.py makes a run from its recipe, the others train, compare, audit and evaluate."""
