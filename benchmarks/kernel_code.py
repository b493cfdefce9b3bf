"""What the Triton kernels are on the GPU: registers, spills, and machine instructions for each logit, without a GPU.

    python benchmarks/kernel_code.py --all --output benchmarks/results/kernel_code.json

The engine is asked for its launches on tensors that hold no data; each one is compiled ahead of time for sm_80 and
sm_90 and disassembled. Counted is the shortest way once around the loop that reads the logits: what is executed while
no new maximum turns up, which is all but a few blocks of a row. A gradient kernel has no loop: all of it counts, but
what only the block with the sampled token does. `at_most` counts the longest way: that of those few blocks.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90)
ROWS, VOCABULARY = 8192, 151_936
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int8: "i8",
}  # fmt: skip
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Launch(NamedTuple):
    """A kernel and the arguments the engine launches it with."""

    kernel: Any
    arguments: dict[str, Any]


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda **arguments: self.launches.append(Launch(self.kernel, arguments))


def launches(dtype: torch.dtype, masked: bool, softcap: float | None) -> list[Launch]:
    """What the public functions launch, forward and backward, on tensors without data."""
    from entropy_polarity.kernels import dispatch, public, triton
    from entropy_polarity.kernels.dispatch import Choice

    found: list[Launch] = []
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(dispatch, "choose", return_value=Choice("triton", "ahead of time")))
        patches.enter_context(mock.patch("torch.is_autocast_enabled", return_value=False))  # knows no "meta"
        for name in [name for name in vars(triton) if name.endswith("_kernel")]:
            patches.enter_context(mock.patch.object(triton, name, Recorder(getattr(triton, name), found)))
        empty = functools.partial(torch.empty, device="meta")
        tokens = empty(ROWS, dtype=torch.int64)
        if softcap is None:
            logits = empty(ROWS, VOCABULARY, dtype=dtype, requires_grad=True)
            mask = empty(ROWS, dtype=torch.bool) if masked else None
            stats = public.token_stats(logits, tokens, mask=mask, check=False)
            torch.autograd.grad(stats.logp.sum(), logits)
        if not masked:
            hidden, weight = (empty(n, 64, dtype=dtype, requires_grad=True) for n in (ROWS, VOCABULARY))
            stats = public.linear_token_stats(hidden, weight, tokens, softcap=softcap, check=False)
            torch.autograd.grad(stats.logp.sum(), [hidden, weight])
            settings = {"softcap": softcap, "check": False}
            if dtype != torch.float16:  # refused
                public.linear_token_loss(hidden, weight, tokens, lambda stats, _: stats.logp.sum(), **settings)
    for launch in found:
        if "out_ptr" in launch.arguments:  # only on CUDA gradients always have the logits' type
            launch.arguments["out_ptr"] = launch.arguments["logits_ptr"]
    return found


def case(launch: Launch) -> dict[str, Any]:
    """What distinguishes a specialisation."""
    given = launch.arguments
    name = "gradient"
    if "IS_FIRST" in given:
        name = {(1, 1): "whole rows", (1, 0): "first tile", (0, 0): "middle tile"}.get(
            (given["IS_FIRST"], given["IS_LAST"]), "last tile"
        )
    dtype = TYPES[given["logits_ptr"].dtype]
    return {"case": name, "dtype": dtype, "mask": bool(given["HAS_MASK"]), "softcap": bool(given["HAS_CAP"])}


def specialisations(everything: bool) -> Iterator[Launch]:
    """One launch of every specialisation in use, or of those whose figures matter most."""
    seen = []
    for dtype, softcap, masked in itertools.product(DTYPES, (None, 30.0), (False, True)):
        for launch in launches(dtype, masked, softcap):
            this = case(launch)
            main = not masked and softcap is None and dtype != torch.float16
            main &= this["case"] in ("whole rows", "gradient", "middle tile")
            if this not in seen and (everything or main):
                seen.append(this)
                yield launch


def compiled(launch: Launch, architecture: int) -> Any:
    """The launch compiled as the just-in-time compiler would specialise it: by type, value 1 and divisibility by 16."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        divisible = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
        else:
            signature[parameter.name] = "fp32"
        if divisible and parameter.name not in constants:
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {name: value for name, value in launch.arguments.items() if name not in launch.kernel.arg_names}
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def tool(name: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [TOOLS / name, option, file.name], capture_output=True, encoding="utf-8", check=True
        ).stdout


