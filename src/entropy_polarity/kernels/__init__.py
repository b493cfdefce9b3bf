"""Per-token statistics of a policy, from logits or from hidden states, at the speed of memory.

public.py     the public kernels                 checks.py   the arguments they refuse
dispatch.py   which engine serves a device and type
logits.py     logits -> statistics               linear.py   hidden states -> statistics, and the three ways back
sharded.py    the same for a vocabulary that is spread over processes
engine.py     what an engine is                  cpu.py, chunked.py, triton.py   the engines
state.py      six numbers per row                reference.py   the float64 oracle
"""

from entropy_polarity.kernels.dispatch import choose
from entropy_polarity.kernels.public import linear_token_loss, linear_token_stats, token_stats

__all__ = ["choose", "linear_token_loss", "linear_token_stats", "token_stats"]
