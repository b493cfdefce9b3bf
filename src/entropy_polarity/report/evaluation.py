"""The page of an evaluation: one self-contained HTML file with tables, curves, and what the models answered."""

import json
from typing import Any

import plotly.graph_objects as go

from entropy_polarity.report.forest import forest_plot
from entropy_polarity.report.html import Chart, add_curve_over_k, blank_figure, legend_beside, render
from entropy_polarity.report.palette import Look, looks_of
from entropy_polarity.report.tables.evaluation import evaluation_tables, over_what, shown_names, verdict_table
from entropy_polarity.support.success import degree
from entropy_polarity.support.text import cut

MAX_SHOWN_CHARACTERS = 1500  # of a completion


def render_evaluation(document: dict[str, Any], examples: list[dict[str, Any]]) -> str:
    """The page of an evaluation document (evaluation.json) with a few problems."""
    title, tables = f"Evaluation on {document['task']['name']}", [*evaluation_tables(document), verdict_table(document)]
    shown = [_shown(example) for example in examples]
    return render("evaluation.html", title, document, evaluation_charts(document), tables=tables, examples=shown)


def evaluation_charts(document: dict[str, Any]) -> list[Chart]:
    models, against = document["models"], document["against"]
    looks, over, charts = looks_of(list(models)), over_what(document), []
    if against:
        names = _headlines(shown_names(document))
        panels = ["success rate" if name == "pass@1" and document["game"] else name for name in names]
        rows = {
            label: {panel: found[name] | {"t": None} for panel, name in zip(panels, names, strict=True)}
            for label, found in against.items()
        }
        charts.append(
            Chart(
                f"Difference to {document['baseline']}",
                f"Each model minus {document['baseline']} on the same problems, with the 95 % interval of a paired "
                f"bootstrap over {over}; right of zero is better.",
                forest_plot(rows, panels, looks),
            )
        )
    for kind, what in (("pass", "at least one of k samples"), ("maj", "the most frequent final answer of k samples")):
        if sum(name.startswith(f"{kind}@") for name in next(iter(models.values()))["scores"]) > 1:
            text = f"The chance that {what} is right, with 95 % intervals over {over}."
            charts.append(Chart(f"{kind}@k", text, _curve(models, kind, looks)))
    return charts


def _headlines(names: list[str]) -> list[str]:
    """One sample, the largest k of each kind, and the likeliest answer: more panels cannot be read."""
    largest = [[name for name in names if name.startswith(kind)][-1:] for kind in ("pass@", "maj@")]
    return list(dict.fromkeys(["pass@1", *(name for found in largest for name in found), "greedy"]))


def _curve(models: dict[str, Any], kind: str, looks: dict[str, Look]) -> go.Figure:
    figure = blank_figure()
    for label, model in models.items():
        points = {name.partition("@")[2]: e for name, e in model["scores"].items() if name.startswith(f"{kind}@")}
        add_curve_over_k(figure, label, points, looks[label])
    legend_beside(figure, len(models), lowest=320)
    return figure


def _shown(example: dict[str, Any]) -> dict[str, Any]:
    """A problem as the template wants it: texts only, none longer than a reader would read."""
    metadata = {
        name: value if isinstance(value, str) else json.dumps(value, default=str)
        for name, value in example["facts"].items()
    }
    models = [
        {
            "label": label,
            "right": f"{found['successes']} of {found['samples']} right",
            "attempts": [
                {
                    "text": cut(_text(one, example["prompt"]), MAX_SHOWN_CHARACTERS),
                    "verdict": one["verdict"],
                    "degree": degree(one["reward"]),
                    "reward": f"{one['reward']:g}",
                    "answer": cut(one.get("answer") or "", MAX_SHOWN_CHARACTERS),
                }
                for one in found["attempts"]
            ],
        }
        for label, found in example["models"].items()
    ]
    prompt = cut(example["prompt"], MAX_SHOWN_CHARACTERS)
    return {"number": example["number"], "prompt": prompt, "metadata": metadata, "models": models}


def _text(one: dict[str, Any], prompt: str) -> str:
    """A completion, or the turns of an episode: actions behind an arrow, its start unless the prompt tells it."""
    if "turns" not in one:
        return one["completion"]
    start = [] if one["observation"] == prompt else [one["observation"]]
    return "\n".join([*start, *(f"→ {action}\n{said}".rstrip() for action, said in one["turns"])])
