"""The driver's work in verl at up to 10^7 tokens a rollout: a synthetic batch through Ray and TransferQueue.

    make verl-test   # makes the environment
    .venv-verl/bin/python benchmarks/verl_driver.py --output benchmarks/results/verl_driver.json

Timed is the driver's step for advantages as verl makes it, with its own GRPO, and with the plug-in, which reads two
more columns and runs the method before the advantages are written; both in turns, and the added time is the difference
in each round: its median and range. The memory is the peak of the driver's process in the step with the plug-in, less
that without; the storage is one process beside it.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from blocks import markdown

LENGTH, PROMPT, GROUP = 2000, 200, 16  # mean tokens of a response, of a prompt; responses of a prompt
ROUNDS = 5
LENGTHS = {
    "even": lambda rows, generator: torch.randint(LENGTH // 2, LENGTH * 3 // 2, (rows,), generator=generator),
    "long-tailed": lambda rows, generator: 1 + torch.empty(rows).exponential_(1 / LENGTH, generator=generator).long(),
}


def put(tokens: int, spread: str) -> tuple[Any, int, int]:
    """A batch of about so many response tokens in TransferQueue: (its keys and tags, the exact number, the longest)."""
    import numpy as np
    import transfer_queue as tq
    from verl.utils import tensordict_utils as tu

    rows = max(GROUP, tokens // LENGTH // GROUP * GROUP)
    generator = torch.Generator().manual_seed(0)
    lengths = LENGTHS[spread](rows, generator)
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
    tags = [{"response_len": n, "seq_len": n + PROMPT} for n in lengths.tolist()]
    meta = tq.kv_batch_put(keys=keys, partition_id=f"of-{rows}", fields=tu.get_tensordict(columns), tags=tags)
    return meta, total, int(lengths.max())


def trainer_and_method() -> tuple[Any, Any]:
    """verl's own trainer without its workers, hooked, and the plug-in's part, not put in yet."""
    from omegaconf import OmegaConf
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    from entropy_polarity.trainers.verl import activate
    from entropy_polarity.trainers.verl.config import prepare
    from entropy_polarity.trainers.verl.driver import Reweighting

    config = OmegaConf.create(
        {
            "papo": {"method": "papo", "controller": "thermostat", "level": 0.3, "conserve": True},
            "trainer": {"critic_warmup": 0},
            "algorithm": {
                "use_kl_in_reward": False, "adv_estimator": "grpo", "gamma": 1.0, "lam": 1.0,
                "norm_adv_by_std_in_grpo": True,
            },
            "actor_rollout_ref": {"rollout": {"n": GROUP}, "model": {}, "actor": {"strategy": "fsdp"}},
        }
    )  # fmt: skip
    activate()
    trainer = object.__new__(PPOTrainerSync)
    trainer.config, trainer.global_steps = config, 1
    prepared = prepare(config)
    assert prepared is not None
    return trainer, Reweighting(*prepared)


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_mib(work: Callable[[], Any]) -> float:
    """The most memory that the process had while at work: the kernel's mark is set back before."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    work()
    (mark,) = (
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM")
    )
    return int(mark.split()[1]) / 1024


def measure(tokens: int, spread: str) -> dict[str, Any]:
    import transfer_queue as tq

    meta, total, longest = put(tokens, spread)
    trainer, method = trainer_and_method()

    def step(part: Any) -> float:
        trainer._polarity = part
        return seconds(lambda: trainer._compute_advantage(meta, {}))

    for part in (None, method):
        step(part)  # what is loaded at first
    without, peak = (peak_mib(lambda part=part: step(part)) for part in (None, method))
    of_the_method: list[float] = []
    rewritten = method.rewritten

    def timed(*columns: Any) -> Any:
        start = time.perf_counter()
        made = rewritten(*columns)
        of_the_method.append(time.perf_counter() - start)
        return made

    method.rewritten = timed
    rounds = [(step(None), step(method)) for _ in range(ROUNDS)]
    own, both = (statistics.median(times) for times in zip(*rounds, strict=True))
    tq.kv_clear(keys=meta.keys, partition_id=meta.partition_id)
    return {
        "tokens": total,
        "responses": len(meta),
        "lengths": spread,
        "longest": longest,
        "verls_advantages_seconds": own,
        "with_the_plugin_seconds": both,
        "added_seconds": sorted(hooked - plain for plain, hooked in rounds),
        "method_seconds": statistics.median(of_the_method),
        "added_peak_mib": peak - without,
        "added_bytes": 8 * (total + PROMPT * len(meta)),  # H and T of every token; the advantages are verl's to write
    }


def added(result: dict[str, Any]) -> float:
    return statistics.median(result["added_seconds"])


def table(results: list[dict[str, Any]]) -> str:
    head = ["tokens a rollout", "responses, longest", "verl's own advantages, s", "added, s", "of it the method, s", "added, µs a token", "traffic, MB", "more memory than verl's own, MiB"]  # fmt: skip  # noqa: E501
    return markdown(
        head,
        [
            [
                f"{r['tokens']:,}",
                f"{r['responses']:,}, {r['longest']:,}",
                f"{r['verls_advantages_seconds']:.2f}",
                "{:.2f} ({:.2f} to {:.2f})".format(added(r), *(r["added_seconds"][i] for i in (0, -1))),
                f"{r['method_seconds']:.2f}",
                f"{1e6 * added(r) / r['tokens']:.2f}",
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

    from entropy_polarity.support.provenance import environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    storage = {"total_storage_size": 100_000, "num_data_storage_units": 1}
    tq.init(OmegaConf.create({"backend": {"storage_backend": "SimpleStorage", "SimpleStorage": storage}}))
    results = [measure(tokens, spread) for spread in LENGTHS for tokens in sorted(arguments.tokens)]
    tq.close()
    ray.shutdown()
    where = environment(0) | {"command": "see the top of benchmarks/verl_driver.py"}
    document = {"benchmark": "verl_driver", "environment": where, "results": results}
    arguments.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
