"""The machine a process runs on: cores that are idle, and memory that is kept from one pass to the next."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

THREADS = 8  # the work is bound by memory, not by arithmetic: more would gain little

# Of glibc's mallopt(3). The values after are where its own adjustment ends once a large tensor was freed.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_WITHIN = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}
_AFTER = {_MMAP_MAX: 65536, _TRIM_THRESHOLD: 64 << 20, _MMAP_THRESHOLD: 32 << 20}


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
    """Freed memory stays with the process until the end, and then goes back.

    glibc maps every tensor of more than 32 MB anew, and each time the system clears its pages: a third of the time of a
    training step on a CPU, and more than the arithmetic of a pass over 10^7 tokens. The price is memory in pieces that
    fit nothing (benchmarks/kept_memory.py). Where the allocator is another, nothing is changed.
    """
    libc = ctypes.CDLL(None)
    if not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
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
