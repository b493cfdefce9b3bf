"""`papo doctor`: which kernels run here and why, whether they are right, and whether everything hooked is as tested."""

import os
import platform
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points
from typing import NamedTuple

import torch
from packaging.version import Version
from torch import Tensor

from entropy_polarity.kernels import choose, linear_token_loss, linear_token_stats, token_stats
from entropy_polarity.kernels.dispatch import VARIABLE, why_not_triton
from entropy_polarity.kernels.reference import reference_token_stats
from entropy_polarity.support.provenance import installed_version
from entropy_polarity.tasks import boundary

OLDEST = {"entropy-polarity": "0", "torch": "2.10", "triton": "3.6", "peft": "0.17"}
OPTIONAL = ("triton", "peft")
# The frameworks, and what each needs of what the other needs otherwise.
FRAMEWORKS = {"trl": {"trl": "1.16", "transformers": "5.20"}, "verl": {"verl": "0.9", "TransferQueue": "0.1.10"}}
PLUGIN = "entropy_polarity.trainers.verl"
TOLERANCE = 1e-5  # of statistics and float32 gradients, against float64
_AS_TESTED = "hooked, and as tested"


class Finding(NamedTuple):
    """One finding of the doctor: the part, its status ("ok", "note" or "problem"), and the details in words."""

    part: str
    status: str
    detail: str


def _checked(part: str, fault: str | None, fine: str) -> Finding:
    return Finding(part, "problem" if fault else "ok", fault or fine)


def examine() -> list[Finding]:
    """Everything that can be found out without training. A "problem" is what will not work."""
    frameworks = [name for name in FRAMEWORKS if installed_version(name)]
    return [*_versions(frameworks), *_kernels(), *_triton(), *_trl(frameworks), *_verl(frameworks), *_tool_python()]


def _versions(frameworks: list[str]) -> Iterator[Finding]:
    yield Finding("python", "ok", platform.python_version())
    wanted = OLDEST | {package: oldest for name in frameworks for package, oldest in FRAMEWORKS[name].items()}
    for package, oldest in wanted.items():
        found = installed_version(package)
        if found is None:
            status = "note" if package in OPTIONAL else "problem"
            yield Finding(package, status, f"not installed: pip install {package}")
        elif Version(found) < Version(oldest):
            yield Finding(package, "problem", f"{found} is older than {oldest}, the oldest that is supported")
        else:
            yield Finding(package, "ok", found)
    installs = {name: f"pip install 'entropy-polarity[{name}]'" for name in FRAMEWORKS if name not in frameworks}
    if not frameworks:
        said = f"neither TRL nor verl is installed: {' or '.join(installs.values())}"
        yield Finding("a framework to train with", "problem", said)
        return
    for name, install in installs.items():
        own = f"{install} in an environment of its own, with another transformers"
        yield Finding(name, "note", f"not installed, and not needed beside {frameworks[0]}: {own}")


def _kernels() -> Iterator[Finding]:
    forced = os.environ.get(VARIABLE)
    yield Finding(VARIABLE, "note" if forced else "ok", f"{forced!r} forces a kernel" if forced else "not set")
    for device in (torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))):
        name = "cpu" if device.type == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})"
        for dtype in (torch.float32, torch.bfloat16):
            part = f"statistics on {name}, {str(dtype).removeprefix('torch.')}"
            try:
                choice = choose(device, dtype)
                error = _error(device, dtype)
            except Exception as failure:  # whatever a driver, a compiler or a forced choice raises
                yield Finding(part, "problem", f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}")
                continue
            said = f"{choice.name}: {choice.why}; {error:.0%} of the error that is allowed, with gradients"
            yield Finding(part, "ok" if error <= 1 else "problem", said)


