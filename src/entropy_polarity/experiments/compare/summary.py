"""From the results of single runs to means over seeds, paired differences on the same seeds and held-out problems, and
how sure they are. It needs nothing but the results: a committed result file can be summarised again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from entropy_polarity.experiments.results import bounds, rounded
from entropy_polarity.runs.record import Run
from entropy_polarity.statistics.curves import area_under_curve, moving_average, steps_to_reach
from entropy_polarity.statistics.intervals import DIFFERENCE, paired_bootstrap, t_interval
from entropy_polarity.statistics.success import pass_at_k

WINDOW = 10  # rollouts: of the moving average of the reward, and of the entropy at the end
HEADLINES = (1, 8, 16)  # the k of pass@k that are compared


@dataclass(frozen=True)
class RunResults:
    """The results of one run, as a comparison keeps them.

    `before` and `after` hold `successes` (right samples of each held-out problem, of `samples`) and `greedy` (0 or 1
    each); a curve holds `steps` and `values`, one per rollout; `step_seconds` has one entry per step. `counted` holds,
    for games, the held-out means of what environments count, "before" and "after".
    """

    label: str
    seed: int
    method: dict[str, Any]
    date: str
    commit: str | None
    samples: int
    before: dict[str, list[int]]
    after: dict[str, list[int]]
    reward: dict[str, list[Any]]
    entropy: dict[str, list[Any]]
    step_seconds: list[Any]
    counted: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, label: str, run: Run) -> "RunResults":
        """The results of a finished run; numbers are rounded to the digits that can mean something."""
        held_out = {
            when: {name: run.summary[when][name] for name in ("successes", "greedy")} for when in ("before", "after")
        }
        return cls(
            label,
            run.config["seed"],
            run.config["method"],
            run.environment.get("date", ""),
            run.environment.get("commit"),
            run.summary["after"]["samples"],
            **held_out,
            reward=_curve(run, "reward"),
            entropy=_curve(run, "polarity/entropy"),
            step_seconds=_shortened(run.series("step_time")[1], digits=4),
            counted={
                when: {name: rounded(count["value"]) for name, count in run.summary[when].get("facts", {}).items()}
                for when in held_out
            },
        )

    def scores(self, when: str = "after") -> dict[str, np.ndarray]:
        """One value per problem: pass@k for the compared k, and whether the greedy answer is right."""
        held_out = self.before if when == "before" else self.after
        successes = np.array(held_out["successes"])
        passes = {f"pass@{k}": pass_at_k(successes, self.samples, k) for k in HEADLINES if k <= self.samples}
        return passes | {"greedy": np.array(held_out["greedy"], dtype=float)}

    def best_reward(self) -> float:
        """The highest moving average of the reward."""
        return float(moving_average(np.array(self.reward["values"]), WINDOW).max())

    def reached(self, level: float) -> tuple[int, float]:
        """Steps and seconds (in steps, generation included) until the moving average of the reward is at `level`, which
        is at most its best."""
        steps = steps_to_reach(self.reward["steps"], np.array(self.reward["values"]), level, WINDOW)
        assert steps is not None
        return steps, sum(self.step_seconds[:steps])


def summarise(runs: Sequence[RunResults], baselines: Sequence[str]) -> dict[str, Any]:
    """The summary of every method: alone, and against each of `baselines` that has finished runs. Raises ValueError
    where runs were not evaluated alike."""
    if len({(run.samples, len(run.after["successes"])) for run in runs}) > 1:
        raise ValueError("the runs were evaluated on other numbers of problems or samples: they cannot be paired")
    by_label: dict[str, dict[int, RunResults]] = {}
    for run in runs:
        by_label.setdefault(run.label, {})[run.seed] = run
    return {
        "methods": {label: _alone([*seeds.values()]) for label, seeds in by_label.items()},
        "against": {
            baseline: {label: _against(by_label[label], by_label[baseline]) for label in by_label if label != baseline}
            for baseline in baselines
            if baseline in by_label
        },
    }


def _alone(runs: list[RunResults]) -> dict[str, Any]:
    """Means and standard deviations over the seeds of one method, and its curves of pass@k."""

    def over_seeds(number: Callable[[RunResults], float]) -> dict[str, float | None]:
        values = [number(run) for run in runs]
        spread = rounded(float(np.std(values, ddof=1))) if len(values) > 1 else None
        return {"mean": rounded(float(np.mean(values))), "sd": spread}

    names = runs[0].scores()
    entropy = {run.seed: np.array(run.entropy["values"], dtype=float) for run in runs}  # null is NaN
    return {
        "seeds": [run.seed for run in runs],
        "before": {name: over_seeds(lambda run, n=name: run.scores("before")[n].mean()) for name in names},
        "after": {name: over_seeds(lambda run, n=name: run.scores()[n].mean()) for name in names},
        "pass_at": {when: _pass_curve(runs, when) for when in ("before", "after")},
        "reward_area": over_seeds(lambda run: area_under_curve(np.array(run.reward["values"]))),
        "entropy_mean": over_seeds(lambda run: float(np.nanmean(entropy[run.seed]))),
        "entropy_end": over_seeds(lambda run: float(np.nanmean(entropy[run.seed][-WINDOW:]))),
        "seconds": over_seeds(lambda run: sum(run.step_seconds)),
        "counted": {
            when: {name: over_seeds(lambda run, w=when, n=name: run.counted[w][n]) for name in _counted(runs, when)}
            for when in ("before", "after")
        },
    }


def _counted(runs: Sequence[RunResults], when: str = "after") -> list[str]:
    """The counts that every run has."""
    counted = [run.counted.get(when, {}) for run in runs]
    return [name for name in counted[0] if all(name in found for found in counted)]


def _pass_curve(runs: list[RunResults], when: str) -> dict[str, float]:
    """pass@k of all k that are powers of two, mean over seeds and problems."""
    samples = runs[0].samples
    successes = np.array([(run.before if when == "before" else run.after)["successes"] for run in runs])
    sizes = sorted({2**i for i in range(samples.bit_length())} | {samples})
    return {str(k): rounded(float(pass_at_k(successes, samples, k).mean())) for k in sizes}


def _against(method: dict[int, RunResults], baseline: dict[int, RunResults]) -> dict[str, Any]:
    """The paired differences method - baseline over the seeds that both have."""
    pairs = [(method[seed], baseline[seed]) for seed in sorted(method.keys() & baseline.keys())]
    if not pairs:
        return {"seeds": []}
    mine, theirs = ([pair[side].scores() for pair in pairs] for side in (0, 1))
    differences = {
        name: _difference(np.stack([s[name] for s in mine]), np.stack([s[name] for s in theirs])) for name in mine[0]
    }
    areas = np.array([[area_under_curve(np.array(run.reward["values"])) for run in pair] for pair in pairs])
    return {
        "seeds": [run.seed for run, _ in pairs],
        **differences,
        "reward_area": _mean_difference(areas[:, 0] - areas[:, 1]),
        "reach": _reach(pairs),
        "counted": {
            name: _mean_difference(np.array([a.counted["after"][name] - b.counted["after"][name] for a, b in pairs]))
            for name in _counted([run for pair in pairs for run in pair])
        },
    }


def _mean_difference(differences: np.ndarray) -> dict[str, Any]:
    return {"difference": rounded(float(differences.mean())), "t": _t(differences)}


def _difference(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    found = paired_bootstrap(a, b, within=DIFFERENCE)
    return {"difference": rounded(found.value), "bootstrap": bounds(found), "t": _t((a - b).mean(axis=1))}


def _t(differences: np.ndarray) -> list[float] | None:
    """The t interval; None for a single seed, and for seeds that all say the same: neither has a spread."""
    return None if len(differences) < 2 else bounds(t_interval(differences))


def _reach(pairs: list[tuple[RunResults, RunResults]]) -> dict[str, Any]:
    """How soon the method reaches the reward that both reach, seed by seed, as a share of the baseline's time.

    The level is the lower of the two best moving averages. Were it the baseline's best, the pairs that count would be
    those in which the method was lucky: two equal methods would each look sooner than the other. The ratios are
    geometric means; `reached` counts the seeds in which the method gets to the baseline's best.
    """
    rows = []
    for run, baseline in pairs:
        level = min(run.best_reward(), baseline.best_reward())
        (steps, seconds), (own_steps, own_seconds) = run.reached(level), baseline.reached(level)
        rows.append((steps, seconds, np.log(steps / own_steps), np.log(seconds / own_seconds)))
    steps, seconds, steps_ratio, seconds_ratio = map(float, np.mean(rows, axis=0))
    return {
        "pairs": len(pairs),
        "reached": sum(run.best_reward() >= baseline.best_reward() for run, baseline in pairs),
        "steps": rounded(steps),
        "seconds": rounded(seconds),
        "steps_ratio": rounded(float(np.exp(steps_ratio))),
        "seconds_ratio": rounded(float(np.exp(seconds_ratio))),
    }


def _curve(run: Run, key: str) -> dict[str, list[Any]]:
    """The steps at which a metric was logged and its values, None where it was not a number: no step is left out."""
    rows = [row for row in run.metrics if key in row]
    return {"steps": [row["step"] for row in rows], "values": _shortened([row[key] for row in rows])}


def _shortened(values: Sequence[float | None], digits: int = 5) -> list[float | None]:
    return [None if value is None else float(f"{value:.{digits}g}") for value in values]
