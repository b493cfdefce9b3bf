"""What a process does with its machine."""

import ctypes
from pathlib import Path

import pytest
import torch

from entropy_polarity._machine import kept_memory

resource = pytest.importorskip("resource", reason="not on this system")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the allocator is not glibc's")
def test_memory_is_kept_between_passes_and_then_given_back():
    def pages() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    def passes() -> int:
        before = pages()
        for _ in range(20):
            torch.ones(2**24)  # 64 MiB
        return pages() - before

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

    outside, at_rest = passes(), resident()
    with kept_memory():
        passes()
        assert passes() < outside / 10
    assert resident() < at_rest + 32
