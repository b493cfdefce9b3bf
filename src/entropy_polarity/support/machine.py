"""The machine a process runs on: cores that are idle, and memory that is kept from one pass to the next."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

THREADS = 8  # the work is bound by memory, not by arithmetic: more would gain little

# Of glibc's mallopt(3). After stands what its own adjustment comes to at most, as tensors of up to 32 MB are freed.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_WITHIN = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}
_AFTER = {_MMAP_MAX: 65536, _TRIM_THRESHOLD: 64 << 20, _MMAP_THRESHOLD: 32 << 20}
# Who sets one of these has a policy of their own, be it to switch ours off.
_OVERRULING = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


@contextmanager
def idle_cores() -> Iterator[None]:
    """For verl's driver: Ray gives it one thread, but while everything waits for it, its node's cores are free."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, min(THREADS, os.cpu_count() or 1)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def kept_memory() -> Iterator[None]:
    """What the main thread frees stays with the process until the end, and then goes back.

    glibc maps every tensor of more than 32 MB anew, and each time the system has to clear its pages. The price is
    memory in pieces that fit nothing; benchmarks/kept_memory.py has both. Does not nest. Nothing is changed where the
    allocator is another, or has its settings from the environment.
    """
    libc = ctypes.CDLL(None)
    is_glibc = hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")
    if not is_glibc or any(name in os.environ for name in _OVERRULING):
        yield
        return
    for option, value in _WITHIN.items():
        libc.mallopt(option, value)
    try:
        yield
    finally:
        for option, value in _AFTER.items():
            libc.mallopt(option, value)
        libc.malloc_trim(0)
