"""What a process of Megatron's does in a test. A new process imports this module."""

from types import SimpleNamespace

import torch
import torch.distributed as dist

LENGTHS, VOCABULARY = (5, 2, 7), 50


def output(dtype=torch.float32, temperature=0.7, padding=0):
    """(logits, ids, what verl's method is given) for packed rows; `padding` more states at the end."""
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS) + padding
    logits = (4 * torch.randn(total, VOCABULARY, generator=generator)).to(dtype)
    tokens = torch.randint(VOCABULARY, (total,), generator=generator)
    arguments = {
        "input_ids_rmpad_rolled": tokens, "temperature_rmpad": torch.full((total,), temperature), "pad_size": padding,
        "temperature": torch.full((len(LENGTHS),), temperature),
    }  # fmt: skip
    return logits, tokens, arguments


def megatron_part(rank: int, port: int, folder: str) -> None:
    """One of two tensor-parallel processes, with half of the vocabulary."""
    from megatron.core import parallel_state
    from verl.utils import tensordict_utils as tu
    from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    parallel_state._TENSOR_MODEL_PARALLEL_GROUP = dist.group.WORLD
    logits, tokens, _ = output()
    half = VOCABULARY // 2
    mine = logits[None, :, rank * half : (rank + 1) * half].contiguous()
    temperature = torch.full((1, len(tokens)), 0.7)
    temperature[0, -1] = 0  # padding
    made = object.__new__(MegatronEngineWithLMHead)
    made.engine_config = SimpleNamespace(entropy_from_logits_with_chunking=False)
    results = {}
    for asked in (True, False):
        batch = tu.get_tensordict({"x": torch.zeros(1)}, {"polarity_statistics": asked, "temperature": 0.7})
        results[asked] = MegatronEngineWithLMHead._lm_head_logits_processor(
            made, mine.clone(), tokens[None], temperature.clone(), calculate_sum_pi_squared=True,
            calculate_entropy=True, distillation_use_topk=False, distillation_only=True, logits_processor_func=None,
            batch=batch, data_format="thd",
        )  # fmt: skip
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
