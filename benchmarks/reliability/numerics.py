"""The statistics and gradients of the kernels against 80-bit floats, on many thousands of rows of every kind.

    OMP_NUM_THREADS=1 python benchmarks/reliability/numerics.py

Random, confident, tied and uniform rows, masked vocabularies, temperatures from 1e-30 to 1e30, soft caps, 16-bit and
float64 logits, ids of every integer type; from logits, and from hidden states in all three ways back with tiles of
several sizes. A check is one statistic of one row, or the whole gradient of one row: right within 1e-5 of its natural
scale (1e-11 in float64, a step of the type for 16-bit gradients; `tests/oracle.py` has the scales). At least 255,000
checks, under a minute on one core. Writes benchmarks/results/reliability-numerics.json.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from entropy_polarity.experiments.results import write_document
from entropy_polarity.kernels import linear_token_loss, linear_token_stats, token_stats
from entropy_polarity.support.provenance import environment
from entropy_polarity.tokens import TokenStats

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from oracle import ABSOLUTE, Exact  # noqa: E402

inf = float("inf")
ROWS, COLUMNS = 96, 200
KINDS = {
    "random": lambda: torch.randn(ROWS, COLUMNS) * 10 ** (3 * torch.rand(ROWS, 1) - 1),
    "confident": lambda: with_gap(torch.randn(ROWS, COLUMNS) * 3, 5 + 95 * torch.rand(ROWS)),
    "nearly tied": lambda: with_gap(torch.randn(ROWS, COLUMNS), 2.0 ** -torch.randint(1, 20, (ROWS,))),
    "tied": lambda: (torch.randn(ROWS, COLUMNS) * 2).round(),
    "uniform": lambda: torch.randn(ROWS, 1).expand(ROWS, COLUMNS).contiguous(),
    "far from zero": lambda: torch.randn(ROWS, COLUMNS) * 3 + 1e4 * torch.randn(ROWS, 1),
}


class Case(NamedTuple):
    """Rows, the settings of the head they go through, and the way; `strict`: distances of less than a nat keep their
    digits under a cap too."""

    logits: Tensor
    tokens: Tensor
    way: str = "logits"
    settings: Mapping[str, Any] = MappingProxyType({})
    tile_bytes: int | None = None
    strict: bool = True
    tolerance: float | None = None
    rounding: torch.dtype | None = None  # of the gradient, to 16 bits


def with_gap(z: Tensor, gap: Tensor) -> Tensor:
    top = torch.randint(z.shape[1], (len(z),))
    z[torch.arange(len(z)), top] = z.amax(-1) + gap
    return z


def sampled(z: Tensor) -> Tensor:
    """A third of the rows the mode, a third the second best, a third any token."""
    best = z.topk(2).indices
    any_token = torch.randint(z.shape[1], (len(z),))
    return torch.stack([best[:, 0], best[:, 1], any_token])[torch.arange(len(z)) % 3, torch.arange(len(z))]


# Parts: each an endless stream of cases


def rows() -> Iterator[Case]:
    while True:
        for make in KINDS.values():
            z = make()
            yield Case(z, sampled(z), settings={"temperature": [0.3, 1.0, 2.5][int(torch.randint(3, ()))]})


def masked_vocabularies() -> Iterator[Case]:
    """All but a few tokens may be out, the sampled one too."""
    while True:
        z = KINDS["random"]()
        z[torch.rand(ROWS, COLUMNS) < torch.rand(ROWS, 1)] = -inf
        z[:, 0] = torch.randn(ROWS)
        yield Case(z, sampled(z))


def temperatures() -> Iterator[Case]:
    while True:
        for temperature in (1e-30, 1e-6, 1e-3, 1e3, 1e30):
            z = KINDS["random"]()
            yield Case(z, sampled(z), settings={"temperature": temperature})


def heads(cap: bool) -> Iterator[Case]:
    """From hidden states, in the three ways back, with and without a soft cap."""
    while True:
        for way in ("recompute", "frozen", "callback"):
            for kind, make in KINDS.items():
                if kind == "far from zero":
                    continue
                tile_bytes = [2**12, 2**16, None][int(torch.randint(3, ()))]
                settings: dict[str, Any] = {"temperature": [0.5, 1.0][int(torch.randint(2, ()))]}
                if cap:
                    settings["softcap"] = [5.0, 30.0, 50.0][int(torch.randint(3, ()))]
                z = make()
                yield Case(z, sampled(z), way, settings, tile_bytes, strict=not cap)


def confident_under_a_cap() -> Iterator[Case]:
    while True:
        for way in ("recompute", "frozen", "callback"):
            z = with_gap(torch.randn(ROWS, COLUMNS) * 3, 8 + 52 * torch.rand(ROWS))
            tile_bytes = [2**12, 2**16, None][int(torch.randint(3, ()))]
            yield Case(z, z.argmax(-1), way, {"softcap": 30.0}, tile_bytes)


def short_floats() -> Iterator[Case]:
    while True:
        for dtype in (torch.bfloat16, torch.float16):
            z = KINDS["random"]().clamp(-6e4, 6e4).to(dtype)
            yield Case(z, sampled(z.float()), rounding=dtype)
            z = with_gap(torch.randn(ROWS, COLUMNS) * 3, 5 + 30 * torch.rand(ROWS)).to(dtype)
            yield Case(z, z.float().argmax(-1), rounding=dtype)


def long_floats() -> Iterator[Case]:
    while True:
        for way in ("logits", "recompute", "frozen", "callback"):
            for kind in ("random", "confident", "nearly tied"):
                z = KINDS[kind]().double() + torch.rand(ROWS, COLUMNS).double() * 1e-9
                settings = {} if way == "logits" else {"softcap": 30.0}
                yield Case(z, sampled(z), way, settings, strict=way == "logits", tolerance=1e-11)


def integer_types() -> Iterator[Case]:
    while True:
        for name in ("uint8", "int16", "int32", "uint16", "uint32", "uint64"):
            z = KINDS["random"]()
            yield Case(z, sampled(z).to(getattr(torch, name)))


PARTS: dict[str, tuple[Callable[[], Iterator[Case]], int]] = {
    "rows of every kind, from logits": (rows, 72),
    "masked vocabularies": (masked_vocabularies, 36),
    "temperatures of 1e-30 to 1e30": (temperatures, 40),
    "rows of every kind, from hidden states": (lambda: heads(cap=False), 45),
    "rows of every kind under soft caps": (lambda: heads(cap=True), 60),
    "confident rows under a soft cap of 30": (confident_under_a_cap, 48),
    "bfloat16 and float16 logits": (short_floats, 24),
    "float64": (long_floats, 24),
    "ids of every integer type": (integer_types, 12),
}


# What is right


def statistics_and_gradient(case: Case, on_logp: Tensor, on_entropy: Tensor) -> tuple[TokenStats, Tensor, bool]:
    """Statistics, and the gradient along the logits, or (True) along the hidden states eye(N) of a frozen head."""
    if case.way == "logits":
        z = case.logits.clone().requires_grad_()
        stats = token_stats(z, case.tokens, entropy_grad=True, **case.settings)
        (on_logp * stats.logp + on_entropy * stats.entropy).sum().backward()
        return stats, z.grad, False  # pyright: ignore[reportReturnType]
    hidden = torch.eye(len(case.logits), dtype=case.logits.dtype, requires_grad=True)
    weight = case.logits.t().contiguous().requires_grad_(case.way != "frozen")
    if case.way == "callback":
        total, stats = linear_token_loss(
            hidden,
            weight,
            case.tokens,
            lambda s, part: (on_logp[part] * s.logp + on_entropy[part] * s.entropy).sum(),
            chunk_bytes=case.tile_bytes,
            **case.settings,
        )
    else:
        grown = case.way == "recompute"
        stats = linear_token_stats(
            hidden, weight, case.tokens, entropy_grad=grown, tile_bytes=case.tile_bytes, **case.settings
        )
        total = (on_logp * stats.logp + (on_entropy * stats.entropy if grown else 0)).sum()
    total.backward()
    if case.way == "frozen":
        return stats, hidden.grad, True  # pyright: ignore[reportReturnType]
    return stats, weight.grad.t(), False  # pyright: ignore[reportOptionalMemberAccess]


def checked(case: Case) -> dict[str, np.ndarray]:
    """Of each statistic, and of the gradient, on which rows it is right."""
    dtype = torch.float64 if case.logits.dtype == torch.float64 else torch.float32
    on_logp, on_entropy = torch.randn(2, len(case.logits), dtype=dtype)
    if case.way == "frozen":
        on_entropy.zero_()
    stats, found, of_hidden = statistics_and_gradient(case, on_logp, on_entropy)
    exact = Exact(case.logits, case.tokens.long(), **case.settings, nat=not case.strict)
    if case.tolerance is not None:
        exact.tolerance *= case.tolerance / 1e-5
    right = {}
    for field, got in zip(TokenStats._fields, stats, strict=True):
        got, value = got.detach().double().numpy(), exact.values[field]
        with np.errstate(invalid="ignore", over="ignore"):
            near = abs(got - value) <= exact.tolerance * exact.scales[field] + ABSOLUTE
            # Beyond float32 infinity is right.
            right[field] = np.where(np.isinf(got), value <= got, near) if field == "logp" else near
    gradient, scale = exact.gradient(on_logp, on_entropy)
    if of_hidden:
        z = case.logits.double().numpy()
        gradient, scale = gradient @ z.T, scale @ abs(z).T
    with np.errstate(invalid="ignore", over="ignore"):
        error = abs(found.double().numpy() - gradient)
        allowed = 2 * scale * 1e-5 + ABSOLUTE
        if case.rounding is not None:
            kind = torch.finfo(case.rounding)
            allowed = allowed + kind.eps * (abs(gradient) + kind.tiny)
        right["gradient"] = (error <= allowed).all(-1)
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the cases, for a quick look")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/reliability-numerics.json")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    parts: dict[str, dict[str, int]] = {}
    failures: list[dict[str, Any]] = []
    for name, (cases, count) in PARTS.items():
        part = parts[name] = {"rows": 0, "tried": 0, "held": 0}
        for number, case in zip(range(max(1, round(count * arguments.share))), cases(), strict=False):
            part["rows"] += len(case.logits)
            for what, right in checked(case).items():
                part["tried"] += len(right)
                part["held"] += int(right.sum())
                if not right.all():
                    where = {"part": name, "case": number, "way": case.way, "settings": dict(case.settings)}
                    failures.append(where | {"what": what, "rows": int((~right).sum())})
        print(f"{name}: {part['held']} of {part['tried']}", flush=True)
    totals = {key: sum(part[key] for part in parts.values()) for key in ("tried", "held")}
    made = {key: value for key, value in environment(arguments.seed).items() if key != "command"}
    result = {"benchmark": "reliability-numerics", "environment": made, **totals, "parts": parts, "failures": failures}
    write_document(arguments.output, result)
    print(f"{totals['held']} of {totals['tried']} held")
    sys.exit(totals["held"] != totals["tried"])


if __name__ == "__main__":
    main()
