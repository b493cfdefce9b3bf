"""The page: one self-contained HTML file that tells what happened in a run and opens from disk."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import plotly.graph_objects as go

from entropy_polarity.report.heatmap import heatmap_of
from entropy_polarity.report.html import Chart, add_curve_over_k, blank_figure, render, smoothed, thinned
from entropy_polarity.report.intervals import estimated
from entropy_polarity.report.palette import CONTRACTS, EXPANDS, GREEN, GREY, LIGHT_GREY, VIOLET, Look
from entropy_polarity.report.tables.evaluation import is_of_game, name_of_pass
from entropy_polarity.runs.record import Run


def render_page(run: Run) -> str:
    """The page of a run."""
    title = run.config["title"] or f"{run.config['task']['name']}, {Path(run.config['policy']['model']).name}"
    return render("page.html", title, run, _charts(run), cards=_cards(run), heatmap=heatmap_of(run))


class _Card(NamedTuple):
    name: str
    value: str
    text: str


def _cards(run: Run) -> Iterator[_Card]:
    """The few numbers a reader wants first, each with the sentence that says what it is."""
    before, after = run.summary.get("before"), run.summary.get("after")
    for k in ("1", "16"):
        if before and k in before["pass_at"]:
            one, right = ("episode", "a success") if is_of_game(before) else ("sampled answer", "right")
            meaning = f"one {one} is {right}" if k == "1" else f"at least one of {k} {one}s is {right}"
            yield _Card(
                f"{name_of_pass(k, before)}, held out",
                _arrow(before["pass_at"][k], after and after["pass_at"][k]),
                f"The chance that {meaning}, on {before['problems']} problems that training never draws "
                "(before → after, with 95 % bootstrap intervals over problems).",
            )
    for name, count in (before or {}).get("facts", {}).items():
        yield _Card(
            f"{name.replace('_', ' ')}, held out",
            _arrow(count, after and after["facts"].get(name)),
            "Mean over held-out samples (before → after, with 95 % bootstrap intervals): "
            "turns that were played and what the environment counts, or calls of tools.",
        )
    if entropy := run.series("polarity/entropy")[1]:
        tenth = max(1, len(entropy) // 10)
        first, last = sum(entropy[:tenth]) / tenth, sum(entropy[-tenth:]) / tenth
        text = "Mean entropy of the policy at the tokens it wrote: first tenth of the run → last tenth."
        yield _Card("entropy", f"{first:.2f} → {last:.2f} nats", text)
    if seconds := run.series("step_time")[1]:
        value = f"{run.summary.get('steps', len(seconds))} steps, {sum(seconds) / 60:.1f} min"
        yield _Card("training", value, "Optimiser steps and the time spent in them, generation included.")


def _arrow(before: dict[str, float], after: dict[str, float] | None) -> str:
    return f"{estimated(before)} → {estimated(after)}" if after else estimated(before)


def _charts(run: Run) -> list[Chart]:
    charts = [
        Chart(
            "Reward",
            "Mean reward of each rollout batch (faint) and its moving average over ten rollouts. Training problems.",
            _lines(run, [("reward", "reward", GREEN)], smooth=10),
        ),
        Chart(
            "Entropy",
            "Mean entropy H of the policy at the tokens it wrote, in nats, with what the controller compares it to: "
            "its reference, or a fast and a slow moving average.",
            _lines(
                run,
                [
                    ("polarity/entropy", "entropy", EXPANDS),
                    ("polarity/entropy_reference", "reference", GREY),
                    ("polarity/entropy_fast", "fast average", GREEN),
                    ("polarity/entropy_slow", "slow average", GREY),
                ],
            ),
        ),
        Chart(
            "λ, the pressure moved",
            "Tokens that expand entropy get weight 1 + λ, tokens that contract it 1 - λ. Above zero: towards "
            "expansion; below: towards contraction.",
            _lines(run, [("polarity/lambda", "λ", VIOLET)], zero=True),
        ),
        Chart(
            "Branch flows",
            "Predicted expansion (D+) and contraction (D-) per token, before reweighting, in nats per unit of step "
            "size: the two branches PAPO keeps alive.",
            _lines(
                run,
                [
                    ("polarity/positive_flow", "D+ expands", EXPANDS),
                    ("polarity/negative_flow", "D- contracts", CONTRACTS),
                ],
            ),
        ),
    ]
    if turns := _of_turns(run):
        text = (
            "Mean entropy of the policy at the tokens of each turn, in nats: early turns, which every episode has, "
            "are the first to collapse."
        )
        charts.append(Chart("Entropy by turn", text, _lines(run, turns)))
    if run.summary.get("before"):
        text = (
            "Unbiased pass@k on problems that training never draws, before and after, with 95 % intervals. pass@1 is "
            "what reinforcement raises; a falling pass@k at large k means that exploration died."
        )
        charts.append(Chart("pass@k, held out", text, _pass_at_k(run.summary)))
    return charts


def _of_turns(run: Run) -> list[tuple[str, str, str]]:
    """Where there are turns, the entropy of at most eight of them, from dark to light."""
    prefix = "polarity/entropy_turn_"
    turns = sorted({int(name.removeprefix(prefix)) for row in run.metrics for name in row if name.startswith(prefix)})
    shown = list(dict.fromkeys(turns[round(i * (len(turns) - 1) / 7)] for i in range(8))) if turns else []
    return [
        (f"{prefix}{turn}", f"turn {turn}", f"hsl(214, 70%, {20 + 60 * place / max(1, len(shown) - 1):.0f}%)")
        for place, turn in enumerate(shown)
    ]


def _lines(run: Run, series: list[tuple[str, str, str]], smooth: int = 0, zero: bool = False) -> go.Figure:
    figure = blank_figure()
    drawn = [(name, label, colour) for name, label, colour in series if run.series(name)[0]]
    for name, label, colour in drawn:
        steps, values = run.series(name)
        line = {"color": colour, "width": 2, "dash": "dot" if colour == GREY else "solid"}
        mode = "lines" if len(values) > 1 else "markers"  # one point makes no line
        figure.add_scatter(
            x=thinned(steps), y=thinned(values), name=label, line=line, opacity=0.35 if smooth else 1, mode=mode
        )
        if smooth and len(values) > 1:
            figure.add_scatter(
                x=thinned(steps), y=thinned(smoothed(values, smooth)), name=f"mean of {smooth}", line=line, mode="lines"
            )
    if zero:
        figure.add_hline(y=0, line={"color": LIGHT_GREY, "width": 1})
    figure.update_layout(showlegend=len(figure.data) > 1, xaxis_title="step")  # type: ignore[arg-type]
    return figure


def _pass_at_k(summary: dict[str, Any]) -> go.Figure:
    figure = blank_figure()
    for label, colour in (("before", GREY), ("after", GREEN)):
        if summary.get(label) is not None:
            add_curve_over_k(figure, label, summary[label]["pass_at"], Look(colour, "solid", "circle"))
    return figure
