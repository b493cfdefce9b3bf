"""Everything that only a GPU can tell, in one command that fits a time budget.

    python benchmarks/accelerator.py --minutes 9 --output RESULTS     # on a machine with a CUDA device
    python benchmarks/accelerator.py --rehearse                       # the same parts on a CPU, in tiny sizes

Each part is a command of its own, in a process group with a time limit, and what it found is saved as it ends: a part
that fails, hangs or is stopped takes nothing from the others. The same command goes on after a stop, with what is not
done yet; `--parts NAME ...` runs these again. The result files in RESULTS have the names that the pages read:
copied into benchmarks/results they are published by `python benchmarks/kernel_speed.py --table`.
benchmarks/RUNBOOK.md says what to bring, how long each part takes and what to change first.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SUMMARY, LOG = "accelerator.json", "accelerator.log"
TAIL = 1500  # characters of a failed command's output that the summary keeps
LEAST_SECONDS = 20.0  # with less than this left, no part is begun
# Settings of a run that takes seconds on a CPU: every path of it, no figure of use.
TINY = ["trainer.per_device_train_batch_size=16", "trainer.num_generations=4", "evaluation.problems=2",
        "evaluation.samples=2"]  # fmt: skip
SHORT = ["trainer.max_steps=4", "trainer.save_steps=4"]  # two rollouts


class StoppedError(Exception):
    """A command did not end well: why, and the end of what it said."""


@dataclass
class Place:
    """Where the parts run, what they may take, and what they leave."""

    output: Path
    work: Path
    rehearsal: bool
    deadline: float
    recipe: str = "countdown"  # of the parts that train
    limit: float = field(default=0.0, init=False)  # of the part at work, on the same clock

    def command(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        """Run `python ARGUMENTS` in the checkout until it ends or its time is over, then with all that it started.

        Raises StoppedError where it fails or is late.
        """
        source = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
        alone = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} if self.rehearsal else {}
        environment = os.environ | alone | {"PYTHONPATH": source, "HF_HUB_OFFLINE": "1"} | (env or {})
        with (self.output / LOG).open("a+", encoding="utf-8", errors="replace") as log:
            log.write(f"\n$ python {' '.join(arguments)}\n")
            log.flush()
            start = log.tell()
            process = subprocess.Popen(
                [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )
            try:
                status = process.wait(max(0.0, self.limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise StoppedError("out of time") from None
            finally:
                end(process)
            log.seek(start)
            if status != 0:
                raise StoppedError(f"exit code {status}: ...{log.read()[-TAIL:]}")

    def device(self) -> str:
        return "cpu" if self.rehearsal else "cuda"

    def result(self, name: str) -> Path:
        """A result file. A rehearsal's figures are of no use: no page reads a file of that name."""
        return self.output / f"{name}_{'rehearsal' if self.rehearsal else 'cuda'}.json"

    def seconds_left(self) -> float:
        return self.limit - time.monotonic()


def end(process: "subprocess.Popen[bytes]") -> None:
    """The process and its group are gone afterwards."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


# ---- the parts: each returns what the summary should say of it ----------------------------------------------------


def checks(place: Place) -> dict[str, Any]:
    """Every test of the kernels on the device, forward and backward, adversarial rows included."""
    report = place.work / "checks.xml"
    chosen = "triton and (every_kind_of_row or lowest_logit or 16_bit_logits)" if place.rehearsal else "not chunked-"
    files = ["tests/kernels/test_engines.py", *([] if place.rehearsal else ["tests/kernels/test_kernels.py"])]
    interpreter = {"TRITON_INTERPRET": "1"} if place.rehearsal else {}
    report.unlink(missing_ok=True)  # of a former try
    failure = None
    try:
        place.command("-m", "pytest", *files, "-k", chosen, "-m", "", f"--junitxml={report}", env=interpreter)
    except StoppedError as error:
        failure = error
    if not report.exists():
        raise failure or StoppedError("pytest wrote no report")
    counts, failed = verdicts(report)
    if failed or failure or not counts["passed"]:
        raise StoppedError(f"{counts}; failed: {'; '.join(failed) or failure}")
    return counts


def verdicts(report: Path) -> tuple[dict[str, int], list[str]]:
    """Numbers of tests by verdict in a JUnit report, and the names of those that failed."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [str(c.get("name")) for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    return {"passed": len(cases) - len(failed) - skipped, "failed": len(failed), "skipped": skipped}, failed


def kernels(place: Place) -> dict[str, Any]:
    """Time, memory and error of the kernels beside their peers and the bandwidth of a copy."""
    result = place.result("kernels")
    quick = ["--quick"] if place.rehearsal else []
    place.command("benchmarks/kernel_speed.py", "--device", place.device(), *quick, "--output", str(result))
    return {"sections": len(json.loads(result.read_text(encoding="utf-8"))["sections"])}


