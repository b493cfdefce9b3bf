"""Batches as verl's driver and workers see them."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("verl", reason="verl needs an environment of its own: make verl-test")

import numpy as np
from omegaconf import DictConfig, OmegaConf
from verl.utils import tensordict_utils as tu

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/trl.json").read_text(encoding="utf-8"))
PROMPT = 3


def nested(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor([row.contiguous() for row in rows], layout=torch.jagged)


def config(**papo) -> DictConfig:
    """What of verl's configuration is read."""
    made = {
        "trainer": {
            "use_v1": True, "resume_mode": "auto", "default_local_dir": "unset", "default_hdfs_dir": None,
            "del_local_ckpt_after_load": False, "critic_warmup": 0,
        },
        "data": {"train_batch_size": 4},
        "algorithm": {
            "use_kl_in_reward": False, "adv_estimator": "grpo", "gamma": 1.0, "lam": 1.0,
            "norm_adv_by_std_in_grpo": True, "rollout_correction": {"bypass_mode": False},
        },
        "actor_rollout_ref": {
            "rollout": {"n": 4, "temperature": 1.0, "calculate_log_probs": False},
            "model": {"use_fused_kernels": False},
            "actor": {
                "strategy": "fsdp", "clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": 3.0,
                "loss_agg_mode": "token-mean", "loss_scale_factor": None, "calculate_entropy": False,
                "policy_loss": {"loss_mode": "vanilla"}, "ppo_mini_batch_size": 2, "ppo_epochs": 1,
                "entropy_coeff": 0.0, "data_loader_seed": 0, "shuffle": False,
            },
        },
    }  # fmt: skip
    return OmegaConf.create(made | ({"papo": papo} if papo else {}))


def golden_rows() -> dict[str, torch.Tensor]:
    return {name: torch.tensor(rows) for name, rows in GOLDEN["batch"].items()}


def lengths(mask: torch.Tensor) -> list[int]:
    """How long each response is; what stands behind is padding."""
    return [int(row.nonzero().max()) + 1 if row.any() else 1 for row in mask]


def of_verl(rows: dict[str, torch.Tensor], group: int = 4) -> tuple[list[str], dict]:
    """(keys, columns) of a padded batch in verl's form; the model's own columns are prompt and response long, and one
    place earlier."""
    mask = rows["mask"].bool()
    long = lengths(mask)
    keys = [f"p{i // group}_{i % group}_0" for i in range(len(mask))]

    def response(column: torch.Tensor) -> torch.Tensor:
        return nested([row[:n] for row, n in zip(column, long, strict=True)])

    def model(column: torch.Tensor) -> torch.Tensor:
        junk = torch.full((PROMPT - 1,), 9.0)
        return nested([torch.cat([junk, row[:n], junk[:1]]) for row, n in zip(column, long, strict=True)])

    scores = torch.zeros_like(rows["advantages"])
    for row, n in enumerate(long):
        scores[row, n - 1] = rows["reward"].flatten()[row]
    return keys, {
        "uid": np.array([key.split("_")[0] for key in keys], dtype=object),
        "response_mask": response(rows["mask"].long()),
        "loss_mask": response(rows["mask"].long()),
        "rm_scores": response(scores),
        "advantages": response(rows["advantages"]),
        "old_log_probs": response(rows["logp"]),
        "polarity_entropy": model(rows["entropy"]),
        "polarity_sensitivity": model(rows["sensitivity"]),
    }


def tensordict(columns: dict):
    return tu.get_tensordict(dict(columns))


def of_driver(columns: dict) -> tuple:
    """(verl's padded batch, what the workers sent, tags), as its driver has them."""
    sent = {name: column for name, column in columns.items() if name.startswith("polarity_")}
    batch = {name: column for name, column in columns.items() if name != "uid" and name not in sent}
    tags = [{"response_len": n} for n in columns["response_mask"].offsets().diff().tolist()]
    return tensordict(batch).to_padded_tensor(), sent, tags


def padded(column: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nested.to_padded_tensor(column, 0, (len(column.offsets()) - 1, width))
