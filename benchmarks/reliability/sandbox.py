"""Attack the tool `python` from inside, with and without each of its layers, and count what held.

    python benchmarks/reliability/sandbox.py [--output FILE]

Every program of attacks.py runs behind all layers, behind the operating system's boundary alone with all of Python's
names open, and behind its filter alone, as root where this is root. After each it is looked at whether a file, a
process, a listener, memory, the environment or the trainer noticed (attacked.py). Then every number that a call to the
kernel can have is called behind the filter (on x86-64): none but those of the list may be answered. Last, the programs
that must succeed where nothing stands in their way do: the test can fail. Then a call's time with the boundary and
without it, in turns. About two minutes on two cores; needs Linux and the extra [tools].
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from reliability.attacked import Layers, Scene
from reliability.attacks import ATTACKS, Attack

from entropy_polarity.support.provenance import environment
from entropy_polarity.tasks.boundary import examine
from entropy_polarity.tasks.tools import MEMORY_BYTES
from entropy_polarity.tasks.workers import Workers

RESULT = Path(__file__).parents[1] / "results" / "reliability-sandbox.json"
CALLS = 1024  # numbers of calls; the kernel has about 470
# Of x86-64: munmap, brk, sched_yield, mremap, getpid, gettimeofday, gettid, time, futex, restart_syscall,
# clock_gettime, clock_getres, getrandom. A call without arguments of exit, exit_group and sigreturn ends the program.
ANSWERED = {11, 12, 24, 25, 39, 96, 186, 201, 202, 219, 228, 229, 318}
ENDING = {15, 60, 231}
UNFILTERED = {
    335,
    336,
}  # uretprobe and uprobe, which Linux answers before any filter: by a signal that ends the process
_SWEEP = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
print([n for n in NUMBERS if libc.syscall(n, 0, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != 1])
"""
CALLED = {
    "1 + 1": 200,
    "import sympy\nx = sympy.Symbol('x')\nsympy.integrate(sympy.exp(-x**2), (x, -sympy.oo, sympy.oo))": 40,
}


def attacked(layers: Layers, attacks: list[Attack], seconds: float = 2.0) -> dict[str, Any]:
    """How many of the programs held; of the others, what came."""
    failures, said = [], {}
    with tempfile.TemporaryDirectory() as folder, Scene(Path(folder), layers, seconds) as scene:
        for attack in attacks:
            effects, _ = scene.attempt(attack)
            said[attack.group] = said.get(attack.group, 0) + 1
            if effects:
                failures.append({"layers": layers, "attack": f"{attack.group}: {attack.title}", "effects": effects})
    return {"tried": len(attacks), "held": len(attacks) - len(failures), "groups": said, "failures": failures}


def swept(layers: Layers) -> dict[str, Any]:
    """Every number of a call, without arguments: which were answered other than by EPERM."""
    numbers = sorted({*range(CALLS)} - ENDING - UNFILTERED)
    with tempfile.TemporaryDirectory() as folder, Scene(Path(folder), layers, 10) as scene:
        _, said = scene.attempt(Attack("calls", "all", _SWEEP.replace("NUMBERS", str(numbers)), False))
        answered = set(json.loads(said))
        failures = [
            {"layers": layers, "attack": f"call {number}", "effects": ["answered"]} for number in answered - ANSWERED
        ]
    return {
        "tried": len(numbers),
        "held": len(numbers) - len(failures),
        "answered": sorted(answered),
        "failures": failures,
    }


def timed() -> dict[str, Any]:
    """Milliseconds of a call of the tool, with the boundary and without it, in turns: medians of all and of the pairs'
    differences."""
    found = {}
    with Workers(
        "entropy_polarity.tasks.sandbox:run", seconds=60, memory_bytes=MEMORY_BYTES, count=1, isolated=True
    ) as box:
        box.map([("1", 60.0, False)])
        for code, count in CALLED.items():
            took: dict[bool, list[float]] = {True: [], False: []}
            for turn in range(count):
                for without in (True, False) if turn % 2 else (False, True):
                    began = perf_counter()
                    (outcome,) = box.map([(code, 5.0, without)])
                    took[without].append(1000 * (perf_counter() - began))
                    assert not outcome.failure, outcome
            found[code] = {
                "calls": count,
                "load": os.getloadavg()[0],  # of the machine, in processes: above its cores all of this takes longer
                "with": statistics.median(took[False]),
                "without": statistics.median(took[True]),
                "difference": statistics.median(a - b for a, b in zip(took[False], took[True], strict=True)),
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Attack the tool python, and count what held.")
    parser.add_argument("--output", type=Path, default=RESULT)
    output = parser.parse_args().output
    parts = {}
    for layers in ("all", "boundary", "seccomp"):
        parts[f"programs, layers: {layers}"] = attacked(layers, ATTACKS)
        print(layers, parts[f"programs, layers: {layers}"]["held"], "of", len(ATTACKS), flush=True)
    if platform.machine() == "x86_64":
        for layers in ("boundary", "seccomp"):
            parts[f"calls to the kernel, layers: {layers}"] = swept(layers)
    failures = [failure for part in parts.values() for failure in part.pop("failures")]
    must = [attack for attack in ATTACKS if attack.must_succeed]
    control = attacked("none", must)
    seen = {failure["attack"]: failure["effects"] for failure in control["failures"]}
    document = {
        "benchmark": "reliability-sandbox",
        "environment": {k: v for k, v in environment(0).items() if k != "command"},
        "boundary": examine().parts,
        "tried": sum(part["tried"] for part in parts.values()),
        "held": sum(part["held"] for part in parts.values()),
        "parts": parts,
        "without any layer": {"tried": len(must), "succeeded": len(seen), "effects": seen},
        "milliseconds of a call": timed(),
        "failures": failures,
    }
    output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: document[key] for key in ("tried", "held", "failures")}))
    if failures or len(seen) < len(must):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
