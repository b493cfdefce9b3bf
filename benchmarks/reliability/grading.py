"""Grading and rewards, tried on all the real data there is, on answers that mean harm, and on scripted players.

    python benchmarks/reliability/grading.py [FOLDER] [--count N]

FOLDER holds gsm8k_train.jsonl, gsm8k_test.jsonl, math500.jsonl and svamp.jsonl (by default ../shared/data beside the
checkout). What is tried, each with the verdict it must have:

    MATH-500    every gold against its own solution, its own box and its own sentence: correct. Its solution cut off
                inside the last box: not parsed. Every gold against every other answer of the data set: accepted are
                those of tests/tasks/test_grading.py's EQUAL, which were looked at one by one, and no other
    GSM8K       every gold against its author's solution, and against the solution with another last number
    SVAMP       every gold, a decimal, against the whole number in a box, and against the next one
    hostile     --count answers that break parsers, fill memory, never end or are code: a verdict, nothing run, nothing
                accepted
    scraps      --count completions of random pieces of notation against random golds: a verdict
    games       TextArena's: the best player is paid 1, but for luck at cards, the worst 0 (20 seeds each; Sokoban 5)

It takes about a quarter of an hour on two cores. Writes benchmarks/results/reliability-grading.json.
"""

import argparse
import functools
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import permutations
from multiprocessing import Pool
from pathlib import Path
from typing import Any

from entropy_polarity.support.provenance import environment
from entropy_polarity.tasks import grading
from entropy_polarity.tasks.tables import golds
from entropy_polarity.tasks.workers import Workers

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))

RESULT = ROOT / "benchmarks" / "results" / "reliability-grading.json"
KNOWN = {"correct", "wrong", "not parsed", "timed out", "out of memory"}
Pairs = Sequence[tuple[str, str]]


