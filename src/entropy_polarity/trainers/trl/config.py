"""The settings of PolarityTrainer: TRL's own, and the method."""

import json
import warnings
from dataclasses import dataclass, field, fields
from pathlib import PurePosixPath
from typing import Any, ClassVar

from trl import GRPOConfig
from trl.trainer.utils import get_config_model_id

from entropy_polarity.methods import chain_name, make_transform
from entropy_polarity.trainers.trl.head import HEADS
from entropy_polarity.trainers.trl.loss import fix_loss
from entropy_polarity.transforms.core import REWARD_COLUMNS

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

    method: str = field(
        default="papo", metadata={"help": "Name of a method in entropy_polarity.methods, or of a chain, dapo+papo."}
    )
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
        self._settle()

    def _settle(self) -> None:
        """Check what GRPOConfig does not know, and put in what the method fixes of the loss."""
        if self.statistics_head not in HEADS:
            raise ValueError(f"statistics_head={self.statistics_head!r}: expected {' or '.join(map(repr, HEADS))}")
        self.method = chain_name(self.method)
        transform = make_transform(self.method, self.settings)  # unknown names fail here, before a model is loaded
        if self.importance_sampling_level != "token" and not transform.needs <= REWARD_COLUMNS:
            raise ValueError(
                f"importance_sampling_level={self.importance_sampling_level!r} averages the advantage over each "
                f"sequence, and method {self.method!r} looks at single tokens, whose weights that cancels: use "
                "importance_sampling_level='token', or method='grpo', which monitors alone"
            )
        fix_loss(self, self.method, transform.loss)

    @property
    def settings(self) -> dict[str, Any]:
        return json.loads(self.method_settings) if isinstance(self.method_settings, str) else self.method_settings or {}


def polarity_config(args: GRPOConfig | None, model: Any) -> PolarityConfig:
    """The configuration of a trainer that was given `args`, as GRPOTrainer takes them.

    None is the default configuration, its folder named by the model; a GRPOConfig keeps all its settings and gets the
    default method, with a warning. Raises TypeError for anything else.
    """
    if isinstance(args, PolarityConfig):
        return args
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return PolarityConfig(f"{PurePosixPath(name).name}-PAPO")
    if not isinstance(args, GRPOConfig):
        raise TypeError(f"PolarityTrainer takes args=PolarityConfig(...), got {type(args).__name__}")
    config = PolarityConfig.__new__(PolarityConfig)
    # Settled settings are not settled again: GRPOConfig refuses some that it has filled in itself.
    vars(config).update({f.name: f.default for f in fields(PolarityConfig)} | vars(args))
    config._settle()
    warnings.warn(
        f"args is a GRPOConfig, which names no method: {config.method!r} is used, the default of PolarityConfig, which "
        "takes the same settings",
        stacklevel=3,
    )
    return config
