"""The workers' part in verl: two statistics per token from the pass for old log-probs, and a method's loss terms.

    polarity_entropy      H in nats, after temperature, accumulated in float32 whatever the logits are
    polarity_sensitivity  T, as in TokenStats

verl's own entropy comes from 16-bit logits; T from it would lose its sign where the policy is sure. The two travel to
the driver as verl's log-probs do. They are made only where the driver asked for them.
"""

from typing import Any

import torch
from torch import Tensor

from entropy_polarity.kernels import token_stats
from entropy_polarity.kernels.sharded import sharded_token_stats
from entropy_polarity.tokens import Tokens, TokenStats
from entropy_polarity.trainers.loss import TERMS
from entropy_polarity.transforms import loss_terms

ASKED, DECIDED = "polarity_statistics", "polarity_decided"
ENTROPY, SENSITIVITY = "polarity_entropy", "polarity_sensitivity"


def one_temperature(batch: Any) -> float:
    """The temperature of all samples of a micro-batch of verl's, which has one number or one a sample. What the engines
    make of it, a value a token, says less: padding has one of its own."""
    given = torch.as_tensor(batch["temperature"]).flatten()
    if (given != given[0]).any():
        raise ValueError("polarity statistics need one temperature for a batch, as rollout.temperature gives")
    return float(given[0])


def _columns(stats: TokenStats) -> dict[str, Tensor]:
    return {ENTROPY: stats.entropy, SENSITIVITY: stats.sensitivity}


def add_fsdp_statistics(original, self, output, output_args, micro_batch, logits_processor_func):
    """The outputs of the FSDP engines, with the two columns, nested (B, j) like the log-probs."""
    from verl.utils import tensordict_utils as tu

    columns = {}
    if tu.get_non_tensor_data(micro_batch, ASKED, default=False):  # before verl's own work, which may overwrite logits
        packed = tu.get_non_tensor_data(micro_batch, "use_remove_padding", default=True)
        columns = _fsdp_statistics(self, output.logits, output_args, micro_batch, packed)
    return original(self, output, output_args, micro_batch, logits_processor_func) | columns


@torch.no_grad()
def _fsdp_statistics(
    engine: Any, logits: Tensor, output_args: dict[str, Any], micro_batch: Any, packed: bool
) -> dict[str, Tensor]:
    """Packed logits hold all tokens of the batch in one row, without padding, or this process's part of the row."""
    from torch.distributed.tensor import DTensor

    if isinstance(logits, DTensor):  # tensor-parallel: sharded along the vocabulary; verl gathers it whole just after
        logits = logits.full_tensor()
    tokens, offsets = output_args["input_ids_rmpad_rolled"], micro_batch["input_ids"].offsets()
    mask = None
    if packed:
        logits = logits.squeeze(0)
    else:
        mask = torch.arange(logits.shape[1], device=logits.device) < offsets.diff()[:, None]
        tokens = torch.zeros_like(mask, dtype=torch.long).masked_scatter(mask, tokens)
    columns = _columns(token_stats(logits, tokens, temperature=one_temperature(micro_batch), mask=mask, check=False))
    for name, column in columns.items():
        column = column[mask] if mask is not None else engine._gather_and_unpad_packed(column, output_args["pad_size"])
        columns[name] = torch.nested.nested_tensor_from_jagged(column, offsets)
    return columns


def add_megatron_statistics(original, self, logits, label, temperature, *, batch, **arguments):
    """The outputs of the Megatron engine, whose vocabulary is spread over the tensor-parallel group."""
    from megatron.core import parallel_state
    from verl.utils import tensordict_utils as tu

    columns = {}
    if tu.get_non_tensor_data(batch, ASKED, default=False):  # before verl overwrites the logits
        group = parallel_state.get_tensor_model_parallel_group()
        stats = sharded_token_stats(logits, label, group, temperature=one_temperature(batch))
        columns = _columns(stats)
    return original(self, logits, label, temperature, batch=batch, **arguments) | columns


def add_loss_terms(original, config, model_output, data, dp_group=None):
    """verl's loss plus a method's loss terms, averaged as verl averages its own."""
    from verl.utils import tensordict_utils as tu

    decided = tu.get_non_tensor_data(data, DECIDED, default=False)
    if decided and tu.get_non_tensor_data(data, "batch_num_tokens", default=None) == 0:
        tu.assign_non_tensor(data, batch_num_tokens=1)  # a method dropped all of it: the loss is 0, not 0 / 0
    loss, metrics = original(config=config, model_output=model_output, data=data, dp_group=dp_group)
    given = [column for column in TERMS.values() if column in data]
    if not given:
        return loss, metrics
    from verl.trainer.ppo.core_algos import agg_loss
    from verl.utils.metric import AggregationType, Metric
    from verl.workers.utils.padding import no_padding_2_padding

    padded = data.select("response_mask", "old_log_probs", "advantages", *given).to_padded_tensor()
    entropy, mask = model_output.get("entropy"), padded["response_mask"].bool()
    tokens = Tokens.pack(
        mask,
        padded["advantages"],
        logp=no_padding_2_padding(model_output["log_probs"], data),
        old_logp=padded["old_log_probs"],
        entropy=None if entropy is None else no_padding_2_padding(entropy, data),
        **{name: padded.get(column) for name, column in TERMS.items()},
    )
    terms = loss_terms(tokens)
    assert terms is not None
    added = agg_loss(
        loss_mat=tokens.unpack(terms, mask.shape),
        loss_mask=mask,
        loss_agg_mode=config.loss_agg_mode,
        **config.global_batch_info,
    )
    metrics["actor/polarity_loss_terms"] = Metric(value=added, aggregation=AggregationType.SUM)
    return loss + added, metrics