class Campaign:
    """Counts what was tried and what held, part by part."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, Any]] = {}
        self.failures: list[dict[str, str]] = []

    def part(self, name: str, tried: Iterable[tuple[str, bool]], **more: Any) -> None:
        """Each trial is what it was, in words, and whether it held."""
        results = list(tried)
        held = sum(well for _, well in results)
        self.parts[name] = {"tried": len(results), "held": held, **more}
        self.failures += [{"part": name, "what": what[:300]} for what, well in results if not well]
        print(
            f"{name}: {held} of {len(results)} held", *(f"({key}: {value})" for key, value in more.items()), flush=True
        )

    def graded(self, name: str, workers: Workers, pairs: Pairs, wanted: set[str]) -> None:
        began = time.monotonic()
        outcomes = workers.map([("grade", [gold], text[-4000:]) for gold, text in pairs])
        verdicts = [outcome.value or outcome.failure for outcome in outcomes]
        trials = [
            (f"{gold!r} against {text[-200:]!r}: {verdict}", verdict in wanted)
            for (gold, text), verdict in zip(pairs, verdicts, strict=True)
        ]
        self.part(name, trials, verdicts=dict(Counter(verdicts)), seconds=round(time.monotonic() - began))


def main(folder: Path, count: int) -> None:
    campaign = Campaign()
    with Workers("entropy_polarity.tasks.grading:work", clock="processor", preload="math_verify") as workers:
        math_500(campaign, workers, rows(folder / "math500.jsonl"))
        gsm8k(campaign, workers, [*rows(folder / "gsm8k_test.jsonl"), *rows(folder / "gsm8k_train.jsonl")])
        svamp(campaign, workers, rows(folder / "svamp.jsonl"))
    with Workers(
        "entropy_polarity.tasks.grading:work", seconds=0.5, clock="processor", preload="math_verify"
    ) as workers:
        hostile(campaign, workers, count)
    games(campaign)
    others(campaign, rows(folder / "math500.jsonl"))
    where = environment(0)
    del where["command"]
    totals = {key: sum(part[key] for part in campaign.parts.values()) for key in ("tried", "held")}
    result = {"benchmark": "reliability-grading", "environment": where, **totals, "parts": campaign.parts}
    RESULT.write_text(json.dumps(result | {"failures": campaign.failures}, indent=1) + "\n", encoding="utf-8")
    print(f"{totals['held']} of {totals['tried']} held; {RESULT.relative_to(ROOT)}")


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def math_500(campaign: Campaign, workers: Workers, table: list[dict[str, Any]]) -> None:
    right, name = {"correct"}, "MATH-500, gold against its own "
    campaign.graded(f"{name}solution", workers, [(row["answer"], row["solution"]) for row in table], right)
    campaign.graded(f"{name}box", workers, [(row["answer"], rf"\boxed{{{row['answer']}}}") for row in table], right)
    sentences = [(row["answer"], f"The answer is ${row['answer']}$.") for row in table]
    campaign.graded(f"{name}sentence", workers, sentences, right)
    cut = [(row["answer"], row["solution"][: row["solution"].rindex("boxed{") + 7]) for row in table]
    campaign.graded("MATH-500, solution cut off in its last box", workers, cut, {"not parsed"})


def others(campaign: Campaign, table: list[dict[str, Any]]) -> None:
    """Of real data, so that no worker has to guard us; every process reads an answer once."""
    from test_grading import EQUAL

    answers = sorted({row["answer"] for row in table})
    with Pool() as processes:
        accepted = {
            (gold, other)
            for found in processes.starmap(accepts, [(gold, answers) for gold in answers])
            for gold, other in found
        }
    trials = [
        (f"{pair[0]!r} accepts {pair[1]!r}", pair not in accepted or any({*pair} <= equal for equal in EQUAL))
        for pair in permutations(answers, 2)
    ]
    campaign.part("MATH-500, gold against every other answer", trials, answers=len(answers), accepted=len(accepted))


def accepts(gold: str, answers: list[str]) -> list[tuple[str, str]]:
    """The gold with each of the other answers that it accepts."""
    return [(gold, other) for other in answers if other != gold and grading.same(read(gold), read(other))]


@functools.cache
def read(answer: str) -> grading.Answer:
    return grading.in_gold(answer)


def gsm8k(campaign: Campaign, workers: Workers, table: list[dict[str, Any]]) -> None:
    rng = random.Random(0)
    pairs = [(golds(row["answer"])[0], row["answer"]) for row in table]
    campaign.graded("GSM8K, gold against its author's solution", workers, pairs, {"correct"})
    changes = (lambda n: n + 1, lambda n: n - 1, lambda n: 10 * n + 1, lambda n: -n - 1, lambda n: 2 * n + 3)
    spoilt = [
        (gold, f"{text.rpartition('#### ')[0]}#### {rng.choice(changes)(float(gold)):.10g}") for gold, text in pairs
    ]
    campaign.graded("GSM8K, solution with another last number", workers, spoilt, {"wrong"})
    # The same without the mark, in a box.
    boxes = [(gold, rf"{text.rpartition('####')[0]}\boxed{{{gold}}}") for gold, text in pairs]
    campaign.graded("GSM8K, solution with its number in a box", workers, boxes, {"correct"})


def svamp(campaign: Campaign, workers: Workers, table: list[dict[str, Any]]) -> None:
    numbers = [float(row["Answer"]) for row in table]
    right = [(str(number), rf"\boxed{{{number:.10g}}}") for number in numbers]
    campaign.graded("SVAMP, gold against its number in a box", workers, right, {"correct"})
    wrong = [(str(number), rf"\boxed{{{number + 1:.10g}}}") for number in numbers]
    campaign.graded("SVAMP, gold against the next number", workers, wrong, {"wrong"})


def hostile(campaign: Campaign, workers: Workers, count: int) -> None:
    from test_grading import PIECES
    from test_math import hostile

    rng = random.Random(0)

    def scraps() -> str:
        return "".join(rng.choice(PIECES) for _ in range(rng.choice([3, 12, 60, 400])))[:4000]

    with tempfile.TemporaryDirectory() as folder:
        marker = Path(folder, "pwned")
        texts = [("123456789.5", hostile(rng, marker)) for _ in range(count)]
        campaign.graded("hostile answers", workers, texts, KNOWN - {"correct"})
        campaign.part("hostile answers: no code ran", [("a file was made", not marker.exists())])
    forms = ["{}", r"\boxed{{{}}}", "${}$"]
    pairs = [(rng.choice([scraps(), "9"]), rng.choice(forms).format(scraps())) for _ in range(count)]
    campaign.graded("scraps of notation", workers, pairs, KNOWN)


def games(campaign: Campaign) -> None:
    from test_textarena import SCRIPTED, played

    for name, (best, worst, turns) in SCRIPTED.items():
        seeds = range(5 if name == "Sokoban" else 20)
        ends = [played(name, seed, best, turns) for seed in seeds]
        # At cards the best player can lose.
        trials = [(f"{name} {seed}", end.reward == 1 or name == "Blackjack") for seed, (end, _) in enumerate(ends)]
        mean = sum(end.reward for end, _ in ends) / len(ends)
        campaign.part(f"{name}, best player", trials, reward=round(mean, 3), turns=max(env.moves for _, env in ends))
        if worst is not None:
            trials = [(f"{name} {seed}", played(name, seed, worst, 99)[0].reward == 0) for seed in seeds]
            campaign.part(f"{name}, worst player is paid 0", trials)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--count", type=int, default=2000)
    arguments = parser.parse_args()
    main(arguments.folder, arguments.count)
