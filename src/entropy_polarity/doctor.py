"""`papo doctor`: which kernels run here and why, whether they are right, and whether everything hooked is as tested."""

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
from packaging.version import Version

from entropy_polarity.kernels import choose, linear_token_stats, token_stats
from entropy_polarity.kernels.engine import VARIABLE, why_not_triton
from entropy_polarity.kernels.reference import reference_token_stats

OLDEST = {
    "entropy-polarity": "0",
    "torch": "2.10",
    "transformers": "5.20",
    "trl": "1.16",
    "triton": "3.6",
    "peft": "0.17",
}
OPTIONAL = ("triton", "peft")
# The scale of DESIGN's accuracy, with room for the vocabulary of the check below.
TOLERANCE = 1e-5


class Finding(NamedTuple):
    """One line of the doctor's: what was looked at, "ok", "note" or "problem", and what was found, in words."""

    part: str
    status: str
    detail: str


def examine() -> list[Finding]:
    """Everything that can be found out without training. A "problem" is what will not work."""
    return [*_versions(), *_kernels(), *_compilers(), *_trl()]


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _versions() -> Iterator[Finding]:
    yield Finding("python", "ok", platform.python_version())
    for package, oldest in OLDEST.items():
        found = _installed(package)
        if found is None:
            status = "note" if package in OPTIONAL else "problem"
            yield Finding(package, status, f"not installed: pip install {package}")
        elif Version(found) < Version(oldest):
            yield Finding(package, "problem", f"{found} is older than {oldest}, the oldest that is supported")
        else:
            yield Finding(package, "ok", found)


def _devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def _kernels() -> Iterator[Finding]:
    forced = os.environ.get(VARIABLE)
    yield Finding(VARIABLE, "note" if forced else "ok", f"{forced!r} forces a kernel" if forced else "not set")
    for device in _devices():
        name = "cpu" if device.type == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})"
        for dtype in (torch.float32, torch.bfloat16):
            part = f"statistics on {name}, {str(dtype).removeprefix('torch.')}"
            try:
                choice = choose(device, dtype)
                error = _error(device, dtype)
            except Exception as failure:  # whatever a driver, a compiler or a forced choice raises
                yield Finding(part, "problem", f"{type(failure).__name__}: {str(failure).splitlines()[0]}")
                continue
            right = error <= TOLERANCE
            said = f"{choice.name}: {choice.why}; off by {error:.0e} from float64"
            yield Finding(part, "ok" if right else "problem", said if right else f"{said}, {TOLERANCE:.0e} allowed")


def _error(device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference between the statistics of a few states, and of a head, and their definitions."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator, dtype=torch.float64) for n in (8, 5000))
    tokens = torch.randint(5000, (8,), generator=generator)
    logits = (hidden @ weight.T).to(dtype)
    logits[0, :2500] = -torch.inf
    expected = torch.stack(reference_token_stats(logits, tokens))
    ours = torch.stack(token_stats(logits.to(device), tokens.to(device), check=False)).cpu()
    short = hidden.to(dtype).to(device), weight.to(dtype).to(device)
    head = linear_token_stats(*short, tokens.to(device), logits_dtype=torch.float32, check=False)
    of_head = torch.stack(reference_token_stats(short[0].cpu().double() @ short[1].cpu().double().T, tokens))
    finite = expected.isfinite()
    pairs = ((ours[finite], expected[finite]), (torch.stack(head).cpu(), of_head))
    return max(float(((a - b).abs() / b.abs().clamp(min=1)).max()) for a, b in pairs)


def _compilers() -> Iterator[Finding]:
    found = next((name for name in (os.environ.get("CXX"), "g++", "clang++") if name and shutil.which(name)), None)
    yield Finding(
        f"{VARIABLE}=compiled",
        "ok" if found else "note",
        f"can be had: {found}" if found else "no C++ compiler (g++) was found, torch.compile needs one on a CPU",
    )
    reason = why_not_triton(torch.device("cuda"), torch.float32)
    if reason is None and not torch.cuda.is_available():
        reason = "no CUDA device"
    yield Finding(f"{VARIABLE}=triton", "ok" if reason is None else "note", reason or "can be had")


def _trl() -> Iterator[Finding]:
    try:
        from entropy_polarity.trainers.trl_seam import HEADS, TESTED_TRL, seams
    except ImportError as error:
        yield Finding("PolarityTrainer", "problem", str(error))
        return
    yield Finding("PolarityTrainer", "ok", f"TRL is one of those tested, {TESTED_TRL[0]} to below {TESTED_TRL[1]}")
    for name, missing in seams().items():
        detail = f"no parameter {', '.join(sorted(missing))}" if missing else "hooked, and as tested"
        yield Finding(name, "problem" if missing else "ok", detail)
    yield Finding("output head", "ok", f"statistics_head: {' (default) or '.join(HEADS)}")