def _error(device: torch.device, dtype: torch.dtype) -> float:
    """How far statistics and gradients of a few states are from their definitions, in parts of what is allowed, which
    is TOLERANCE, and for gradients of 16-bit products their last digit. NaN counts as far."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator).to(dtype) for n in (8, 5000))
    tokens = torch.randint(5000, (8,), generator=generator)
    logits = hidden @ weight.T
    logits[0, :2500] = -torch.inf
    tokens[0] = 4000
    gradient = TOLERANCE if dtype == torch.float32 else 4 * torch.finfo(dtype).eps

    def difference(ours: Tensor, expected: Tensor, allowed: float) -> Tensor:
        far = (ours.detach().cpu().double() - expected).abs() / expected.abs().amax(-1, keepdim=True).clamp(min=1)
        return far.max() / allowed

    def leaf(x: Tensor, double: bool = False) -> Tensor:
        return (x.double() if double else x.to(device)).clone().requires_grad_()

    z, h, w = leaf(logits, True), leaf(hidden, True), leaf(weight, True)
    of_logits, of_head = reference_token_stats(z, tokens), reference_token_stats(h @ w.T, tokens)
    (of_logits.logp.sum() + of_head.logp.sum()).backward()
    ids = tokens.to(device)
    far = []

    direct = leaf(logits)
    stats = token_stats(direct, ids, check=False)
    stats.logp.sum().backward()
    far += [difference(torch.stack(stats), torch.stack(of_logits).detach(), TOLERANCE)]
    far += [difference(direct.grad, z.grad, gradient)]  # pyright: ignore[reportArgumentType]
    for trained in (True, False):  # a head that is trained, a frozen one, and gradients in the forward
        for in_forward in (False, True):
            states, head = leaf(hidden), leaf(weight).requires_grad_(trained)
            if in_forward:
                total, stats = linear_token_loss(states, head, ids, lambda s, rows: s.logp.sum(), check=False)
            else:
                stats = linear_token_stats(states, head, ids, logits_dtype=torch.float32, check=False)
                total = stats.logp.sum()
                far += [difference(torch.stack(stats), torch.stack(of_head).detach(), TOLERANCE)]
            total.backward()
            far += [difference(states.grad, h.grad, gradient)]  # pyright: ignore[reportArgumentType]
            far += [difference(head.grad, w.grad, gradient)] if head.grad is not None else []  # pyright: ignore
    return float(torch.stack(far).max())


def _triton() -> Iterator[Finding]:
    reason = why_not_triton(torch.device("cuda"), torch.float32)
    if reason is None and not torch.cuda.is_available():
        reason = "no CUDA device"
    yield Finding(f"{VARIABLE}=triton", "ok" if reason is None else "note", reason or "available")


def _trl(frameworks: list[str]) -> Iterator[Finding]:
    if "trl" not in frameworks:
        return
    try:
        from entropy_polarity.trainers.trl.head import HEADS, TESTED_TRL, seams
    except ImportError as error:
        yield Finding("PolarityTrainer", "problem", str(error))
        return
    yield Finding("PolarityTrainer", "ok", f"TRL {'.'.join(map(str, TESTED_TRL))}, the version that was tested")
    for name, missing in seams().items():
        yield _checked(name, f"no parameter {', '.join(sorted(missing))}" if missing else None, _AS_TESTED)
    yield Finding("output head", "ok", f"statistics_head: {' (default) or '.join(HEADS)}")


def _verl(frameworks: list[str]) -> Iterator[Finding]:
    if "verl" not in frameworks:
        return
    from entropy_polarity.trainers.verl.hooks import HOOKS, fault_of, untested_version

    reason = untested_version()
    yield _checked("verl's plug-in", reason, "this verl is one of those tested")
    yield _checked("how verl loads it", _why_verl_leaves_it_out(), "by itself, in every process")
    for hook in HOOKS if reason is None else ():
        try:
            module = import_module(hook.module)
        except Exception as failure:  # whatever a missing engine or driver raises
            status = "note" if hook.optional else "problem"
            yield Finding(hook.target, status, f"{hook.module} cannot be imported: {type(failure).__name__}: {failure}")
            continue
        yield _checked(hook.target, fault_of(hook, module), _AS_TESTED)


def _why_verl_leaves_it_out() -> str | None:
    """Why verl would not load the plug-in in a process that starts with this environment, or None."""
    if PLUGIN in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(","):
        return None
    names = [entry.name for entry in entry_points(group="verl.plugins") if entry.value == PLUGIN]
    if not names:
        return f"its entry point is not installed: pip install it anew, or set VERL_USE_EXTERNAL_MODULES={PLUGIN}"
    allowed = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").strip().lower()
    if allowed == "auto" or names[0] in {name.strip() for name in allowed.split(",")}:
        return None
    return f"VERL_USE_EXTERNAL_PLUGINS={allowed} leaves {names[0]!r} out"


def _tool_python() -> Iterator[Finding]:
    """Whether what a model writes can be run behind a boundary of the operating system's."""
    parts, lacking = boundary.examine()
    if lacking:
        yield Finding("tool python", "note", f"no boundary: {lacking}: {boundary.INSTALL}")
    else:
        yield Finding("tool python", "ok", f"runs inside a boundary of {', '.join(parts)}; graders only read")
