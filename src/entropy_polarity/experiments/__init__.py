"""What the commands do: training from a recipe, and what is measured on it.

setup      a run from its recipe, for all of them      evaluate   policies side by side on held-out problems
training   papo train                                  auditing   does polarity predict the entropy change?
compare/   methods by seeds, searches, ablations       pretraining   the embedded policies
"""
