"""A worker of verl's whose engine is verl's own but for the model: its logits are a function of the token before."""

import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("verl", reason="verl needs an environment of its own: make verl-test")

from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

VOCABULARY, TEMPERATURE = 30, 0.8


def logits_of(ids: torch.Tensor) -> torch.Tensor:
    table = 3 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1))
    return table[ids]


class Actor(Worker):
    def __init__(self) -> None:
        super().__init__()
        self._register_dispatch_collect_info("actor", dp_rank=self.rank, is_collect=True)
        self.seen: dict = {}

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def compute_log_prob(self, data):
        if (data["input_ids"].values() == VOCABULARY - 1).any():
            os._exit(1)  # as a worker that runs out of memory
        engine = object.__new__(FSDPEngineWithLMHead)
        engine.engine_config = SimpleNamespace(entropy_checkpointing=False, entropy_from_logits_with_chunking=False)
        engine.compute_entropy_from_logits = lambda z: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)
        engine._gather_and_unpad_packed = lambda column, pad: column
        ids = data["input_ids"].values()
        tu.assign_non_tensor(data, use_remove_padding=True)
        arguments = {
            "input_ids_rmpad_rolled": ids.roll(-1), "temperature_rmpad": torch.full(ids.shape, data["temperature"]),
            "pad_size": 0,
        }  # fmt: skip
        output = SimpleNamespace(logits=logits_of(ids)[None])
        columns = FSDPEngineWithLMHead.prepare_model_outputs(engine, output, arguments, data, None)
        return tu.get_tensordict(columns, {"metrics": {}})

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def update_actor(self, data):
        names = ("advantages", "response_mask", "loss_mask", "polarity_entropy_bonus", "polarity_ratio_penalty")
        metrics = {
            "mfu": 0.0,
            "statistics_sent_again": float("polarity_sensitivity" in data),
            "decided": float(tu.get_non_tensor_data(data, "polarity_decided", default=False)),
        }
        return tu.get_tensordict({f"seen_{name}": data[name] for name in names if name in data}, {"metrics": metrics})
