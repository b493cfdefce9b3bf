"""The tables of a comparison, and that of a search."""

from typing import Any

from entropy_polarity.report.intervals import between
from entropy_polarity.report.tables.text import Column, TextTable

Summary = dict[str, Any]


def comparison_tables(summary: Summary) -> list[TextTable]:
    """The methods alone, then one table of paired differences for each baseline."""
    differences = [_difference_table(baseline, rows) for baseline, rows in summary["against"].items() if rows]
    return [_method_table(summary["methods"]), *differences]


def score_names(summary: Summary) -> list[str]:
    """The scores that are compared: pass@k for a few k, and greedy."""
    return list(next(iter(summary["methods"].values()))["after"])


def search_table(document: dict[str, Any]) -> TextTable:
    """One row per candidate of a search; the chosen ones are marked."""
    many = next((row["samples"] for row in document["rows"] if "samples" in row), 16)
    chosen = list(document["chosen"].items())
    columns = [
        Column("method", "Label of the method in the plan."),
        Column("constant", "The constant that is chosen, and the value tried."),
        Column("seeds", "Seeds of the search that have finished."),
        Column("pass@1", "Final held-out pass@1, mean over seeds and problems: the criterion."),
        Column(f"pass@{many}", f"Final held-out pass@{many}: it decides between equals."),
        Column("entropy at the end", "Mean entropy of the last ten rollouts, in nats."),
        Column("chosen", "The value with the highest pass@1 of its method."),
    ]
    rows = []
    for row in document["rows"]:
        best = any(label == row["label"] and table.get(row["key"]) == row["value"] for label, table in chosen)
        numbers = [f"{row[name]:.4f}" if name in row else "-" for name in ("pass@1", "pass@many", "entropy_end")]
        constant = f"{row['key']} = {row['value']}" if row["key"] else "nothing to choose"
        rows.append([row["label"], constant, _listed(row["seeds"]), *numbers, "chosen" if best else ""])
    return TextTable("Search", columns, rows)


def _method_table(methods: dict[str, Summary]) -> TextTable:
    start = next(iter(methods.values()))
    names, counted = list(start["after"]), list(_counted(start))
    columns = [
        Column("method", "Label of the method in the plan; the first row is the policy before training."),
        Column("seeds", "Seeds that have finished. All means are over them, ± their standard deviation."),
        *(Column(name, _meaning(name)) for name in names),
        *(Column(name, _counted_meaning(name)) for name in counted),
        Column("reward", "Mean reward of all that was sampled in training: the area under the reward curve."),
        Column("entropy", "Mean entropy of the policy over the whole run, in nats, at the tokens that it wrote."),
        Column("entropy at the end", "The same over the last ten rollouts."),
        Column("seconds", "Seconds a run, in training steps; evaluation is left out."),
    ]
    first = [start["before"][name] for name in names] + [start["counted"]["before"][name] for name in counted]
    rows = [["before training", "", *(_mean(number | {"sd": None}) for number in first), "", "", "", ""]]
    for label, method in methods.items():
        found = [method["after"][name] for name in names] + [_counted(method)[name] for name in counted]
        others = [method[name] for name in ("reward_area", "entropy_mean", "entropy_end")]
        numbers = [_mean(number) for number in (*found, *others)]
        rows.append([label, _listed(method["seeds"]), *numbers, _mean(method["seconds"], digits=0)])
    return TextTable("Methods", columns, rows)


def _difference_table(baseline: str, rows: dict[str, Summary]) -> TextTable:
    paired = next((row for row in rows.values() if row["seeds"]), {})
    names = [name for name in paired if name not in ("seeds", "reward_area", "reach", "counted")]
    counted = list(paired.get("counted", {}))
    columns = [
        Column("method", f"Compared with {baseline} on the same seeds and the same held-out problems."),
        Column("pairs", "Seeds that both have finished."),
        *(
            Column(
                f"Δ {name}",
                f"{name} minus that of {baseline}; in brackets the 95 % bootstrap interval over seeds and problems, "
                "after t that of Student's t over seeds; a dash where there are too few problems, a single seed, or no "
                "spread. Above zero: better than the baseline.",
            )
            for name in names
        ),
        *(Column(f"Δ {name}", f"{_counted_meaning(name)} The difference, with the t interval.") for name in counted),
        Column("Δ reward", "Difference of the mean reward in training, with the t interval over seeds."),
        Column(
            "time to the same reward",
            "Steps until the moving average of the reward over ten rollouts is where both get with the same seed (the "
            f"lower of the two best), as a multiple of the steps of {baseline}; then the same in seconds of training "
            "steps, of runs that may have shared the machine. Below 1: sooner. Geometric means over seeds; then in how "
            f"many seeds the best of {baseline} is reached.",
        ),
    ]
    cells = []
    for label, row in rows.items():
        if not row["seeds"]:
            cells.append([label, "0", *[""] * (len(columns) - 2)])
            continue
        numbers = [*(row[name] for name in names), *(row["counted"][name] for name in counted), row["reward_area"]]
        differences = [_difference(number) for number in numbers]
        cells.append([label, str(len(row["seeds"])), *differences, _reach(row["reach"])])
    return TextTable(f"Against {baseline}", columns, cells)


def _counted(method: Summary) -> dict[str, Any]:
    """The counts of the environments after training; nothing where the task is no game."""
    return method.get("counted", {}).get("after", {})


def _counted_meaning(name: str) -> str:
    what = "turns of an episode" if name == "turns" else f"what its environment counts as {name!r}"
    return f"Mean over held-out episodes: {what}."


def _meaning(name: str) -> str:
    if name == "greedy":
        return "Share of held-out problems that the likeliest answer, taken token by token, solves."
    k = name.partition("@")[2]
    right = "a sampled answer is right" if k == "1" else f"at least one of {k} sampled answers is right"
    return f"The chance that {right}, on held-out problems that training never draws, after training."


def _mean(number: dict[str, float | None], digits: int = 3) -> str:
    spread = "" if number["sd"] is None else f" ± {number['sd']:.{digits}f}"
    return f"{number['mean']:.{digits}f}{spread}"


def _difference(number: Summary) -> str:
    """A value and its intervals, a line each."""
    lines = [f"{number['difference']:+.3f}"]
    if "bootstrap" in number:
        lines.append(between(number["bootstrap"]))
    lines.append(f"t {between(number['t'])}")
    return "\n".join(lines)


def _reach(reach: Summary) -> str:
    lines = [f"× {reach[f'{unit}_ratio']:.2f} ({reach[unit]:.0f} {unit})" for unit in ("steps", "seconds")]
    return "\n".join([*lines, f"its best in {reach['reached']} of {reach['pairs']} seeds"])


def _listed(seeds: list[int]) -> str:
    return ", ".join(map(str, seeds))
