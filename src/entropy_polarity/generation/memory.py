"""How many completions fit in memory at a time: an estimate to start from, halved where memory runs out."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
Made = TypeVar("Made")
SHARE = 0.5  # of the free memory that the estimate may fill: a cache that grows is copied, and memory is in pieces
_SIGNS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def in_batches(
    items: Sequence[Item], size: int, run: Callable[[Sequence[Item]], list[Made]]
) -> tuple[list[Made], list[int]]:
    """What `run` makes of consecutive batches of `items`, and the batch sizes: `size`, halved when memory runs out.

    A batch that ran out of memory is made again, half of it, from the random state that it had begun with: the result
    is a function of the random state and the sizes. Raises ValueError where a single item does not fit.
    """
    made: list[Made] = []
    sizes = [size]
    while len(made) < len(items):
        state, states_of_gpus = torch.get_rng_state(), torch.cuda.get_rng_state_all()
        try:
            made += run(items[len(made) : len(made) + sizes[-1]])
            continue
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if sizes[-1] == 1:
                raise ValueError(
                    "out of memory with a batch of one: a smaller model, fewer tokens per completion or more memory"
                ) from error
        # Outside the except clause: its traceback holds on to the tensors.
        sizes.append(sizes[-1] // 2)
        torch.set_rng_state(state)
        torch.cuda.set_rng_state_all(states_of_gpus)
        torch.cuda.empty_cache()
    return made, sizes


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that a device, or the machine, has no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def first_size(model: Any, tokens: int, largest: int, logit_rows: int = 1) -> int:
    """The power-of-two share of `largest` whose sequences of `tokens` tokens fit in the free memory by estimate.

        bytes per sequence = 2 L K d b · tokens      keys and values: L layers, K heads of d, b bytes per number
                         + 16 V · logit_rows       float32 logits over a vocabulary of V, a few copies

    It is `largest` where the model does not say its shape, or the system not its memory.
    """
    free, config = free_bytes(getattr(model, "device", torch.device("cpu"))), getattr(model, "config", None)
    if free is None or config is None:
        return largest
    needed = bytes_per_sequence(config, tokens, getattr(model, "dtype", torch.float32).itemsize, logit_rows)
    while largest > 1 and largest * needed > SHARE * free:
        largest //= 2
    return largest


def bytes_per_sequence(config: Any, tokens: int, itemsize: int, logit_rows: int = 1) -> int:
    """The estimate of `first_size`; what a configuration does not say counts nothing."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or (getattr(config, "hidden_size", None) or 0) // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    cache = 2 * (getattr(config, "num_hidden_layers", None) or 0) * kept * width * itemsize
    return cache * tokens + 16 * (getattr(config, "vocab_size", None) or 0) * logit_rows


def free_bytes(device: torch.device) -> int | None:
    """The free memory of a device, with the freed blocks that PyTorch keeps; None where the system does not tell."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.is_file():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="utf-8").splitlines() if ":" in line)
    return int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None
