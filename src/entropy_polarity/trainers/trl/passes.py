"""Forward passes as TRL makes them, with the statistics of the policy at each token beside what TRL asks for."""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.trainer import grpo_trainer

from entropy_polarity.trainers.trl.checkpoints import CheckpointedTrainer
from entropy_polarity.trainers.trl.head import Request, StatisticsHead


class Statistics(NamedTuple):
    """Padded columns of a forward pass, (B, T) each, without gradient."""

    logp: Tensor
    entropy: Tensor
    sensitivity: Tensor | None = None


class StatisticsTrainer(CheckpointedTrainer):
    """GRPOTrainer whose own forward passes give our statistics too."""

    model: Any  # pyright: ignore[reportIncompatibleVariableOverride]

    def _request(self, statistics: bool) -> Request:
        entropy_grad = self._entropy_bonus_enabled or self.transform.entropy_gradient
        return Request(self.args.statistics_head, statistics, entropy_grad)

    def _with_statistics(self, model, *args, sensitivity: bool = True, **kwargs) -> tuple[tuple, Statistics]:
        """What TRL's function gives of a pass, entropies included, and the statistics in it and beside it."""
        keep, slots = args[2] if len(args) > 2 else kwargs["logits_to_keep"], []

        def watched(**model_inputs):
            output = model(**model_inputs)
            slots.append(output.mean_logits)
            return output

        with StatisticsHead.serving(self._request(sensitivity)):
            result = super()._get_per_token_logps_and_entropies(watched, *args, compute_entropy=True, **kwargs)
        beside = torch.cat([slot[:, -keep:] for slot in slots]) if sensitivity else None
        return result, Statistics(result[0].detach(), result[1].detach(), beside)

    def _statistics_of(self, batch: dict[str, Any]) -> Statistics:
        """Those of a batch that was generated, from a pass without gradient."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        accepted = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
        extra = {name: value for name, value in batch.items() if name in accepted}
        checkpointing = grpo_trainer.disable_gradient_checkpointing
        # The fork keeps the pass from moving the random state: dropout afterwards is that of plain GRPO.
        quiet = checkpointing(self.model, self.args.gradient_checkpointing_kwargs)  # type: ignore[arg-type]
        with torch.no_grad(), torch.random.fork_rng(), quiet:
            keep, size = batch["completion_ids"].size(1), self.args.per_device_train_batch_size
            _, statistics = self._with_statistics(self.model, ids, attention, keep, batch_size=size, **extra)
        return statistics
