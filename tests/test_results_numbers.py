"""The sentences of docs/results.md and of the pages of its studies have the numbers of the result files."""

import numpy as np
import pytest
import thermostat
from sentences import check, document, page, written


def after(file: str, method: str, score: str) -> str:
    return f"{file}/summary/methods/{method}/after/{score}"


def of(file: str, method: str, what: str) -> str:
    return f"{file}/summary/methods/{method}/{what}"


def minus(file: str, method: str, baseline: str, score: str) -> str:
    return f"{file}/summary/against/{baseline}/{method}/{score}"


def steps(file: str, baseline: str) -> str:
    return f"{file}/summary/against/{baseline}/papo/reach/steps_ratio"


FOUR, THREE = "comparison-4", "comparison-3"
VERDICT = [
    ("a pass@1 of {:.3f}, GRPO at {:.3f}, a difference of {:+.3f} [{:+.3f}, {:+.3f}]",
     after(FOUR, "papo", "pass@1"), after(FOUR, "grpo", "pass@1"), minus(FOUR, "papo", "grpo", "pass@1") + "["),
    ("{:+.3f} [{:+.3f}, {:+.3f}] in pass@1; pass@16 is higher than DAPO's by {:.3f} [{:+.3f}, {:+.3f}]",
     minus(THREE, "papo", "grpo", "pass@1") + "[", minus(THREE, "papo", "dapo", "pass@16") + "["),
    ("level with GRPO in pass@1, {:+.3f} [{:+.3f}, {:+.3f}], and {|:.3f} below DAPO",
     minus("gym", "papo", "grpo", "pass@1") + "[", minus("gym", "papo", "dapo", "pass@1")),
    ("[guess](results/guess.md) {:+.3f} [{:+.3f}, {:+.3f}] in success against GRPO, [keydoor](results/keydoor.md) "
     "{:+.3f} [{:+.3f}, {:+.3f}]",
     *(minus(game, "papo", "grpo", "pass@1") + "[" for game in ("guess", "keydoor"))),
    ("pass@16 is [{:.3f} higher](results/guess.md#the-same-with-a-level-for-that-rate) [{:+.3f}, {:+.3f}]",
     minus("guess-collapse-level", "papo", "grpo", "pass@16") + "["),
    ("the expanding branch alone ends at {} nats, the contracting one at {}",
     of("ablation", "positive_only", "entropy_end"), of("ablation", "negative_only", "entropy_end")),
    ("differ by {|:.3f} in pass@1; nor do [exact signs](results/exact-signs.md), {:+.3f} [{:+.3f}, {:+.3f}]",
     minus("ablation", "papo_shuffled", "papo", "pass@1"), minus("exact-sign", "papo_exact", "papo", "pass@1") + "["),
    ("a correlation of {} [{}, {}]; the local formula hardly does, {} [{}, {}]",
     "audit/exact/pearson[", "audit/local/pearson["),
    ("ranks updates at {} [{}, {}] where the entropy is held, the last change at {}",
     "audit-held/cheap/forecast/spearman[", "audit-held/cheap/the last change/spearman"),
]  # fmt: skip
COUNTDOWN = [
    ("PAPO ends {|:.3f} below GRPO in pass@1 and {|:.3f} below it greedily, with t intervals that exclude zero; below "
     "DAPO by {|:.3f} and {|:.3f}",
     *(minus(FOUR, "papo", baseline, score) for baseline in ("grpo", "dapo") for score in ("pass@1", "greedy"))),
    ("it takes {:.1f} times GRPO's steps", steps(FOUR, "grpo")),
    ("{:.3f} ± {:.3f} nats, three times as evenly as GRPO's {:.3f} ± {:.3f}",
     of(FOUR, "papo", "entropy_end") + "±", of(FOUR, "grpo", "entropy_end") + "±"),
    ("at {|:.3f} less pass@1", minus(FOUR, "opefo", "papo", "pass@1")),
    ("PAPO ends {|:.3f} below GRPO in pass@1 and {|:.3f} below DAPO, with t intervals that exclude zero, and takes {} "
     "and {} times their steps",
     *(minus(THREE, "papo", baseline, "pass@1") for baseline in ("grpo", "dapo")),
     *(steps(THREE, baseline) for baseline in ("grpo", "dapo"))),
    ("{:.3f} ± {:.3f} nats against GRPO's {:.3f} ± {:.3f}, does return diversity: its pass@16 is {:.3f} above DAPO's",
     of(THREE, "papo", "entropy_end") + "±", of(THREE, "grpo", "entropy_end") + "±",
     minus(THREE, "papo", "dapo", "pass@16")),
    ("and {:.3f} above GRPO's", minus(THREE, "papo", "grpo", "pass@16")),
    ("keeps the highest pass@16 of all, {:.3f}", after(THREE, "opefo", "pass@16")),
]  # fmt: skip
GYM = [
    ("in pass@1 ({:+.3f}, t interval {:+.3f} to {:+.3f}), greedily, and in pass@16 ({:+.3f}, {:+.3f} to {:+.3f}). It "
     "ends {|:.3f} below DAPO in pass@1",
     *(minus("gym", "papo", "grpo", score) + "[" for score in ("pass@1", "pass@16")),
     minus("gym", "papo", "dapo", "pass@1")),
    ("{} nats against {} averaged over the run, and paid for it with {|:.3f} of the training reward: it takes {:.1f} "
     "times DAPO's and {:.1f} times GRPO's steps",
     of("gym", "papo", "entropy_mean"), of("gym", "grpo", "entropy_mean"), minus("gym", "papo", "grpo", "reward_area"),
     steps("gym", "dapo"), steps("gym", "grpo")),
]  # fmt: skip
FAST, LEVEL = "guess-collapse", "guess-collapse-level"
GUESS = [
    ("PAPO ends {|:.3f} below GRPO (t interval {:+.3f} to {:+.3f}) and {|:.3f} below it greedily. With its likeliest "
     "guesses GRPO wins almost always ({:.3f})",
     minus("guess", "papo", "grpo", "pass@1") + "[", minus("guess", "papo", "grpo", "greedy"),
     after("guess", "grpo", "greedy")),
    ("It held {} nats on average where GRPO had {}, learned {|:.3f} less",
     of("guess", "papo", "entropy_mean"), of("guess", "grpo", "entropy_mean"),
     minus("guess", "papo", "grpo", "reward_area")),
    ("end near where they began, at {} and {}", after(FAST, "grpo", "pass@1"), after(FAST, "dapo", "pass@1")),
    ("it ends at {}, {|:.3f} below GRPO (t interval {:+.3f} to {:+.3f})",
     after(FAST, "papo", "pass@1"), minus(FAST, "papo", "grpo", "pass@1") + "["),
    ("GRPO at this rate stays at {}", of(FAST, "grpo", "entropy_end")),
    ("at {:.3f} success, while GRPO loses ({:.3f})", after(LEVEL, "papo", "pass@1"), after(LEVEL, "grpo", "pass@1")),
    ("The difference of {:.3f} is not certain (t interval {:+.3f} to {:+.3f})",
     minus(LEVEL, "papo", "grpo", "pass@1") + "["),
    ("on {:.3f} of the problems, {:.3f} more than after GRPO ({:+.3f} to {:+.3f}); DAPO has {:.3f} more",
     after(LEVEL, "papo", "pass@16"), minus(LEVEL, "papo", "grpo", "pass@16") + "[",
     minus(LEVEL, "dapo", "grpo", "pass@16")),
    ("PAPO held {:.3f} ± {:.3f} nats", of(LEVEL, "papo", "entropy_end") + "±"),
    ("GRPO reaches {:.3f} in 500 updates", after("guess", "grpo", "pass@1")),
]  # fmt: skip
KEYDOOR = [
    ("PAPO ends {|:.3f} below GRPO (t interval {:+.3f} to {:+.3f}) and {|:.3f} below DAPO ({:+.3f} to {:+.3f})",
     *(minus("keydoor", "papo", baseline, "pass@1") + "[" for baseline in ("grpo", "dapo"))),
    ("takes {} turns more", minus("keydoor", "papo", "grpo", "counted/turns")),
    ("{} nats on average and {} at the end, where GRPO has {} and {}",
     *(of("keydoor", method, what) for method in ("papo", "grpo") for what in ("entropy_mean", "entropy_end"))),
]  # fmt: skip
ABLATION = [
    ("to {} nats and unlearns the task; the contracting branch alone drives it to {} and",
     of("ablation", "positive_only", "entropy_end"), of("ablation", "negative_only", "entropy_end")),
    ("they end at {} and {} nats",
     of("ablation", "random_as_positive", "entropy_end"), of("ablation", "random_as_negative", "entropy_end")),
    ("({:.3f} nats over the run; GRPO {:.3f}); the twin's stays near GRPO's ({:.3f})",
     *(of("ablation", method, "entropy_mean") for method in ("papo", "grpo", "papo_shuffled"))),
    ("are equal (-{:.3f} and -{:.3f} for PAPO", *(minus("ablation", "papo_shuffled", "papo", score) for score in
                                                  ("pass@1", "pass@16"))),
    ("lower by {:.3f}", minus("ablation", "papo_shuffled", "papo", "reward_area")),
    ("and {|:.3f} less pass@16", minus("ablation", "steer", "grpo", "pass@16")),
]  # fmt: skip
METHODS = [
    ("collapses to {} nats and a pass@16 of {}", of("screen", "entropic", "entropy_end"),
     after("screen", "entropic", "pass@16")),
    ("the entropy falls to {} nats and pass@16 to {}", of("screen", "papo_negative_only", "entropy_end"),
     after("screen", "papo_negative_only", "pass@16")),
    ("the entropy rises to {} nats", of("screen", "papo_positive_only", "entropy_end")),
]  # fmt: skip
EXACT_SIGNS = [("behind by {|:.3f} with exact signs", minus("exact-sign", "papo_exact", "papo", "reward_area"))]
FORECAST = [
    ("takes {:.3f} [{:.3f}, {:.3f}] of one without",
     "trainer_step/forecast_to_papo/ratio", "trainer_step/forecast_to_papo/interval_95"),
]  # fmt: skip
THEORY = [
    ("a correlation of {} on the states that were trained on and {} on held-out ones",
     "audit/exact/pearson", "audit/held_out/exact/pearson"),
    ("a rank correlation of {} with it", "audit/local/spearman"),
    ("it is right in {%} % of tokens", "audit/tokens/local_sign_agreement"),
]  # fmt: skip
PAGES = {
    "results.md": VERDICT,
    "results/countdown.md": COUNTDOWN,
    "results/gym.md": GYM,
    "results/guess.md": GUESS,
    "results/keydoor.md": KEYDOOR,
    "results/ablation.md": ABLATION,
    "results/methods.md": METHODS,
    "results/exact-signs.md": EXACT_SIGNS,
    "results/forecast.md": FORECAST,
    "theory.md": THEORY,
}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [(name, sentence) for name, sentences in PAGES.items() for sentence in sentences],
    ids=lambda value: value if isinstance(value, str) else value[0][:40],
)
def test_a_sentence_has_the_numbers_of_the_files(name, sentence):
    check(name, *sentence)


