"""Is a run lost, followed wrongly or let out of its folder? Kills, damaged files, clocks, two processes, links.

    python benchmarks/reliability/runs.py --output benchmarks/results/reliability-runs.json

A short training is killed again and again, at random moments and inside its writes to the disk, and resumed; it must
end with the metrics and the weights of the one that was never killed, to the last bit. Then every file of a checkpoint
and of the record is harmed in every way named below: the run must be refused in one line that names the file, or go the
same way. The seeds are fixed; where a kill by the clock falls is not. About three minutes of one core.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from entropy_polarity.experiments.models import weights_of
from entropy_polarity.experiments.results import provenance, write_document
from entropy_polarity.experiments.training import train
from entropy_polarity.report.page import render_page
from entropy_polarity.runs.checkpoints import checkpoint_step, last_checkpoint, own_checkpoints
from entropy_polarity.runs.recipe import load_recipe, with_flags
from entropy_polarity.runs.record import Run
from entropy_polarity.runs.resuming import resume_run

RECIPE = load_recipe(
    "countdown",
    ["trainer.per_device_train_batch_size=16", "trainer.num_generations=4", "trainer.max_steps=8",
     "trainer.save_steps=2", "evaluation.problems=2", "evaluation.samples=2", "task.numbers=[3]"],
)  # fmt: skip
SHORTER = with_flags(RECIPE, max_steps=6)


class Part:
    """What was tried of one kind, and what did not hold."""

    def __init__(self, name: str) -> None:
        self.name, self.tried, self.failures, self.notes = name, 0, [], {}

    def expect(self, held: bool, what: str) -> None:
        self.tried += 1
        if not held:
            self.failures.append(f"{self.name}: {what}")

    def to_json(self) -> dict[str, Any]:
        return {"tried": self.tried, "held": self.tried - len(self.failures), **self.notes}


# ---- processes of our own: forked, so that a kill costs no second import of everything --------------------------


def start(action: Callable[[], Any], log: Path) -> int:
    """A process that does `action` and ends with 0, or with 1 and what was raised in `log`."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        action()
        code = 0
    except BaseException as error:
        log.write_text("".join(traceback.format_exception_only(error)), encoding="utf-8")
    finally:
        os._exit(code)


def ended(process: int, within: float | None = None) -> int | None:
    """How a process ended; None if it is still there after `within` seconds."""
    until = None if within is None else time.monotonic() + within
    while True:
        found, status = os.waitpid(process, 0 if until is None else os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if until is not None and time.monotonic() > until:
            return None
        time.sleep(0.005)


def go_on(run: Path) -> Callable[[], Any]:
    """Begin or resume, as whoever restarts a killed command does; what is no run yet makes room."""

    def action() -> None:
        is_run = (run / "config.toml").is_file()
        if not is_run:
            shutil.rmtree(run, ignore_errors=True)
        train(RECIPE, run, resume=is_run)

    return action


def killed_at_write(run: Path, number: int) -> Callable[[], Any]:
    """The same, killed by itself just before the disk call of that number."""

    def action() -> None:
        calls = iter(range(number))
        for module, name in ((os, "fsync"), (os, "replace"), (os, "unlink"), (shutil, "rmtree")):
            setattr(module, name, counted(getattr(module, name), calls))
        go_on(run)()

    return action


def counted(call: Callable[..., Any], calls: Iterator[int]) -> Callable[..., Any]:
    def checked(*arguments: Any, **named: Any) -> Any:
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **named)

    return checked


def outcome(
    run: Path, without: str = "step_time"
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], bytes, dict[str, Any]]:
    """Metrics without the clock, rollouts, weights, summary. `without` a column more: the epochs of a run that was made
    longer were longer."""
    read = Run.read(run)
    metrics = [
        {name: value for name, value in row.items() if name not in ("step_time", without)} for row in read.metrics
    ]
    last = last_checkpoint(run)
    assert last is not None
    return metrics, read.rollouts, (last / "model.safetensors").read_bytes(), read.summary


# ---- what is tried --------------------------------------------------------------------------------------------


