"""The demonstration over several seeds and methods, from the run directories to a result file and a table.

    for method in papo grpo; do for seed in 0 1 2; do
      OMP_NUM_THREADS=1 papo train --method $method --seed $seed --output runs/countdown-$method-$seed
    done; done
    python benchmarks/demo_seeds.py runs/countdown-* --output benchmarks/results/demo.json

The same command takes another path on another processor or with more threads. benchmarks/results/demo-elsewhere.json
has such runs of PAPO, and `--spread FILE ...` says where all of them ended.

Every run is evaluated before and after on the same 300 held-out problems, 16 samples each; intervals are 95 %
bootstrap intervals over problems. Entropy is the mean of the first and of the last ten rollouts.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from entropy_polarity.runs.record import Run


def summarise(run: Run) -> dict[str, Any]:
    if run.summary["status"] != "finished":
        raise SystemExit(f"{run.directory} is {run.summary['status']}: finish it first (papo train --resume)")
    _, entropy = run.series("polarity/entropy")
    _, reward = run.series("reward")
    _, seconds = run.series("step_time")
    return {
        "method": run.config["method"],
        "seed": run.config["seed"],
        "steps": run.summary["steps"],
        "pass_at": {k: {when: run.summary[when]["pass_at"][k] for when in ("before", "after")} for k in ("1", "16")},
        "problems": run.summary["before"]["problems"],
        "entropy": [sum(entropy[:10]) / 10, sum(entropy[-10:]) / 10],
        "training_reward": [sum(reward[:10]) / 10, sum(reward[-10:]) / 10],
        "step_seconds": sum(seconds),
        # The command stands above, without the folders of one machine.
        "environment": {name: value for name, value in run.environment.items() if name != "command"},
    }


def table(results: list[dict[str, Any]]) -> str:
    """The README's table, made from the result file: `python benchmarks/demo_seeds.py --table FILE`."""
    lines = [
        "| method | seed | pass@1 before → after | pass@16 before → after | entropy, nats |",
        "|---|---|---|---|---|",
    ]
    for r in sorted(results, key=lambda r: (r["method"]["name"] != "papo", r["seed"])):
        cells = [f"{_estimate(r['pass_at'][k]['before'])} → {_estimate(r['pass_at'][k]['after'])}" for k in ("1", "16")]
        entropy = f"{r['entropy'][0]:.2f} → {r['entropy'][1]:.2f}"
        lines.append(f"| {r['method']['name']} | {r['seed']} | {cells[0]} | {cells[1]} | {entropy} |")
    return "\n".join(lines)


def spread(results: list[dict[str, Any]]) -> str:
    """The README's words on where runs of PAPO ended: `python benchmarks/demo_seeds.py --spread FILE ...`."""
    papo = [r for r in results if r["method"]["name"] == "papo"]
    ends = {k: sorted(r["pass_at"][k]["after"]["value"] for r in papo) for k in ("1", "16")}
    machines = {(r["environment"]["machine"]["processor"], r["environment"]["machine"]["threads"]) for r in papo}
    return (
        f"all {len(papo)} runs of PAPO, on {len(machines)} kinds of machine and numbers of threads, ended between "
        f"{ends['1'][0]:.2f} and {ends['1'][-1]:.2f} in pass@1 and between "
        f"{ends['16'][0]:.2f} and {ends['16'][-1]:.2f} in pass@16"
    )


def _estimate(e: dict[str, float]) -> str:
    return f"{e['value']:.3f} [{e['low']:.3f}, {e['high']:.3f}]"


def collect(
    benchmark: str,
    usage: str | None,
    setting: Callable[[Run], dict[str, Any]],
    table: Callable[[list[dict[str, Any]]], str],
) -> None:
    """A benchmark's command line: the runs that are named, summarised beside their settings, in a result file."""
    parser = argparse.ArgumentParser(description=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--add", action="store_true", help="keep the other runs that the result file holds")
    arguments = parser.parse_args()
    runs = [Run.read(folder) for folder in arguments.runs]
    results = [setting(run) | summarise(run) for run in runs]
    if arguments.add:
        held = json.loads(arguments.output.read_text(encoding="utf-8"))
        if held["benchmark"] != benchmark:
            raise SystemExit(f"{arguments.output} holds {held['benchmark']}, not {benchmark}: give another --output")
        which = [setting(run) | {name: run.config[name] for name in ("method", "seed")} for run in runs]
        results = [other for other in held["runs"] if not any(new.items() <= other.items() for new in which)] + results
    arguments.output.write_text(
        json.dumps({"benchmark": benchmark, "runs": results}, indent=1) + "\n", encoding="utf-8"
    )
    print(table(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, help="print the table of an existing result file")
    parser.add_argument("--spread", type=Path, nargs="+", help="say where the runs of these result files ended")
    arguments = parser.parse_args()
    if arguments.spread:
        files = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.spread]
        print(spread([run for file in files for run in file["runs"]]))
        return
    if arguments.table:
        print(table(json.loads(arguments.table.read_text(encoding="utf-8"))["runs"]))
        return
    results = [summarise(Run.read(path)) for path in arguments.runs]
    print(table(results))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(
            json.dumps({"benchmark": arguments.output.stem, "runs": results}, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