def tuning(place: Place) -> dict[str, Any]:
    """Other block sizes, warps and tiles than the engine's own, added to the file of `kernels`."""
    if place.rehearsal:
        return {"note": "sweeps need a CUDA device: their code is that of the kernels' benchmark"}
    result = place.result("kernels")
    place.command("benchmarks/kernel_speed.py", "--device", "cuda", "--tune", "--output", str(result))
    return {"sweeps": len(json.loads(result.read_text(encoding="utf-8"))["tune"])}


def trainer(place: Place) -> dict[str, Any]:
    """A step of PolarityTrainer against one of GRPOTrainer: time, time without generation, peak memory."""
    result = place.result("trainer_step")
    size = (
        ["--steps", "2", "--prompts", "2", "--group", "4", "--size", "tiny"]
        if place.rehearsal
        else ["--steps", "12", "--prompts", "16", "--group", "8", "--size", "0.6b"]
    )
    place.command("benchmarks/trainer_step.py", "--device", place.device(), *size, "--updates", "2",
                  "--only-grpo-and-papo", "--output", str(result))  # fmt: skip
    figures = json.loads(result.read_text(encoding="utf-8"))
    return {name: figures[name] for name in ("papo_to_grpo", "papo_update_to_grpo_update", "peak_bytes")}


def sharded(place: Place) -> dict[str, Any]:
    """Steps under FSDP 2 and ZeRO-2 with one rank, and whether they measure the entropy that one process measures."""
    found: dict[str, Any] = {"alone": entropies(place, "alone", [])}
    # Neither runs without a GPU: rehearsed is accelerate's launch for CPUs.
    plain = {"cpu": ["--cpu", "--num_machines", "1", "--mixed_precision", "no"]}
    files = {name: ["--config_file", str(ROOT / f"examples/accelerate/{name}.yaml")] for name in ("fsdp", "zero2")}
    for name, launch in (plain if place.rehearsal else files).items():
        launcher = ["-m", "accelerate.commands.launch", *launch, "--num_processes", "1"]
        try:
            found[name] = entropies(place, name, launcher)
        except StoppedError as error:
            found[name] = str(error)
    different = [name for name, e in found.items() if not isinstance(e, list) or not near(e, found["alone"])]
    if different:
        raise StoppedError(f"{', '.join(different)}: {found}")
    return found


def entropies(place: Place, name: str, launch: list[str]) -> list[float]:
    """The entropies that two rollouts of examples/distributed.py log."""
    folder = place.work / f"sharded-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    many = ["trainer.per_device_train_batch_size=256"]  # a mean entropy with little noise
    chosen = [*TINY, *SHORT, *([] if place.rehearsal else many), f"trainer.use_cpu={str(place.rehearsal).lower()}"]
    settings = [f"--set={setting}" for setting in chosen]
    place.command(*launch, "examples/distributed.py", "countdown", "--output", str(folder), *settings)
    (state,) = folder.glob("checkpoints/checkpoint-4/trainer_state.json")
    history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
    return [row["polarity/entropy"] for row in history if "polarity/entropy" in row]


def near(a: list[float], b: list[float]) -> bool:
    """To what bf16 weights leave of an entropy: a sharded policy may sample other tokens."""
    return len(a) == len(b) > 0 and all(abs(x - y) < 0.1 * abs(y) for x, y in zip(a, b, strict=True))


