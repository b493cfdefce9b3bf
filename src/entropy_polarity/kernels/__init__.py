"""Per-token statistics of a policy, from logits or from hidden states, at the speed of memory.

entry.py      the public functions          checks.py   what they refuse
engine.py     what an engine does, and which one runs where
logits.py     logits -> statistics          linear.py   hidden states -> statistics, and the three ways back
sharded.py    the same for a vocabulary that is spread over processes
state.py      six numbers a row           cpu.py, chunked.py, triton.py   the engines
reference.py  the float64 oracle
"""

from entropy_polarity.kernels.dispatch import choose
from entropy_polarity.kernels.public import linear_token_loss, linear_token_stats, token_stats

__all__ = ["choose", "linear_token_loss", "linear_token_stats", "token_stats"]
