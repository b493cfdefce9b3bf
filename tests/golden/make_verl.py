"""Losses and gradients that verl's own functions give on small batches, for the tests of our losses: verl.json.

verl needs an older transformers than this project, so it gets an environment of its own, outside the repository:

    python3.11 -m venv /tmp/verl-env
    /tmp/verl-env/bin/pip install torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu
    /tmp/verl-env/bin/pip install --no-deps verl==0.9.1
    /tmp/verl-env/bin/pip install ray==2.60.0 tensordict==0.10.0 omegaconf==2.3.1 codetiming==1.4.0 \
        hydra-core==1.3.8 transformers==5.10.4 numpy==2.4.6 orjson==3.13.0
    OMP_NUM_THREADS=1 /tmp/verl-env/bin/python tests/golden/make_verl.py tests/golden/verl.json

The file has `batches` by name, each (responses, tokens), and `cases`: a verl policy loss with its settings on a batch,
averaged over all model tokens. `gradient` is along log_prob. `selected` are the [response, token] that clip_cov
silences or kl_cov penalises, as verl chose them. clip_cov chooses with torch.randperm: here that permutation puts the
tokens it may choose from, `eligible` many, in the order of `keys`, so the choice is those with the smallest keys.
"""

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

# verl is imported where it is used: pytest imports this file, in an environment without verl, to look for doctests.

COLUMNS = ("advantages", "log_prob", "old_log_prob")


def make_batch(seed: int, dtype: str, advantages: list[float], on_policy: bool = False) -> dict[str, Any]:
    """Six ragged responses in three decimals, the fifth with a gap; outside of the mask stand numbers as well."""
    generator = torch.Generator().manual_seed(seed)
    old = -4.5 * torch.rand(6, 9, generator=generator) ** 1.5 - 0.01
    new = (old + 0.5 * torch.randn(6, 9, generator=generator)).clamp(max=-0.002)
    mask = (torch.arange(9) < torch.tensor([[9], [6], [8], [1], [9], [7]])).int()
    mask[4, 3:5] = 0
    for row, advantage in enumerate(advantages):  # beyond the outer clip where A < 0, beyond 2 where A > 0
        if advantage < 0:
            old[row, 0], new[row, 0] = -3.6, -0.9
        if advantage > 0:
            old[row, 0], new[row, 0] = -2.2, -1.1
    old, new = ([[round(x, 3) for x in row] for row in matrix.tolist()] for matrix in (old, new))
    return {
        "dtype": dtype,
        "mask": mask.tolist(),
        "advantages": [[a] * 9 for a in advantages],
        "log_prob": old if on_policy else new,
        "old_log_prob": old,
        "keys": torch.randperm(54, generator=generator).view(6, 9).tolist(),
    }


def settings() -> list[tuple[str, dict[str, float]]]:
    """(loss, settings) pairs; 38 model tokens, so a ratio of 2e-4 selects 1, 0.1 selects 3 and 0.3 selects 11."""
    wide, narrow = {"clip_ratio_low": 1.0, "clip_ratio_high": 1.0}, {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2}
    bounds, none = {"clip_cov_lb": 1.0, "clip_cov_ub": 5.0}, {"clip_cov_lb": 90.0, "clip_cov_ub": 99.0}
    return [
        *(("clip_cov", {"clip_cov_ratio": ratio, **bounds, **wide}) for ratio in (2e-4, 0.1, 1.0)),
        *(("clip_cov", {"clip_cov_ratio": ratio, **bounds, **narrow}) for ratio in (2e-4, 0.1, 1.0)),
        ("clip_cov", {"clip_cov_ratio": 0.1, "clip_cov_lb": 0.5, "clip_cov_ub": 2.0, **wide}),
        ("clip_cov", {"clip_cov_ratio": 0.1, **none, **wide}),
        *(("kl_cov", {"kl_cov_ratio": r, "ppo_kl_coef": c}) for r in (2e-4, 0.1, 0.3) for c in (1.0, 0.1)),
        *(("vanilla", {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": c}) for c in (10.0, 3.0)),
    ]


def run(loss: str, batch: dict[str, Any], config: dict[str, float]) -> dict[str, Any]:
    """verl's loss on the batch. What it selects is overheard where it calls torch and masked_mean."""
    from verl.trainer.ppo import core_algos
    from verl.workers.config.actor import ActorConfig, PolicyLossConfig

    policy_loss = {k: v for k, v in config.items() if k in PolicyLossConfig.__dataclass_fields__}
    actor = {k: v for k, v in config.items() if k not in policy_loss}
    actor_config = ActorConfig(
        strategy="fsdp", rollout_n=6, use_dynamic_bsz=True, policy_loss=PolicyLossConfig(loss, **policy_loss), **actor
    )
    tensors = {name: torch.tensor(batch[name], dtype=getattr(torch, batch["dtype"])) for name in COLUMNS}
    log_prob = tensors["log_prob"].requires_grad_()
    mask, keys = torch.tensor(batch["mask"]).bool(), torch.tensor(batch["keys"])
    nonzero, topk, masked_mean = torch.nonzero, torch.topk, core_algos.verl_F.masked_mean
    heard: dict[str, Tensor] = {}

    def overheard(name: str, value: Any) -> Any:
        heard[name] = value
        return value

    def by_key(count: int) -> Tensor:
        assert count == len(heard["nonzero"])
        return keys[tuple(heard["nonzero"].T)].argsort()

    with (
        patch.object(torch, "nonzero", lambda *a, **k: overheard("nonzero", nonzero(*a, **k))),
        patch.object(torch, "topk", lambda *a, **k: overheard("topk", topk(*a, **k))),
        patch.object(torch, "randperm", by_key),
        patch.object(core_algos.verl_F, "masked_mean", lambda v, m: masked_mean(overheard("averaged", v), m)),
    ):
        value, _ = core_algos.get_policy_loss_fn(loss)(
            **tensors, response_mask=mask, loss_agg_mode="token-mean", config=actor_config
        )
    value.backward()
    result = {"loss": value.item(), "gradient": log_prob.grad.tolist()}
    if loss == "clip_cov":  # the last mean it takes is of its choice
        chosen = nonzero(heard["averaged"])
        result |= {"eligible": len(heard["nonzero"]), "selected": chosen.tolist()}
    if loss == "kl_cov":  # its topk is over the model tokens
        chosen = nonzero(mask)[heard["topk"].indices.sort().values]
        result |= {"selected": chosen.tolist()}
    return result


def main(output: Path) -> None:
    import verl

    batches = {
        "float64": make_batch(36, "float64", [3.6, -5.0, 0.0, 6.5, -2.4, -4.2]),
        "float32": make_batch(19, "float32", [4.0, 2.4, -5.2, -1.0, 0.0, -3.1]),
        "on policy": make_batch(3, "float64", [2.0, 0.6, -1.5, -0.5, 0.0, -2.2], on_policy=True),
    }
    cases = [
        {"policy_loss": loss, "batch": name, "settings": config, **run(loss, batch, config)}
        for name, batch in batches.items()
        for loss, config in settings()
    ]
    compact = json.JSONEncoder(separators=(",", ":")).encode
    versions = compact({"verl": verl.__version__, "torch": torch.__version__})
    named = ",\n".join(f"{compact(name)}:{compact(batch)}" for name, batch in batches.items())
    listed = ",\n".join(map(compact, cases))
    output.write_text(
        f'{{"versions":{versions},\n"batches":{{\n{named}\n}},\n"cases":[\n{listed}\n]}}\n', encoding="utf-8"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