def learning(place: Place) -> dict[str, Any]:
    """GRPO against the recipe's PAPO on the same seeds, one more pair as long as there is time; evaluated before and
    after."""
    folder, result = place.work / "learning", place.result("learning")
    result.unlink(missing_ok=True)  # of a former try; what is finished in the folder is kept
    settings = [*TINY, *SHORT, "trainer.use_cpu=true"] if place.rehearsal else ["trainer.use_cpu=false"]
    seeds: list[str] = []
    how = ["--jobs", "2", "--output", str(folder), *(f"--set={setting}" for setting in settings)]
    while len(seeds) < (1 if place.rehearsal else 10):
        began = time.monotonic()
        seeds.append(str(len(seeds)))
        try:
            place.command("-m", "entropy_polarity.cli", "compare", place.recipe,
                          "--methods", "grpo", "papo", "--seeds", *seeds, *how)  # fmt: skip
        except StoppedError:
            if not result.exists():
                raise
            break
        shutil.copy(folder / "comparison.json", result)
        if place.seconds_left() < 1.2 * (time.monotonic() - began):
            break
    return {"pairs": len(json.loads(result.read_text(encoding="utf-8"))["runs"]) // 2}


def audit(place: Place) -> dict[str, Any]:
    """Does polarity predict the entropy change of an update on this device?"""
    folder, steps = place.work / "audit", "8" if place.rehearsal else "40"
    settings = [*TINY, "trainer.use_cpu=true"] if place.rehearsal else ["trainer.use_cpu=false"]
    place.command("-m", "entropy_polarity.cli", "audit", place.recipe, "--steps", steps,
                  "--output", str(folder), *(f"--set={s}" for s in settings))  # fmt: skip
    shutil.copy(folder / "audit.json", place.result("audit"))
    return {"updates": int(steps)}


class Part(NamedTuple):
    """`minutes` is the most it may take on a GPU."""

    run: Callable[[Place], dict[str, Any]]
    minutes: float


# What nobody knows comes first.
PARTS = {
    "checks": Part(checks, 2.5),
    "kernels": Part(kernels, 4.0),
    "trainer": Part(trainer, 3.0),
    "sharded": Part(sharded, 1.5),
    "learning": Part(learning, 4.0),
    "audit": Part(audit, 1.5),
    "tuning": Part(tuning, 3.0),
}


# ---- the whole -----------------------------------------------------------------------------------------------------


def run_parts(place: Place, names: list[str], parts: dict[str, Part] = PARTS, again: bool = False) -> dict[str, Any]:
    """Run the parts in order, save the summary after each, and return it. `again`: also those that are done."""
    summary = read_summary(place)
    for name in names:
        if summary["parts"].get(name, {}).get("status") == "done" and not again:
            continue
        began = time.monotonic()
        left = place.deadline - began
        if left < LEAST_SECONDS:
            summary["parts"].setdefault(name, {"status": "not begun", "why": f"{max(0.0, left):.0f} s were left"})
        else:
            place.limit = min(place.deadline, began + 60 * parts[name].minutes)
            try:
                outcome = {"status": "done", "found": parts[name].run(place)}
            except (StoppedError, OSError, ValueError, KeyError) as error:
                outcome = {"status": "failed", "why": f"{type(error).__name__}: {error}"}
            summary["parts"][name] = outcome | {"seconds": round(time.monotonic() - began, 1)}
        save(summary, place.output / SUMMARY)
        print(line(name, summary["parts"][name]), flush=True)
    return summary


def read_summary(place: Place) -> dict[str, Any]:
    path = place.output / SUMMARY
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before.get("rehearsal") == place.rehearsal:
            return before
        raise SystemExit(f"{path} is of {'a rehearsal' if before.get('rehearsal') else 'a GPU'}: give another --output")
    return {"benchmark": "accelerator", "rehearsal": place.rehearsal, "environment": machine(place), "parts": {}}


def machine(place: Place) -> dict[str, Any]:
    """Versions, date and card. Torch is asked in a process of its own: this one holds no memory of the device."""
    code = "import json; from entropy_polarity.support.provenance import environment as e; print(json.dumps(e(seed=0)))"
    card = "import torch; print(torch.cuda.get_device_name())"
    source = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}

    def ask(question: str) -> str:
        asked = [sys.executable, "-c", question]
        answer = subprocess.run(asked, capture_output=True, encoding="utf-8", env=source, timeout=120)
        if answer.returncode != 0:
            raise SystemExit(f"this machine cannot run the parts: {answer.stderr.strip().splitlines()[-1]}")
        return answer.stdout.strip()

    found = json.loads(ask(code))
    found.pop("command")
    return found | {"card": platform.processor() or "CPU" if place.rehearsal else ask(card)}


def save(summary: dict[str, Any], path: Path) -> None:
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def line(name: str, outcome: dict[str, Any]) -> str:
    told = outcome.get("found") or outcome.get("why", "")
    return f"{name:9} {outcome['status']:9} {outcome.get('seconds', 0):6.1f} s  {str(told)[:300]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="for all parts (default: 9; of a rehearsal: 15)")
    parser.add_argument("--output", type=Path, help="where the result files go (default: runs/accelerator)")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), help="these, also where they are done already")
    parser.add_argument("--recipe", default="countdown", help="what `learning` and `audit` train: a name or a path")
    parser.add_argument("--rehearse", action="store_true", help="every part on a CPU, tiny: its figures are of no use")
    arguments = parser.parse_args()
    minutes = arguments.minutes or (15 if arguments.rehearse else 9)
    output = (arguments.output or ROOT / "runs/accelerator").resolve()
    work, deadline = output.with_name(f"{output.name}-work"), time.monotonic() + 60 * minutes
    place = Place(output, work, arguments.rehearse, deadline, arguments.recipe)
    for folder in (place.output, place.work):
        folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped: the same command goes on"))
    summary = run_parts(place, arguments.parts or list(PARTS), again=arguments.parts is not None)
    if any(part["status"] != "done" for part in summary["parts"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