def test_the_sentences_on_the_thermostat_have_the_numbers_of_the_runs():
    runs = document("thermostat")["runs"]
    judged = [
        (run, thermostat.judge(run, thermostat.noise_of(runs, run))) for run in runs if run["kind"] == "thermostat"
    ]
    held = [abs(verdict["bias"]) <= 0.02 for run, verdict in judged if "disturbance" not in run]
    (prompts,) = (verdict for run, verdict in judged if run.get("disturbance") == "prompts")
    assert f"{sum(held)} of {len(held)} targets within 2 %" in page("results.md")
    assert f"it takes {prompts['recovered_after']} rollouts, not the 15" in page("results.md")
    assert f"the goal of 15 rollouts is missed, with {prompts['recovered_after']}" in page("results/thermostat.md")


def test_the_sentences_on_the_search_have_the_numbers_of_its_rows():
    rows = {(row["label"], row["value"]): row for row in document("search")["rows"]}
    grpo = next(row for (label, _), row in rows.items() if label == "grpo")
    low = rows["papo_thermostat", 0.2]
    sentence = written("would have been chosen ({:.4f} against GRPO's {:.4f})", low["pass@1"], grpo["pass@1"])
    assert sentence in page("results/settings.md")
    assert written("loses {:.1f} of pass@16", grpo["pass@many"] - low["pass@many"]) in page("results/settings.md")
    assert written("0.3 nats over {:.4f}", grpo["entropy_end"]) in page("results/settings.md")


def test_the_noise_of_a_seed_is_that_of_the_runs_of_the_search():
    scores: dict[str, list[tuple[float, float]]] = {}
    for run in document("search")["runs"]:
        successes = np.array(run["after"]["successes"])
        scores.setdefault(run["label"], []).append((successes.mean() / run["samples"], (successes > 0).mean()))
    one, many = np.sqrt(np.var(list(scores.values()), axis=1, ddof=1).mean(axis=0))
    assert written("{:.3f} in pass@1 and {:.3f} in pass@16", one, many) in page("results/settings.md")
