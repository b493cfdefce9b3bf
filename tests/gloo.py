"""A few processes that talk over gloo. What they run stands in a module that a new process can import."""

import socket
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def spawned(function: Callable[..., None], ranks: int, *arguments: object) -> None:
    """Run `function(rank, port, *arguments)` in `ranks` processes; raises what one of them raised."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(function, (port, *arguments), nprocs=ranks)


def vocabulary_part(rank: int, port: int, ranks: int, folder: str) -> None:
    """One of several processes, each with its columns of the same logits; writes the statistics it has."""
    from entropy_polarity.kernels.sharded import sharded_token_stats

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    case = torch.load(f"{folder}/case.pt", weights_only=True)
    mine = case["logits"].chunk(ranks, dim=-1)[rank].contiguous()
    stats = sharded_token_stats(mine, case["tokens"], dist.group.WORLD, temperature=case["temperature"])  # type: ignore
    torch.save(stats._asdict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
