"""The tables of an evaluation, and the names of its scores."""

from typing import Any

from entropy_polarity.report.intervals import between, estimated
from entropy_polarity.report.tables.text import Column, TextTable

Document = dict[str, Any]


def evaluation_tables(document: Document) -> list[TextTable]:
    """Every measure of every model; with several models, the paired differences to the baseline."""
    differences = [_difference_table(document)] if document["against"] else []
    return [_score_table(document), *differences]


def verdict_table(document: Document) -> TextTable:
    models = document["models"]
    reasons = list(next(iter(models.values()))["verdicts"])
    columns = [
        Column("model", "Its label."),
        *(Column(reason, f"Share of all samples with the verdict {reason!r}.") for reason in reasons),
    ]
    rows = [[label, *(f"{model['verdicts'][reason]:.1%}" for reason in reasons)] for label, model in models.items()]
    return TextTable("Verdicts", columns, rows)


def shown_names(document: Document) -> list[str]:
    """The scores that have a column: avg@n is pass@1, and a reward that is never partial is the same again."""
    models = document["models"].values()
    names = [name for name in next(iter(models))["scores"] if not name.startswith("avg@")]
    same = all(model["scores"]["reward"]["value"] == model["scores"]["pass@1"]["value"] for model in models)
    return [name for name in names if name != "reward" or document["game"] or not same]


def over_what(document: Document) -> str:
    """What the intervals are over."""
    return "problems and sampling seeds" if len(document["settings"]["seeds"]) > 1 else "problems"


def is_of_game(evaluation: dict[str, Any]) -> bool:
    """Whether an evaluation of a run is one of episodes, which have turns."""
    return "turns" in evaluation.get("facts", {})


def name_of_pass(k: str, evaluation: dict[str, Any]) -> str:
    return "success rate" if k == "1" and is_of_game(evaluation) else f"pass@{k}"


def title_of(name: str, document: Document) -> str:
    if name == "pass@1":
        return "success rate" if document["game"] else f"pass@1 = avg@{document['settings']['samples']}"
    return "return" if name == "reward" and document["game"] else name


def meaning_of(name: str, document: Document) -> str:
    samples, game = document["settings"]["samples"], document["game"]
    kind, _, k = name.partition("@")
    if name == "pass@1" and game:
        return f"The share of episodes with a return of 1 or more, of {samples} a problem; pass@1 = avg@{samples}."
    if name == "pass@1":
        return f"The share of sampled answers that are right, of {samples} a problem; pass@1 = avg@{samples}."
    if kind == "pass":
        what = "episodes succeeds" if game else "sampled answers is right"
        return f"The chance that at least one of {k} {what}; the unbiased estimate from {samples}."
    if kind == "maj":
        return (
            f"The chance that the most frequent of {k} final answers is right, over all ways to take {k} of the "
            f"{samples} samples; ties are split, and what has no final answer never wins."
        )
    if name == "greedy":
        return "The share of problems that the likeliest tokens, one after the other, solve."
    if name == "reward":
        return f"The mean {'return of an episode' if game else 'reward of a sampled answer'}."
    known = {
        "turns": "Mean turns of an episode.",
        "tool_calls": "Calls of a tool in an answer, on average.",
        "failed_tool_calls": "Calls that reached no tool: an unknown name, wrong arguments; on average.",
    }
    return known.get(name, f"What the environment counts as {name!r}, on average.")


def _score_table(document: Document) -> TextTable:
    models, names = document["models"], shown_names(document)
    counts = list(next(iter(models.values()))["facts"])
    brackets = (
        f"In brackets the 95 % bootstrap interval over {over_what(document)}; a dash where there are too few to say."
    )
    columns = [
        Column("model", f"Its label, as given with --model. {brackets}"),
        *(Column(title_of(name, document), meaning_of(name, document)) for name in [*names, *counts]),
    ]
    rows = [
        [
            label,
            *(estimated(model["scores"][name], joint="\n") for name in names),
            *(estimated(model["facts"][name], joint="\n") if name in model["facts"] else "-" for name in counts),
        ]
        for label, model in models.items()
    ]
    return TextTable("Evaluation", columns, rows)


def _difference_table(document: Document) -> TextTable:
    baseline, against = document["baseline"], document["against"]
    counts = next(iter(document["models"].values()))["facts"]
    names = [*shown_names(document), *(name for name in counts if all(name in row for row in against.values()))]
    columns = [
        Column(
            "model",
            f"Each model minus {baseline}, on the same problems; in brackets the 95 % interval of a paired bootstrap "
            f"over {over_what(document)}. An interval that holds 0 leaves open which of the two is better.",
        ),
        *(Column(f"Δ {title_of(name, document)}", meaning_of(name, document)) for name in names),
    ]
    rows = [[label, *(_difference(found[name]) for name in names)] for label, found in against.items()]
    return TextTable(f"Against {baseline}", columns, rows)


def _difference(number: dict[str, Any]) -> str:
    return f"{number['difference']:+.3f}\n{between(number['bootstrap'])}"
