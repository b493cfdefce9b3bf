"""PolarityTrainer: TRL's GRPOTrainer with the advantages rewritten token by token."""

try:
    from entropy_polarity.trainers.trl.config import PolarityConfig
except ModuleNotFoundError as error:
    raise ImportError(f"PolarityTrainer needs TRL ({error}): pip install 'entropy-polarity[trl]'") from None

from entropy_polarity.trainers.trl.rollout import Rollout
from entropy_polarity.trainers.trl.trainer import PolarityTrainer

__all__ = ["PolarityConfig", "PolarityTrainer", "Rollout"]
