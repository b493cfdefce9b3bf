"""The driver's work in verl at up to 10^7 tokens a rollout: a synthetic batch through Ray and TransferQueue.

    make verl-test   # makes the environment
    .venv-verl/bin/python benchmarks/verl_driver.py --output benchmarks/results/verl_driver.json

Timed are verl's own GRPO advantages of the batch, and what the plug-in adds after them: columns read, the method, the
advantages written again. The memory is the driver's peak over what it had before; the storage is one process beside it.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from blocks import markdown

LENGTH, PROMPT, GROUP = 2000, 200, 16  # tokens of a response, of a prompt; responses of a prompt


def put(tokens: int) -> tuple[Any, int]:
    """A batch of about so many response tokens in TransferQueue: (its keys and tags, the exact number)."""
    import numpy as np
    import transfer_queue as tq
    from verl.utils import tensordict_utils as tu

    rows = max(GROUP, tokens // LENGTH // GROUP * GROUP)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(LENGTH // 2, LENGTH * 3 // 2, (rows,), generator=generator)
    total = int(lengths.sum())
    ends = lengths.cumsum(0)

    def nested(values: torch.Tensor, more: int = 0) -> torch.Tensor:
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), (lengths + more).cumsum(0)])
        return torch.nested.nested_tensor_from_jagged(values, offsets)

    scores = torch.zeros(total)
    scores[ends - 1] = torch.randint(2, (rows,), generator=generator).float()
    keys = [f"p{i // GROUP:06d}_{i % GROUP}_0" for i in range(rows)]
    columns = {
        "uid": np.array([key.split("_")[0] for key in keys], dtype=object),
        "response_mask": nested(torch.ones(total, dtype=torch.long)),
        "loss_mask": nested(torch.ones(total, dtype=torch.long)),
        "rm_scores": nested(scores),
        "old_log_probs": nested(-torch.rand(total, generator=generator)),
        "polarity_entropy": nested(torch.rand(total + PROMPT * rows, generator=generator), PROMPT),
        "polarity_sensitivity": nested(torch.randn(total + PROMPT * rows, generator=generator), PROMPT),
    }
    tags = [{"seq_len": int(n) + PROMPT} for n in lengths]
    meta = tq.kv_batch_put(keys=keys, partition_id=f"of-{rows}", fields=tu.get_tensordict(columns), tags=tags)
    return meta, total


def trainer_and_method() -> tuple[Any, Any]:
    """verl's own trainer without its workers, and the plug-in's part."""
    from omegaconf import OmegaConf
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    from entropy_polarity.trainers.verl_config import prepare
    from entropy_polarity.trainers.verl_driver import Reweighting

    config = OmegaConf.create(
        {
            "papo": {"method": "papo", "controller": "thermostat", "level": 0.3, "conserve": True},
            "algorithm": {
                "use_kl_in_reward": False, "adv_estimator": "grpo", "gamma": 1.0, "lam": 1.0,
                "norm_adv_by_std_in_grpo": True,
            },
            "actor_rollout_ref": {"rollout": {"n": GROUP}, "model": {}, "actor": {"strategy": "fsdp"}},
        }
    )  # fmt: skip
    trainer = object.__new__(PPOTrainerSync)
    trainer.config = config
    prepared = prepare(config)
    assert prepared is not None
    return trainer, Reweighting(*prepared)


def fastest(work: Any) -> float:
    """Seconds, of three."""
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


def measure(tokens: int) -> dict[str, Any]:
    import transfer_queue as tq

    meta, total = put(tokens)
    trainer, method = trainer_and_method()
    own = fastest(lambda: trainer._compute_advantage(meta, {}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ours = fastest(lambda: method.rewrite(meta, {}))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    where = {"keys": meta.keys, "partition_id": meta.partition_id}
    data = tq.kv_batch_get(**where)
    alone = fastest(lambda: method.rewritten(data, meta.keys, [False] * len(meta)))
    tq.kv_clear(**where)
    return {
        "tokens": total,
        "responses": len(meta),
        "verls_advantages_seconds": own,
        "added_seconds": ours,
        "without_transfer_seconds": alone,
        "added_peak_mib": (peak - before) / 1024,
        # H and T of every token in; mask, rewards, log-probs and advantages of the response in, advantages out.
        "added_bytes": 8 * (total + PROMPT * len(meta)) + (8 + 3 * 4 + 4) * total,
    }


def table(results: list[dict[str, Any]]) -> str:
    head = ["tokens a rollout", "responses", "verl's own advantages, s", "added, s", "of it the method, s", "added, µs a token", "traffic, MB", "more memory than verl's own, MiB"]  # fmt: skip  # noqa: E501
    return markdown(
        head,
        [
            [
                f"{r['tokens']:,}",
                f"{r['responses']:,}",
                f"{r['verls_advantages_seconds']:.2f}",
                f"{r['added_seconds']:.2f}",
                f"{r['without_transfer_seconds']:.2f}",
                f"{1e6 * r['added_seconds'] / r['tokens']:.2f}",
                f"{r['added_bytes'] / 1e6:.0f}",
                f"{r['added_peak_mib']:.0f}",
            ]
            for r in results
        ],
    )


def main() -> None:
    import ray
    import transfer_queue as tq
    from omegaconf import OmegaConf

    from entropy_polarity.record import environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    storage = {"total_storage_size": 100_000, "num_data_storage_units": 1}
    tq.init(OmegaConf.create({"backend": {"storage_backend": "SimpleStorage", "SimpleStorage": storage}}))
    results = [measure(tokens) for tokens in sorted(arguments.tokens)]
    tq.close()
    ray.shutdown()
    document = {"benchmark": "verl_driver", "environment": environment(0), "results": results}
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
