"""PolarityTrainer: TRL's GRPOTrainer with the advantages rewritten token by token."""

from entropy_polarity.trainers.trl.config import PolarityConfig
from entropy_polarity.trainers.trl.rollout import Rollout
from entropy_polarity.trainers.trl.trainer import PolarityTrainer

__all__ = ["PolarityConfig", "PolarityTrainer", "Rollout"]
