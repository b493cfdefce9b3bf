"""The settings of PolarityTrainer: TRL's own, and the method."""

import json
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

from trl import GRPOConfig

from entropy_polarity.methods import make_transform
from entropy_polarity.trainers.trl_loss import fix_loss
from entropy_polarity.trainers.trl_seam import HEADS

# TRL 1.16 sets these names itself, which later transformers call otherwise: nothing that a user could change.
warnings.filterwarnings(
    "ignore", r".*gradient_checkpointing\w*` is deprecated and will be removed in v6", FutureWarning
)


@dataclass
class PolarityConfig(GRPOConfig):
    """GRPOConfig plus the method (`papo methods` lists them) and its settings, as its builder names them.

    >>> config = PolarityConfig("out", method="papo", method_settings={"controller": "balance"}, use_cpu=True,
    ...                         bf16=False, report_to="none")
    >>> config.method_settings["controller"]
    'balance'
    """

    _VALID_DICT_FIELDS: ClassVar = [*GRPOConfig._VALID_DICT_FIELDS, "method_settings"]

    method: str = field(default="papo", metadata={"help": "Name of a method in entropy_polarity.methods."})
    method_settings: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Settings of the method, e.g. \'{"controller": "thermostat", "level": 0.4}\'.'},
    )
    statistics_head: str = field(
        default="fused",
        metadata={
            "help": "'fused': log-probs, entropy and statistics from one product with the output head. 'trl': TRL's "
            "own head, with which λ = 0 is GRPOTrainer to the last bit, and a second product for the statistics."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.importance_sampling_level != "token":
            raise ValueError(
                f"importance_sampling_level={self.importance_sampling_level!r} averages the advantage over each "
                "sequence, which cancels token weights: use importance_sampling_level='token'"
            )
        if self.loss_type == "luspo":
            raise ValueError(
                "loss_type='luspo' weighs whole sequences, which cancels token weights: use 'dapo', 'grpo', "
                "'bnpo', 'dr_grpo', 'cispo', 'sapo' or 'vespo'"
            )
        if self.statistics_head not in HEADS:
            raise ValueError(f"statistics_head={self.statistics_head!r}: expected {' or '.join(map(repr, HEADS))}")
        transform = make_transform(self.method, self.settings)  # unknown names fail here, before a model is loaded
        fix_loss(self, self.method, transform.loss)

    @property
    def settings(self) -> dict[str, Any]:
        return json.loads(self.method_settings) if isinstance(self.method_settings, str) else self.method_settings or {}