class Code(NamedTuple):
    """Instructions in order, and for each those that may follow it."""

    text: list[str]
    successors: list[list[int]]

    @classmethod
    def parse(cls, listing: str) -> "Code":
        text: list[str] = []
        labels: dict[str, int] = {}
        for line in map(str.strip, listing.splitlines()):
            if match := re.fullmatch(r"(\.L_\w+):", line):
                labels[match[1]] = len(text)
            elif match := re.match(r"/\*[0-9a-f]{4,}\*/\s+([^;]+);", line):
                text.append(match[1].strip())
        successors: list[list[int]] = []
        for i, instruction in enumerate(text):
            target = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", instruction)
            leaves = re.match(r"(EXIT|RET|BRA(\.[A-Z]+)* `)", instruction) and not instruction.startswith("BRA.DIV")
            following = ([] if leaves else [i + 1]) + ([labels[target[1]]] if target else [])
            successors.append([n for n in following if n < len(text)])
        return cls(text, successors)

    def way(self, start: int, end: int, prefer: Callable[..., list[int]]) -> list[int] | None:
        """The shortest or longest (`prefer` min or max) way forward from one instruction to another."""
        ways: dict[int, list[int]] = {start: [start]}
        for i in range(start, end):
            for n in self.successors[i] if i in ways else ():
                if i < n <= end:
                    ways[n] = prefer(ways.get(n, [*ways[i], n]), [*ways[i], n], key=len)
        return ways.get(end)

    def paths(self, prefer: Callable[..., list[int]]) -> list[list[int]]:
        """The ways once around every loop; without one, those from the start to every end."""
        turns = ((i, n) for i, following in enumerate(self.successors) for n in following if n < i)
        ways = [self.way(first, last, prefer) for last, first in turns]
        if not ways:
            exits = (i for i, instruction in enumerate(self.text) if instruction.endswith("EXIT"))
            ways = [self.way(0, last, prefer) for last in exits]
        return [way for way in ways if way]

    def hot_path(self) -> list[str]:
        """The most laborious loop, or way to an end, without anything that can be left out."""
        return [self.text[i] for i in max(self.paths(min), key=len)]

    def longest_path(self) -> int:
        """Instructions of that loop, or of the kernel, with all that can turn up."""
        ends = max(self.paths(min), key=len)[-1]
        return max(len(way) for way in self.paths(max) if way[-1] == ends)


def described(launch: Launch, architecture: int) -> dict[str, Any]:
    """One specialisation's figures. `per_element` counts lane instructions for each logit it reads."""
    cubin = compiled(launch, architecture).asm["cubin"]
    (usage,) = re.findall(r"REG:(\d+) STACK:(\d+)", tool("cuobjdump", "--dump-resource-usage", cubin))
    code = Code.parse(tool("nvdisasm", "-c", cubin))
    path, this = code.hot_path(), case(launch)
    exponentials = sum("MUFU.EX2" in instruction for instruction in path)
    a_logit = 2 if this["softcap"] else 1  # the other one is in tanh
    if this["softcap"] and this["case"] == "gradient":
        exponentials -= 1  # the row's maximum goes through the cap too
    block, warps = launch.arguments["BLOCK"], launch.arguments["num_warps"]
    if not exponentials or exponentials % a_logit or (exponentials // a_logit) % (block // (32 * warps)):
        raise RuntimeError(f"{this}, sm_{architecture}: {exponentials} exponentials in the loop, {block=}, {warps=}")
    return {
        **this,
        "architecture": f"sm_{architecture}",
        "block": block,
        "warps": warps,
        "registers": int(usage[0]),
        "stack_bytes": int(usage[1]),
        "spill_instructions": sum(bool(re.search(r"\b(LDL|STL)\b", instruction)) for instruction in code.text),
        "instructions": len(code.text),
        "hot_path": len(path),
        "per_element": round(len(path) * a_logit / exponentials, 2),
        "at_most": round(code.longest_path() * a_logit / exponentials, 2),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A markdown table of the figures."""
    lines = [
        "| kernel | logits | mask | soft cap | GPU | block, warps | registers | spills | instructions per logit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        flags = ["yes" if row[flag] else "" for flag in ("mask", "softcap")]
        shape = f"{row['block']}, {row['warps']}"
        spills = f"{row['spill_instructions']} ({row['stack_bytes']} bytes)" if row["spill_instructions"] else "0"
        figures = [str(row["registers"]), spills, f"{row['per_element']:.1f}"]
        lines.append(f"| {' | '.join([row['case'], row['dtype'], *flags, row['architecture'], shape, *figures])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every specialisation in use, not only the main ones")
    parser.add_argument("--json", action="store_true", help="print one JSON list and nothing else")
    parser.add_argument("--output", type=Path, help="a result file, with versions and date")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        raise SystemExit("kernel_code: TRITON_INTERPRET is set, which turns kernels into Python: unset it to compile")
    rows = [
        described(launch, architecture) for launch in specialisations(arguments.all) for architecture in ARCHITECTURES
    ]
    print(json.dumps(rows) if arguments.json else table(rows))
    if arguments.output:
        result = {
            "benchmark": "kernel_code",
            "kernels": rows,
            "environment": {
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "packages": {name: importlib.metadata.version(name) for name in ("triton", "torch")},
                "command": " ".join(["python benchmarks/kernel_code.py", *sys.argv[1:]]),
            },
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
