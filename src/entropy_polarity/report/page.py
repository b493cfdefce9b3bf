"""The page: one self-contained HTML file that tells what happened in a run and opens from disk."""

from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from entropy_polarity.report.heatmap import heatmap_of
from entropy_polarity.report.html import Chart, blank_figure, pass_at_k_axes, render, smoothed, thinned
from entropy_polarity.report.intervals import bars, estimated
from entropy_polarity.report.palette import CONTRACTS, EXPANDS, GREEN, GREY, LIGHT_GREY, VIOLET
from entropy_polarity.report.tables.evaluation import is_of_game, name_of_pass
from entropy_polarity.runs.record import Run


def render_page(run: Run) -> str:
    """The report of a run as HTML. All text that is not ours, model output first of all, is escaped."""
    title = run.config["title"] or f"{run.config['task']['name']}, {Path(run.config['policy']['model']).name}"
    return render("page.html", title, run, _charts(run), cards=_cards(run), heatmap=heatmap_of(run))


def _cards(run: Run) -> list[dict[str, str]]:
    """The few numbers a reader wants first, each with the sentence that says what it is."""
    before, after = run.summary.get("before"), run.summary.get("after")
    cards = []
    for k in ("1", "16"):
        if before and k in before["pass_at"]:
            one, right = ("episode", "a success") if is_of_game(before) else ("sampled answer", "right")
            meaning = f"one {one} is {right}" if k == "1" else f"at least one of {k} {one}s is {right}"
            cards.append(
                {
                    "name": f"{name_of_pass(k, before)}, held out",
                    "value": _arrow(before["pass_at"][k], after and after["pass_at"][k]),
                    "text": f"The chance that {meaning}, on {before['problems']} problems that training never draws "
                    "(before → after, with 95 % bootstrap intervals over problems).",
                }
            )
    for name, count in (before or {}).get("facts", {}).items():
        cards.append(
            {
                "name": f"{name.replace('_', ' ')}, held out",
                "value": _arrow(count, after and after["facts"].get(name)),
                "text": "Mean over held-out samples (before → after, with 95 % bootstrap intervals): "
                "turns that were played and what the environment counts, or calls of tools.",
            }
        )
    steps, entropy = run.series("polarity/entropy")
    if steps:
        tenth = max(1, len(entropy) // 10)
        first, last = sum(entropy[:tenth]) / tenth, sum(entropy[-tenth:]) / tenth
        cards.append(
            {
                "name": "entropy",
                "value": f"{first:.2f} → {last:.2f} nats",
                "text": "Mean entropy of the policy at the tokens it wrote: first tenth of the run → last tenth.",
            }
        )
    _, seconds = run.series("step_time")
    if seconds:
        cards.append(
            {
                "name": "training",
                "value": f"{run.summary.get('steps', len(seconds))} steps, {sum(seconds) / 60:.1f} min",
                "text": "Optimiser steps and the time spent in them, generation included.",
            }
        )
    return cards


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
    return [*charts, *_turn_charts(run), *_held_out_charts(run)]


def _turn_charts(run: Run) -> list[Chart]:
    """The entropy of each turn, where there are several."""
    drawn = _of_turns(run)
    if not drawn:
        return []
    text = (
        "Mean entropy of the policy at the tokens of each turn, in nats: early turns, which every episode has, are the "
        "first to collapse."
    )
    return [Chart("Entropy by turn", text, _lines(run, drawn))]


def _held_out_charts(run: Run) -> list[Chart]:
    if not run.summary.get("before"):
        return []
    text = (
        "Unbiased pass@k on problems that training never draws, before and after, with 95 % intervals. pass@1 is what "
        "reinforcement raises; a falling pass@k at large k means that exploration died."
    )
    return [Chart("pass@k, held out", text, _pass_at_k(run.summary))]


def _of_turns(run: Run) -> list[tuple[str, str, str]]:
    """The entropy of at most eight turns, from dark to light."""
    prefix = "polarity/entropy_turn_"
    turns = sorted({int(name.removeprefix(prefix)) for row in run.metrics for name in row if name.startswith(prefix)})
    shown = list(dict.fromkeys(turns[round(i * (len(turns) - 1) / 7)] for i in range(8))) if turns else []
    shades = (20 + 60 * place / max(1, len(shown) - 1) for place in range(len(shown)))
    return [
        (f"{prefix}{turn}", f"turn {turn}", f"hsl(214, 70%, {shade:.0f}%)")
        for turn, shade in zip(shown, shades, strict=True)
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
        evaluation = summary.get(label)
        if evaluation is None:
            continue
        estimates = evaluation["pass_at"]
        values = [e["value"] for e in estimates.values()]
        figure.add_scatter(
            x=[int(k) for k in estimates],
            y=values,
            name=label,
            mode="lines+markers",
            line={"color": colour},
            error_y=bars(estimates.values()),
        )
        pass_at_k_axes(figure, list(estimates))
    return figure