def kills(part: Part, folder: Path, whole: Path, count: int, seconds: float, in_writes: bool) -> None:
    """Chains of kills, each to the end: a run is killed until it is through, then compared."""
    draw, chain, at = random.Random(part.name), 0, []
    while len(at) < count:
        run, killed = folder / f"{part.name}-{chain}", 0
        while len(at) < count and killed < 5:
            number, moment = draw.randrange(1, 140), draw.uniform(0, seconds / 2)
            action = killed_at_write(run, number) if in_writes else go_on(run)
            process = start(action, folder / "log")
            code = ended(process, None if in_writes else moment)
            if code is None:
                os.kill(process, signal.SIGKILL)
                code = ended(process)
            if code != -signal.SIGKILL:
                break  # it was faster, or failed: looked at below
            killed += 1
            at.append(number if in_writes else round(moment, 2))
        if not (run / "summary.json").is_file() or Run.read(run).summary.get("status") != "finished":
            ended(start(go_on(run), folder / "log"))
        is_run = (run / "config.toml").is_file()
        held = is_run and Run.read(run).summary.get("status") == "finished" and outcome(run) == outcome(whole)
        reason = (folder / "log").read_text(encoding="utf-8") if (folder / "log").is_file() else "another path"
        for _ in range(max(killed, 0 if held else 1)):
            part.expect(held, f"chain {chain}, kills at {at[-killed:]}: {reason}")
        chain += 1
    part.notes = {"chains": chain, "at": at}


def flipped(whole: bytes, place: int) -> bytes:
    return whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :]


