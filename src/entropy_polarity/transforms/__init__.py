"""Methods as pure functions of a rollout batch, one family in each file; `Monitor` measures beside them.

core        what a transform is; chain          weights     PAPO, OPEFO, single branches
monitor     the metrics beside any method        rewards     DAPO, QAE, W-REINFORCE: from rewards alone
selection   80/20, Clip-Cov, KL-Cov, Clip_B/V   shaping     CW-GRPO, entropy advantage, STEER, STARE, EntroPIC, GEPO
terms       entropy bonus, adaptive coefficient batch       statistics over the batch, draws that no split changes
"""

from entropy_polarity.transforms.core import LossOverrides, Transform, chain, identity
from entropy_polarity.transforms.monitor import Monitor
from entropy_polarity.transforms.terms import loss_terms
from entropy_polarity.transforms.weights import observe, polarity_weights, token_polarity

__all__ = [
    "LossOverrides",
    "Monitor",
    "Transform",
    "chain",
    "identity",
    "loss_terms",
    "observe",
    "polarity_weights",
    "token_polarity",
]
