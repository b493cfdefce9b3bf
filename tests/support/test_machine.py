"""What a process does with its machine."""

import ctypes
import resource
from pathlib import Path

import pytest
import torch

from entropy_polarity.support import machine
from entropy_polarity.support.machine import kept_memory

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the allocator is not glibc's")


@pytest.fixture
def untold(monkeypatch):
    for name in machine._OVERRULING:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def pages_of_passes() -> int:
    """Pages that the system cleared for twenty large tensors, one after the other."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize() / 2**20


def test_memory_is_kept_between_passes_and_then_given_back(untold):
    outside, at_rest = pages_of_passes(), resident_mib()
    with kept_memory():
        pages_of_passes()
        assert pages_of_passes() < outside / 10
    assert resident_mib() < at_rest + 32


def test_who_told_the_allocator_what_to_do_is_not_overruled(untold):
    asked = []
    untold.setattr(machine.ctypes, "CDLL", lambda _: type("Libc", (), {
        "mallopt": lambda self, *option: asked.append(option), "malloc_trim": lambda self, pad: asked.append(pad),
    })())  # fmt: skip
    with kept_memory():
        assert asked
    asked.clear()
    untold.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    with kept_memory():
        pass
    assert not asked