HARMS: dict[str, Callable[[bytes], bytes | None]] = {
    "deleted": lambda whole: None,
    "truncated": lambda whole: whole[: len(whole) // 2],
    "emptied": lambda whole: b"",
    "zeroed": lambda whole: bytes(len(whole)),
    "zeroed in part": lambda whole: whole[:-64] + bytes(64),
    "one bit flipped": lambda whole: flipped(whole, len(whole) // 3),
}


def harmed(file: Path, harm: Callable[[bytes], bytes | None]) -> bytes:
    whole = file.read_bytes()
    content = harm(whole)
    file.unlink() if content is None else file.write_bytes(content)
    return whole


def refused(call: Callable[[], Any], *needed: str) -> str | None:
    """None where `call` ends in one line that has what is needed, else what it did."""
    try:
        call()
    except (ValueError, OSError) as error:
        line = str(error)
        return None if "\n" not in line and all(word in line for word in needed) else f"said {line!r}"
    except Exception as error:
        return f"raised {type(error).__name__}: {error}"
    return "was accepted"


def resumed(run: Path) -> Callable[[], Any]:
    return lambda: resume_run(run, RECIPE.to_dict())


def checkpoint_files(part: Part, run: Path) -> None:
    newest = run / "checkpoints/checkpoint-6"
    for file in sorted(newest.rglob("*")):
        for name, harm in HARMS.items():
            whole = harmed(file, harm)
            needed = (file.name, "--from-checkpoint 4") if name != "deleted" or file.suffix != ".json" else (file.name,)
            if file.name == "polarity_state.json" and name == "deleted":
                needed = ("checkpoint-6",)
            wrong = refused(resumed(run), *needed)
            part.expect(wrong is None, f"{file.name} {name}: {wrong}")
            file.write_bytes(whole)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        for what, harm in HARMS.items():
            whole = harmed(newest / name, harm)
            wrong = refused(lambda: weights_of(str(run)), name, "checkpoint-4 beside it is whole")
            part.expect(wrong is None, f"evaluation, {name} {what}: {wrong}")
            (newest / name).write_bytes(whole)


def older_checkpoints(part: Part, run: Path, log: Path, whole: Path, scratch: Path) -> None:
    """A checkpoint without sums: refused by the name of the file, or the same path."""
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        for what in ("deleted", "truncated", "zeroed"):
            shutil.rmtree(scratch, ignore_errors=True)
            shutil.copytree(run, scratch)
            for checkpoint in (scratch / "checkpoints").glob("checkpoint-*"):
                state = json.loads((checkpoint / "polarity_state.json").read_text(encoding="utf-8"))
                kept = {key: state[key] for key in ("method", "settings", "state", "resumable")}
                (checkpoint / "polarity_state.json").write_text(json.dumps(kept), encoding="utf-8")
            harmed(scratch / "checkpoints/checkpoint-6" / name, HARMS[what])
            log.unlink(missing_ok=True)
            code = ended(start(go_on(scratch), log))
            said = log.read_text(encoding="utf-8").strip() if log.is_file() else ""
            kind = said.partition(":")[0]
            named = kind in ("ValueError", "FileNotFoundError", "OSError") and "checkpoint-6" in said
            part.expect(
                named if code else outcome(scratch, "epoch") == outcome(whole, "epoch"),
                f"{name} {what}: {said or 'another path'}",
            )


def clocks(part: Part, run: Path, folder: Path, whole: Path) -> None:
    now = time.time()
    for name, date in (("tomorrow", lambda step: now + 86_400), ("ten years on", lambda step: now + 3.2e8),
                       ("the older the newer", lambda step: now + 1e6 - 1e4 * step)):  # fmt: skip
        scratch = folder / f"clock {name}"
        shutil.copytree(run, scratch)
        for checkpoint in own_checkpoints(scratch / "checkpoints"):
            for path in (checkpoint, *checkpoint.rglob("*")):
                os.utime(path, (date(checkpoint_step(checkpoint)), date(checkpoint_step(checkpoint))))
        code = ended(start(go_on(scratch), folder / "log"))
        left = [checkpoint_step(path) for path in own_checkpoints(scratch / "checkpoints")]
        part.expect(
            code == 0 and left == [6, 8] and outcome(scratch, "epoch") == outcome(whole, "epoch"),
            f"{name}: {code}, left {left}",
        )


def two_processes(part: Part, folder: Path, whole: Path, seconds: float, count: int) -> None:
    run, draw = folder / "two", random.Random(0)
    first = start(go_on(run), folder / "first")
    for _ in range(count):
        while not (run / "config.toml").is_file():
            time.sleep(0.02)
        time.sleep(draw.uniform(0, seconds / count / 2))
        if ended(first, 0.0) is not None:
            break
        (folder / "second").unlink(missing_ok=True)
        code = ended(start(go_on(run), folder / "second"))
        said = (folder / "second").read_text(encoding="utf-8") if (folder / "second").is_file() else ""
        part.expect(code == 1 and "another process is at work" in said, f"second process: {code} {said}")
    else:
        ended(first)
    part.expect(outcome(run) == outcome(whole), "the first process took another path")


LINKS = ("tokens", "checkpoints", "checkpoints/README.md", "checkpoints/checkpoint-8", "checkpoints/checkpoint-6",
         "checkpoints/checkpoint-6/model.safetensors", "tokens/000007.parquet", "metrics.jsonl", "rollouts.jsonl",
         "summary.json", "config.toml.part", "report.html", "lock", "deep")  # fmt: skip


def links(part: Part, run: Path, folder: Path) -> None:
    """A link out of the run, to a file or a folder with files under our names: refused, and nothing changes there."""
    target = folder / "precious"
    for place in LINKS:
        for to_folder in (True, False):
            scratch = folder / "linked"
            shutil.rmtree(scratch, ignore_errors=True)
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(run, scratch)
            target.mkdir()
            for name in ("notes.txt", "000009.parquet", "000009.part", "polarity_state.json", "config.toml"):
                (target / name).write_text("mine", encoding="utf-8")
            path = scratch / place
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            path.symlink_to(target if to_folder else target / "notes.txt")
            wrong = refused(resumed(scratch))
            there = {p.name: p.read_text(encoding="utf-8") for p in target.iterdir()}
            untouched = len(there) == 5 and set(there.values()) == {"mine"}
            part.expect(wrong is None and untouched, f"{place} -> {'folder' if to_folder else 'file'}: {wrong}")


def records(part: Part, run: Path) -> None:
    config = (run / "config.toml").read_bytes()
    for end in range(0, len(config), 5):
        (run / "config.toml").write_bytes(config[:end])
        wrong = refused(resumed(run), "config.toml")
        kept = (run / "config.toml").read_bytes() == config[:end]
        part.expect(wrong is None and kept, f"config.toml cut at {end}: {wrong}")
    (run / "config.toml").write_bytes(config)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        whole = (run / name).read_bytes()
        lines = whole.splitlines(keepends=True)
        first = json.loads(lines[0])["step"]
        ends = f"{name} ends at step {first}, the checkpoint is of step 6"
        early = b"".join(line for line in lines if json.loads(line)["step"] == first)
        for what, content, needed in (
            ("shortened", early, ends),
            ("shortened inside a line", early + lines[-1][:-9], ends),
            ("with a tail of NUL", early + bytes(500), ends),
            ("with a line of NUL", early + bytes(50) + b"\n" + whole, "damaged in line"),
            ("a list", b"[" + whole.replace(b"\n", b",")[:-1] + b"]\n", "ends at step 0"),
            ("lists in lines", b"[1]\n" + whole, "damaged in line 1"),
            ("nested", b"[" * 100_000 + b"\n" + whole, "damaged in line 1"),
            ("without steps", b"{}\n" + whole, "damaged in line 1"),
            ("not UTF-8", b'{"step": 1, "\xff": 1}\n' + whole, "damaged in line 1"),
            ("deleted", None, "ends at step 0"),
        ):
            (run / name).unlink() if content is None else (run / name).write_bytes(content)
            wrong = refused(resumed(run), name, needed, "--from-checkpoint 6")
            part.expect(wrong is None, f"{name} {what}: {wrong}")
            (run / name).write_bytes(whole)
    for name in ("summary.json", "environment.json"):
        for what, harm in (HARMS | {"nested": lambda whole: b"[" * 100_000, "a list": lambda whole: b"[]"}).items():
            whole = harmed(run / name, harm)
            if what not in ("one bit flipped",):  # another letter is still JSON
                wrong = refused(lambda: Run.read(run), name)
                part.expect(wrong is None, f"{name} {what}: {wrong}")
            (run / name).write_bytes(whole)


def token_files(part: Part, run: Path) -> None:
    """The page is made, and says which rollout it leaves out."""
    for file in sorted((run / "tokens").glob("*.parquet")):
        for what, harm in HARMS.items():
            whole = harmed(file, harm)
            page = render_page(Run.read(run))
            # Parquet has no sums of its own: a bit in a number is another number.
            part.expect(f"{file} is" in page or what in ("one bit flipped",), f"{file.name} {what}: not said")
            file.write_bytes(whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="half at random moments, half inside writes")
    parser.add_argument("--output", type=Path, help="the result file")
    arguments = parser.parse_args()
    names = ("kills at random moments", "kills inside writes", "files of a checkpoint",
             "checkpoints of older versions", "clocks set back", "two processes", "links", "records",
             "token files")  # fmt: skip
    parts = {name: Part(name) for name in names}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        whole, short = folder / "whole", folder / "short"
        began = time.monotonic()
        for recipe, run in ((RECIPE, whole), (SHORTER, short)):
            code = ended(start(lambda recipe=recipe, run=run: train(recipe, run), folder / "log"))
            assert code == 0, (folder / "log").read_text(encoding="utf-8")
        seconds = (time.monotonic() - began) * 2 / 3
        half = arguments.kills // 2
        tried: tuple[Callable[[Part], None], ...] = (
            lambda part: kills(part, folder, whole, arguments.kills - half, seconds, in_writes=False),
            lambda part: kills(part, folder, whole, half, seconds, in_writes=True),
            lambda part: checkpoint_files(part, short),
            lambda part: older_checkpoints(part, short, folder / "log", whole, folder / "older"),
            lambda part: clocks(part, short, folder, whole),
            lambda part: two_processes(part, folder, whole, seconds, 5),
            lambda part: links(part, short, folder),
            lambda part: records(part, short),
            lambda part: token_files(part, short),
        )
        for part, attempt in zip(parts.values(), tried, strict=True):
            attempt(part)
            print(f"{part.name}: {part.tried - len(part.failures)} of {part.tried}", flush=True)
            for failure in part.failures[:5]:
                print("  ", failure[:300].replace(place, "..."), flush=True)
    document = {
        "benchmark": "reliability-runs",
        "environment": provenance(),
        "tried": sum(part.tried for part in parts.values()),
        "held": sum(part.tried - len(part.failures) for part in parts.values()),
        "parts": {part.name: part.to_json() for part in parts.values()},
        "failures": [failure.replace(place, "...") for part in parts.values() for failure in part.failures],
    }
    if arguments.output:
        write_document(arguments.output, document)
    sys.exit(document["tried"] != document["held"])


if __name__ == "__main__":
    main()
