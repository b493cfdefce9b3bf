"""Time, memory and error of the kernels beside those of other libraries, all in one process.

    OMP_NUM_THREADS=1 python benchmarks/kernel_speed.py --device cpu --output benchmarks/results/kernels_cpu.json
    python benchmarks/kernel_speed.py --device cuda --output benchmarks/results/kernels_cuda.json
    python benchmarks/kernel_speed.py --device cuda --tune --output benchmarks/results/kernels_cuda.json
    python benchmarks/kernel_speed.py --table    # docs/performance.md's tables and figure, from the result files

Every contestant is first checked against float64. Then each round runs all of them once, the order rotating. Seconds
are wall time on a CPU and CUDA events on a GPU, there also with the L2 cache overwritten before ("cold"). Extra memory
is the peak above the inputs, outputs and gradients included: of the resident set of a process forked for that one
contestant, or of torch's CUDA allocator. "forward" is without autograd; "backward" is a forward and the gradients of
-Σ log p along logits, or hidden states and head. A library that is missing or fails is a row that says so.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import importlib
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import os
import platform
import resource
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from entropy_polarity.kernels import linear_token_loss, linear_token_stats, token_stats
from entropy_polarity.kernels.reference import reference_token_stats

VOCABULARY = 151_936  # of Qwen2.5 and Qwen3
FIRST_CALL_SECONDS = 90  # an autotuner may take its time, but not all of it
# Errors beyond these make a contestant "wrong": in nats, or relative to the largest gradient or the loss.
BOUNDS = {torch.float32: 1e-2, torch.bfloat16: 0.3}
PEERS = ("torch", "triton", "trl", "liger-kernel", "verl", "quack-kernels", "cut-cross-entropy", "flash-attn")


class Inputs(NamedTuple):
    """Sampled ids (N,) and either logits (N, V), or hidden states (N, D) and a head (V, D); the others are empty."""

    tokens: Tensor
    logits: Tensor
    hidden: Tensor
    weight: Tensor


class Section(NamedTuple):
    """One table: which contestants ("logits", "head", "growth"), what they do, and on what sizes."""

    kind: str
    way: str
    rows: int
    vocabulary: int
    width: int
    dtype: torch.dtype
    rounds: int

    def inputs(self, device: str) -> Inputs:
        """Random logits of standard deviation 2; in every other row the sampled token is certain."""
        make = {"device": device, "dtype": self.dtype}
        noise = torch.Generator(device).manual_seed(0)
        tokens = torch.randint(self.vocabulary, (self.rows,), generator=noise, device=device)
        logits = hidden = weight = torch.empty(0, **make)
        even = torch.arange(0, self.rows, 2, device=device)
        if self.width:
            hidden = torch.empty(self.rows, self.width, **make).normal_(generator=noise)
            weight = torch.empty(self.vocabulary, self.width, **make).normal_(0, 2 * self.width**-0.5, generator=noise)
            hidden[even] += weight[tokens[even]] * 3.75  # the row's logits rise by 15 |W_a|² / 4
        else:
            logits = torch.empty(self.rows, self.vocabulary, **make).normal_(0, 2, generator=noise)
            logits[even, tokens[even]] += 15
        return Inputs(tokens, logits, hidden, weight)


class Contestant(NamedTuple):
    """`forward` gives the outputs by name; `products` counts the matrix products of forward and backward."""

    name: str
    forward: Callable[[Inputs], dict[str, Tensor]]
    products: int = 0
    note: str = ""
    leaves: tuple[str, ...] = ("logits",)
    ways: tuple[str, ...] = ("forward", "backward")
    devices: tuple[str, ...] = ("cpu", "cuda")
    ceiling: bool = False  # a part of the work that all must do, not a contestant
    overwrites: bool = False  # its input; it gets a copy that is made anew, untimed, before each run


def peer(module: str, name: str) -> Any:
    """A function of another library. Raises ImportError if it cannot be had."""
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError as error:
        raise ImportError(f"{module} has no {name}") from error


# Logits -> statistics


def ours(implementation: str) -> Callable[[Inputs], dict[str, Tensor]]:
    def forward(x: Inputs) -> dict[str, Tensor]:
        return _five(token_stats(x.logits, x.tokens, implementation=implementation, check=False))

    return forward


def _five(stats: Any) -> dict[str, Tensor]:
    return {name: getattr(stats, name) for name in ("logp", "entropy", "sum_p2", "sum_p2_logp", "sensitivity")}


def naive_statistics(logits: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    logp = torch.log_softmax(logits.float(), -1)
    at_token = logp.gather(-1, tokens[:, None])[:, 0]
    with torch.no_grad():
        p = logp.exp()
        entropy = -(p * logp).sum(-1)
        contribution = p * (logp + entropy[:, None])
        sampled = contribution.gather(-1, tokens[:, None])[:, 0]
        sensitivity = (p * contribution).sum(-1) - sampled
        sums = {"sum_p2": (p * p).sum(-1), "sum_p2_logp": (p * p * logp).sum(-1)}
    return {"logp": at_token, "entropy": entropy, **sums, "sensitivity": sensitivity}


def trl_logits(x: Inputs) -> dict[str, Tensor]:
    module = "trl.kernels.logprob_entropy" if x.logits.is_cuda else "trl.trainer.utils"
    both = peer(module, "selective_log_softmax_and_entropy")
    # On a CPU TRL takes the entropy apart, and its gradient only where asked for.
    logp, entropy = both(x.logits, x.tokens) if x.logits.is_cuda else both(x.logits, x.tokens, False)
    return {"logp": logp, "entropy": entropy}


def verl_logits(x: Inputs) -> dict[str, Tensor]:
    logp = peer("verl.utils.torch_functional", "logprobs_from_logits")(x.logits, x.tokens, inplace_backward=False)
    with torch.no_grad():
        entropy = peer("verl.utils.torch_functional", "entropy_from_logits")(x.logits)
    return {"logp": logp, "entropy": entropy}


def quack_logits(x: Inputs) -> dict[str, Tensor]:
    return {"logp": -peer("quack.cross_entropy", "cross_entropy")(x.logits, x.tokens, reduction="none")}


def liger_logits(x: Inputs) -> dict[str, Tensor]:
    apply = peer("liger_kernel.ops", "LigerCrossEntropyFunction").apply
    return {"logp": -apply(x.logits, x.tokens, None, -100, 0.0, 0.0, "none")[0]}


def read(function: Callable[[Tensor], Tensor]) -> Callable[[Inputs], dict[str, Tensor]]:
    def forward(x: Inputs) -> dict[str, Tensor]:
        function(x.logits.detach())
        return {}

    return forward


# Hidden states -> statistics


def ours_head(**settings: Any) -> Callable[[Inputs], dict[str, Tensor]]:
    def forward(x: Inputs) -> dict[str, Tensor]:
        return _five(linear_token_stats(x.hidden, x.weight, x.tokens, check=False, **settings))

    return forward


def ours_callback(x: Inputs, chunk_bytes: int | None = None) -> dict[str, Tensor]:
    def loss(stats: Any, rows: slice) -> Tensor:
        return -stats.logp.sum()

    total, stats = linear_token_loss(x.hidden, x.weight, x.tokens, loss, chunk_bytes=chunk_bytes, check=False)
    return {"loss": total, **_five(stats)}


def trl_head(x: Inputs) -> dict[str, Tensor]:
    apply = peer("trl.kernels.chunked_logprob", "ChunkedLogProbFunction").apply
    logp, entropy, *_ = apply(x.hidden, x.weight, None, x.tokens, 1.0, 32_768, None, 1.0, ("entropy",))
    return {"logp": logp, "entropy": entropy}


def liger_scaled(x: Inputs) -> dict[str, Tensor]:
    apply = peer("liger_kernel.ops", "LigerFusedLinearScaledCrossEntropyFunction").apply
    loss, entropy = apply(x.hidden, x.weight, x.tokens, 1.0, -100, 1, True)
    return {"logp": -loss, "entropy": entropy}


def liger_linear(x: Inputs) -> dict[str, Tensor]:
    apply = peer("liger_kernel.ops", "LigerFusedLinearCrossEntropyFunction").apply
    loss, *_ = apply(x.hidden, x.weight, x.tokens, None, None, -100, 0.0, 0.0, "sum", None, False, torch.float32)
    return {"loss": loss}


def verl_head(x: Inputs) -> dict[str, Tensor]:
    apply = peer("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy")
    logp, entropy = apply(x.hidden, x.weight, x.tokens, 1.0, "none")
    return {"logp": logp, "entropy": entropy}


def cut_cross_entropy(x: Inputs) -> dict[str, Tensor]:
    function = peer("cut_cross_entropy", "linear_cross_entropy")
    return {"logp": -function(x.hidden, x.weight, x.tokens, reduction="none", filter_eps=None)}


def torch_linear(rows: int | None) -> Callable[[Inputs], dict[str, Tensor]]:
    def forward(x: Inputs) -> dict[str, Tensor]:
        function = peer("torch.nn.functional", "linear_cross_entropy")
        options = peer("torch.nn", "LinearCrossEntropyOptions")
        chunks = options() if rows is None else options(batch_chunk_size=rows, chunking_method=None)
        return {"loss": function(x.hidden, x.weight, x.tokens, reduction="sum", options=chunks)}

    return forward


def quack_head(x: Inputs) -> dict[str, Tensor]:
    function = peer("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    return {"loss": function(x.hidden, x.weight, x.tokens, reduction="sum")}


@functools.lru_cache(maxsize=1)
def _buffer(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def bare_products(count: int) -> Callable[[Inputs], dict[str, Tensor]]:
    """Nothing but matrix products: the logits, then the gradients' two, then the logits again."""

    def forward(x: Inputs) -> dict[str, Tensor]:
        hidden, weight = x.hidden.detach(), x.weight.detach()
        logits = _buffer(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
        for _ in range(2 if count == 4 else 1):
            torch.mm(hidden, weight.t(), out=logits)
        if count > 1:
            logits @ weight
        if count > 2:
            logits.t() @ hidden
        return {}

    return forward


BOTH, BACK, FORE = ("hidden", "weight"), ("backward",), ("forward",)
CPU, CUDA = ("cpu",), ("cuda",)
READ = {"ceiling": True, "ways": FORE}
CONTESTANTS = {
    "logits": [
        Contestant("ours, chunked", ours("chunked"), note="float32 sums"),
        Contestant("ours, triton", ours("triton"), note="float32 sums", devices=CUDA),
        Contestant("TRL", trl_logits, note="float32 on CUDA, the logits' type on a CPU"),
        Contestant("naive torch", lambda x: naive_statistics(x.logits, x.tokens), note="float32"),
        Contestant("verl", verl_logits, note="the logits' type"),
        Contestant("QuACK cross-entropy", quack_logits, note="float32; no entropy", devices=CUDA),
        Contestant("Liger cross-entropy", liger_logits, note="float32; no entropy", devices=CUDA, overwrites=True),
        Contestant("a sum of the logits", read(torch.sum), **READ),
        Contestant("their row maxima", read(lambda logits: logits.amax(-1)), **READ),
        Contestant("a copy of the logits", read(torch.clone), ceiling=True, devices=CUDA),
    ],
    "head": [
        Contestant("ours", ours_head(), 4, "float32 gradients", BOTH),
        Contestant("ours, chunked", ours_head(implementation="chunked"), 4, "float32 gradients", BOTH, devices=CUDA),
        Contestant("ours, float32 logits", ours_head(logits_dtype=torch.float32), 4,
                   "float32 logits and gradients", BOTH, devices=CUDA),
        Contestant("ours, callback", ours_callback, 3, "float32 gradients", BOTH, BACK),
        Contestant("ours, frozen head", ours_head(), 2, "float32 gradients", ("hidden",), BACK),
        Contestant("TRL", trl_head, 4, "float32 gradients", BOTH),
        Contestant("TRL, frozen head", trl_head, 3, "float32 gradients", ("hidden",), BACK),
        Contestant("Liger scaled cross-entropy", liger_scaled, 4, "gradients in the product's type", BOTH),
        Contestant("verl", verl_head, 4, "gradients in the product's type", BOTH, devices=CUDA),
        Contestant("cut-cross-entropy", cut_cross_entropy, 4, "no filter; gradients in the product's type; no entropy",
                   BOTH, devices=CUDA),
        Contestant("Liger linear cross-entropy", liger_linear, 3, "float32 gradients; no entropy", BOTH, BACK, CUDA),
        Contestant("QuACK linear cross-entropy", quack_head, 3, "float32 gradients; no entropy", BOTH, BACK, CUDA),
        Contestant("torch linear cross-entropy", torch_linear(None), 3, "its own chunks and types; no entropy", BOTH,
                   BACK, CUDA),
        Contestant("torch linear cross-entropy, 64 rows", torch_linear(64), 3, "its own types; no entropy", BOTH, BACK,
                   CPU),
        Contestant("torch linear cross-entropy, 1024 rows", torch_linear(1024), 3, "its own types; no entropy", BOTH,
                   BACK, CUDA),
        Contestant("naive torch", lambda x: naive_statistics(linear(x.hidden, x.weight), x.tokens), 3,
                   "all logits held; float32 statistics", BOTH),
        Contestant("1 bare product", bare_products(1), 1, ways=FORE, ceiling=True),
        *(Contestant(f"{n} bare products", bare_products(n), n, ways=BACK, ceiling=True) for n in (2, 3, 4)),
    ],
    "growth": [
        Contestant("fused", ours_head(), 1),
        Contestant("logits", lambda x: _five(token_stats(linear(x.hidden, x.weight), x.tokens, check=False)), 1),
    ],
}  # fmt: skip


def contestants(section: Section, device: str) -> list[Contestant]:
    return [c for c in CONTESTANTS[section.kind] if section.way in c.ways and device in c.devices]


def sections(device: str, quick: bool) -> Iterator[Section]:
    """What is measured, the most important first."""
    half, full = torch.bfloat16, torch.float32
    if quick:
        logits, heads, tokens, vocabularies, width = (8, 5000), [(8, 5000, 32)], [8, 32], [2048, 8192], 16
    elif device == "cpu":
        logits, heads = (256, VOCABULARY), [(256, VOCABULARY, 896)]
        tokens, vocabularies, width = [128, 256, 512, 1024, 2048], [8192, 16384, 32768, 65536, 131072], 256
    else:
        logits, heads = (8192, VOCABULARY), [(8192, VOCABULARY, 4096), (8192, VOCABULARY, 2048)]
        tokens, vocabularies, width = [1024, 2048, 4096, 8192, 16384], [16384, 32768, 65536, 131072, 262144], 2048
    of_head = full if device == "cpu" else half
    few, many = (2, 2) if quick else (5, 15) if device == "cpu" else (10, 30)
    for dtype in (full, half) if device == "cpu" else (half, full):
        yield Section("logits", "forward", *logits, 0, dtype, many)
        if not quick or dtype == of_head:
            yield Section("logits", "backward", *logits, 0, dtype, few)
    for head in heads:
        yield Section("head", "forward", *head, of_head, few)
        smaller = head[0] // 2 if device == "cpu" else head[0]
        yield Section("head", "backward", smaller, *head[1:], of_head, few)
    for rows in tokens:
        yield Section("growth", "forward", rows, vocabularies[len(vocabularies) // 2], width, of_head, few)
    for vocabulary in vocabularies:
        if vocabulary != vocabularies[len(vocabularies) // 2]:  # that point is above
            yield Section("growth", "forward", tokens[len(tokens) // 2], vocabulary, width, of_head, few)


# What is right


def reference(x: Inputs, way: str) -> dict[str, Tensor]:
    """Statistics and gradients in float64, some rows at a time."""
    from_head = x.hidden.numel() > 0
    weight = x.weight.double().requires_grad_(way == "backward") if from_head else x.weight
    stats, grads = [], []
    height = max(1, 2**25 // (len(weight) if from_head else x.logits.shape[1]))
    source = x.hidden if from_head else x.logits
    for rows, tokens in zip(source.split(height), x.tokens.split(height), strict=True):
        rows = rows.double().requires_grad_(way == "backward")
        found = reference_token_stats(rows @ weight.t() if from_head else rows, tokens)
        if way == "backward":
            (-found.logp.sum()).backward()
            grads.append(rows.grad)
        stats.append({name: value.detach() for name, value in _five(found).items()})
    truth = {name: torch.cat([part[name] for part in stats]) for name in stats[0]}
    truth["loss"] = -truth["logp"].sum()
    if way == "backward":
        truth["grad_hidden" if from_head else "grad_logits"] = torch.cat(grads)
        if from_head and weight.grad is not None:
            truth["grad_weight"] = weight.grad
    return truth


def largest_error(value: Tensor, truth: Tensor) -> float:
    """NaN if any is; a piece at a time, for gradients of gigabytes."""
    pairs = zip(value.reshape(-1).split(2**26), truth.reshape(-1).split(2**26), strict=True)
    return torch.stack([(a.double() - b).abs().max() for a, b in pairs]).max().item()


def errors(outputs: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float | None]:
    """The largest error of every output against float64: in nats; of gradients and the loss relative. None for NaN."""
    found: dict[str, float | None] = {}
    for name, value in outputs.items():
        relative = name == "loss" or name.startswith("grad")
        error = largest_error(value, truth[name]) / (truth[name].abs().max().item() if relative else 1.0)
        found[name] = error if math.isfinite(error) else None
    return found


# What it takes


def run(contestant: Contestant, x: Inputs, way: str) -> dict[str, Tensor]:
    """One evaluation: the outputs, and the gradients of -Σ log p."""
    if way == "forward":
        with torch.no_grad():
            return contestant.forward(x)
    leaves = [getattr(x, name).detach().requires_grad_() for name in contestant.leaves]
    outputs = contestant.forward(x._replace(**dict(zip(contestant.leaves, leaves, strict=True))))
    if not outputs:
        return {}
    if "loss" in outputs:
        grads = torch.autograd.grad(outputs["loss"], leaves)
    else:
        grads = torch.autograd.grad(outputs["logp"], leaves, -torch.ones_like(outputs["logp"]))
    names = (f"grad_{name}" for name in contestant.leaves)
    return {name: value.detach() for name, value in outputs.items()} | dict(zip(names, grads, strict=True))


@contextlib.contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """Raise TimeoutError after so many seconds."""

    def too_late(*_: Any) -> None:
        raise TimeoutError(f"not done in {seconds} s")

    signal.signal(signal.SIGALRM, too_late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


@contextlib.contextmanager
def recorded(result: dict[str, Any]) -> Iterator[None]:
    """Let no contestant stop the others: what it raises goes into its result."""
    try:
        yield
    except ImportError as error:
        result |= {"status": "not installed", "error": str(error).partition("\n")[0]}
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        result |= {"status": "failed", "error": f"{type(error).__name__}: {first_line}"[:300]}
    if result["status"] == "failed" and torch.cuda.is_available():
        torch.cuda.empty_cache()


class Clock:
    """Seconds of one call, with warm or with overwritten caches."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.temperatures = ("hot", "cold") if device == "cuda" else ("hot",)
        self.flush = torch.empty(2**28 if device == "cuda" else 0, dtype=torch.int8, device=device)

    def seconds(self, call: Callable[[], Any], temperature: str) -> float:
        if self.device == "cpu":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        if temperature == "cold":
            self.flush.zero_()
        torch.cuda._sleep(2_000_000)  # a millisecond in which the host runs ahead: launches are not what is measured
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3


def measure(section: Section, device: str) -> dict[str, Any]:
    """Check, then time, then weigh all contestants of a section."""
    x = section.inputs(device)
    copy = functools.cache(x.logits.clone)  # for those that overwrite

    def given(contestant: Contestant) -> Inputs:
        return x._replace(logits=copy().copy_(x.logits)) if contestant.overwrites else x

    results: dict[str, dict[str, Any]] = {}
    truth = reference(x, section.way)
    for contestant in contestants(section, device):
        result = results[contestant.name] = {
            "status": "ok", "note": contestant.note, "ceiling": contestant.ceiling,
            "products": contestant.products if section.way == "backward" else min(contestant.products, 1),
        }  # fmt: skip
        with recorded(result), deadline(FIRST_CALL_SECONDS):
            result["errors"] = errors(run(contestant, given(contestant), section.way), truth)
            if any(error is None or error > BOUNDS[section.dtype] for error in result["errors"].values()):
                result["status"] = "wrong"
    del truth
    clock = Clock(device)
    names = {c.name: c for c in contestants(section, device) if results[c.name]["status"] in ("ok", "wrong")}
    for i in range(section.rounds + 1):
        first = i % max(1, len(names))
        for name in [*names][first:] + [*names][:first]:
            for temperature in clock.temperatures if results[name]["status"] in ("ok", "wrong") else ():
                with recorded(results[name]):
                    mine = given(names[name])
                    seconds = clock.seconds(lambda c=names[name], x=mine: run(c, x, section.way), temperature)
                    if i:  # the first round warms up
                        results[name].setdefault("seconds", {}).setdefault(temperature, []).append(seconds)
    for name, contestant in names.items():
        if not contestant.ceiling:
            with recorded(results[name]):
                results[name]["extra_bytes"] = extra_memory(section, contestant, given(contestant), device)
    return {**section._asdict(), "dtype": _short(section.dtype), "contestants": results}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def extra_memory(section: Section, contestant: Contestant, x: Inputs, device: str) -> int:
    """Bytes at the peak of one evaluation, above its inputs."""
    if device == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(contestant, x, section.way)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    processes = multiprocessing.get_context("forkserver")  # its server imports torch and never computes
    receiver, sender = processes.Pipe(duplex=False)
    child = processes.Process(
        target=_extra_memory_here, args=(section, contestant.name, sender, torch.get_num_threads())
    )
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError("the process that measures memory died") from None
    finally:
        child.join()


def _extra_memory_here(section: Section, name: str, sender: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    (contestant,) = (c for c in contestants(section, "cpu") if c.name == name)
    x = section.inputs("cpu")
    # Two rows load every library and compile what is to be compiled.
    run(contestant, x._replace(tokens=x.tokens[:2], logits=x.logits[:2], hidden=x.hidden[:2]), section.way)
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what the heap keeps of it would be used again, unseen
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak so far
    before = peak_resident()
    outputs = run(contestant, x, section.way)
    sender.send(peak_resident() - before)
    del outputs


def peak_resident() -> int:
    """Bytes of the largest resident set so far."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# Growth and tuning


def growth(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Exponents: the least-squares slopes of log time and log memory over log tokens and log vocabulary."""

    def exponents(along: str, name: str) -> dict[str, float]:
        other = {"rows": "vocabulary", "vocabulary": "rows"}[along]
        fixed = statistics.mode(section[other] for section in measured)
        points = [s for s in measured if s[other] == fixed and s["contestants"][name]["status"] == "ok"]
        sizes = [section[along] for section in points]
        found = [section["contestants"][name] for section in points]
        return {
            "time": _slope(sizes, [statistics.median(result["seconds"]["hot"]) for result in found]),
            "memory": _slope(sizes, [max(1, result["extra_bytes"]) for result in found]),
        }

    return {name: {along: exponents(along, name) for along in ("rows", "vocabulary")} for name in ("fused", "logits")}


def _slope(sizes: list[float], values: list[float]) -> float:
    return statistics.linear_regression([math.log(x) for x in sizes], [math.log(x) for x in values]).slope


@contextlib.contextmanager
def settings(**values: int) -> Iterator[None]:
    """The Triton engine with other constants."""
    constants = vars(importlib.import_module("entropy_polarity.kernels.triton"))
    before = {name: constants[name] for name in values if name in constants}
    try:
        constants.update({name: values[name] for name in before})
        yield
    finally:
        constants.update(before)


def tune(device: str, quick: bool) -> dict[str, list[dict[str, Any]]]:
    """Times of other block sizes, warps and tiles than the engine's own, and how far their results are from its."""
    rows, vocabulary, width, rounds = (16, 5000, 64, 1) if quick else (8192, VOCABULARY, 4096, 10)
    tables: dict[str, list[dict[str, Any]]] = {}

    def sweep(
        table: str, section: Section, make: Callable[..., Contestant], grid: list[dict[str, int]], keep: str
    ) -> None:
        clock, x = Clock(device), section.inputs(device)
        own: dict[str, Any] = {"status": "ok"}
        expected = torch.empty(0)
        with recorded(own):
            expected = run(make(), x, section.way)[keep].double()
        found: list[dict[str, Any]] = [{**constants, **own} for constants in grid]
        for i, (constants, result) in itertools.product(range(rounds + 1), zip(grid, found, strict=True)):
            if result["status"] != "ok":
                continue
            contestant = make(**constants)
            with recorded(result), settings(**constants):
                if i == 0:
                    result["difference"] = largest_error(run(contestant, x, section.way)[keep], expected)
                else:
                    seconds = clock.seconds(lambda c=contestant: run(c, x, section.way), clock.temperatures[-1])
                    result.setdefault("seconds", []).append(seconds)
        tables[table] = sorted(found, key=lambda r: statistics.median(r.get("seconds", [math.inf])))
        print(f"\n{table}", *map(_tuned, tables[table]), sep="\n  ", flush=True)

    def logits(**_: int) -> Contestant:
        return Contestant("", ours("triton"))

    def head(**_: int) -> Contestant:
        return Contestant("", ours_head(implementation="triton"), leaves=BOTH)

    def callback(CHUNK_MIB: int = 512) -> Contestant:
        return Contestant("", functools.partial(ours_callback, chunk_bytes=CHUNK_MIB * 2**20), leaves=BOTH)

    shapes = [(b, w) for b, w in itertools.product((1024, 2048, 4096, 8192), (2, 4, 8, 16)) if 8 <= b // (32 * w) <= 32]
    folds = [{"BLOCK": b, "WARPS": w} for b, w in shapes]
    gradients = [{"GRADIENT_BLOCK": b, "GRADIENT_WARPS": w} for b, w in shapes]
    tiles = [{"PRODUCT_BYTES": 2**n, "PRODUCT_ROWS": r} for n in range(25, 31) for r in (2048, 4096, 8192)]
    for dtype in (torch.bfloat16, torch.float32):
        section = Section("logits", "forward", rows, vocabulary, 0, dtype, rounds)
        sweep(f"statistics, {_short(dtype)}", section, logits, folds, "entropy")
        sweep(
            f"statistics and gradient, {_short(dtype)}",
            section._replace(way="backward"),
            logits,
            gradients,
            "grad_logits",
        )
    section = Section("head", "forward", rows, vocabulary, width, torch.bfloat16, rounds)
    sweep("head forward", section, head, tiles, "entropy")
    sweep("head backward", section._replace(way="backward"), head, tiles, "grad_hidden")
    chunks = [{"CHUNK_MIB": 2**n} for n in range(6, 12)]
    sweep("head backward, callback", section._replace(way="backward"), callback, chunks, "grad_hidden")
    return tables


def _tuned(result: dict[str, Any]) -> str:
    constants = ", ".join(f"{name} {value}" for name, value in result.items() if name.isupper())
    if result["status"] != "ok":
        return f"{constants}: {result['error']}"
    return f"{constants}: {statistics.median(result['seconds']) * 1e3:.3f} ms, {result['difference']:.1e} off"


# The result file


def machine(device: str) -> dict[str, Any]:
    """Versions, date, command, processor."""
    found: dict[str, Any]
    try:
        from entropy_polarity.support.provenance import environment

        found = environment(seed=0)
    except ImportError:  # a machine with torch and little else
        found = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "python": platform.python_version()}
        found |= {"packages": {}, "machine": {"system": platform.platform(), "cores": os.cpu_count()}}
    for name in PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found["packages"][name] = importlib.metadata.version(name)
    found["machine"]["torch_threads"] = torch.get_num_threads()
    if device == "cuda":
        found["machine"] |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    threads = f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} " if "OMP_NUM_THREADS" in os.environ else ""
    return found | {"command": f"{threads}python benchmarks/kernel_speed.py {shlex.join(sys.argv[1:])}"}


def shown(section: dict[str, Any]) -> str:
    """A section as plain text, for the one who waits."""
    size = f"N={section['rows']} V={section['vocabulary']} D={section['width']} {section['dtype']}"
    lines = [f"\n{section['kind']} {section['way']}, {size}"]
    for name, result in section["contestants"].items():
        times = [f"{statistics.median(v) * 1e3:10.3f} ms {t}" for t, v in result.get("seconds", {}).items()]
        extra = f"{result['extra_bytes'] / 2**20:8.1f} MiB" if "extra_bytes" in result else ""
        found = result.get("errors", {}).items()
        worst = ", ".join(f"{output} {'NaN' if error is None else f'{error:.0e}'}" for output, error in found)
        lines.append(f"  {name:38} {result['status']:13} {' '.join(times)} {extra}  {worst or result.get('error', '')}")
    return "\n".join(lines)


def save(result: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.part")
        draft.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        draft.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: every path of this script, no figure of use")
    parser.add_argument("--tune", action="store_true", help="sweep block sizes, warps and tiles instead")
    parser.add_argument("--only", choices=list(CONTESTANTS), help="one kind of section")
    parser.add_argument("--output", type=Path, help="a result file, written again after each section")
    parser.add_argument("--table", nargs="*", type=Path, metavar="FILE", help="write docs/performance.md from results")
    arguments = parser.parse_args()
    if arguments.table is not None:
        import kernel_tables

        kernel_tables.write(arguments.table)
        return
    if arguments.tune and arguments.device != "cuda":
        parser.error("--tune needs --device cuda")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    os.environ.pop("PAPO_KERNEL", None)  # the default is a contestant
    if arguments.quick:
        torch.set_num_threads(1)  # nothing here is worth a second
    imports = ["torch._inductor.compile_fx", "entropy_polarity.kernels", "trl.trainer.utils", "trl.kernels"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(imports)
    result: dict[str, Any] = {
        "benchmark": "kernels",
        "device": arguments.device,
        "environment": machine(arguments.device),
        "sections": [],
    }
    if arguments.tune:
        if arguments.output is not None and arguments.output.is_file():
            result = json.loads(arguments.output.read_text(encoding="utf-8"))
        result["tune"] = tune(arguments.device, arguments.quick)
        save(result, arguments.output)
        return
    for section in sections(arguments.device, arguments.quick):
        if arguments.only in (None, section.kind):
            result["sections"].append(measure(section, arguments.device))
            print(shown(result["sections"][-1]), flush=True)
            save(result, arguments.output)
    measured = [section for section in result["sections"] if section["kind"] == "growth"]
    if measured:
        result["growth"] = growth(measured)
        save(result, arguments.output)


if __name__ == "__main__":
    main()
