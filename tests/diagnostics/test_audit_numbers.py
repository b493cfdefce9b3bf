"""What the numbers of audits say: baselines, tokens, and the asymmetry."""

import json

import numpy as np
import pytest
import torch

from entropy_polarity.diagnostics.asymmetry import by_probability, family_sensitivity, threshold
from entropy_polarity.diagnostics.audit import TokenAccount
from entropy_polarity.experiments.audit_summary import TOKEN_FIGURES, by_token, summarise
from entropy_polarity.experiments.results import write_document
from entropy_polarity.report.asymmetry import family_chart

# ---- the asymmetry -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("actions", [2, 32, 5000])
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_the_threshold_parts_what_expands_from_what_contracts(actions, scale):
    logits = scale * np.random.default_rng(actions).normal(size=actions)
    p = np.exp(logits - np.logaddexp.reduce(logits))
    entropy = -(p * np.log(p)).sum()
    correction = (p**2 * (np.log(p) + entropy)).sum()
    border = threshold(np.array(entropy), np.array(correction)).item()
    assert correction >= 0
    assert border >= np.exp(-entropy)
    assert border * (np.log(border) + entropy) == pytest.approx(correction, rel=1e-9, abs=1e-15)
    sensitivity = correction - p * (np.log(p) + entropy)
    clear = np.abs(p / border - 1) > 1e-9
    assert ((sensitivity > 0) == (p < border))[clear].all()


def test_the_threshold_refuses_what_no_distribution_has():
    with pytest.raises(ValueError, match=r"correction is -0\.1; C is never negative"):
        threshold(np.array([1.0]), np.array([-0.1]))


@pytest.mark.parametrize("tail", ["even", "zipf"])
@pytest.mark.parametrize("vocabulary", [32, 5000, 151936])
def test_a_family_has_the_sensitivity_of_its_members(tail, vocabulary):
    for share, p in ((8, 0.05), (1.3, 0.4), (1, 0.1), (0.7, 0.01), (3, 0.9)):
        ranks_ = np.arange(1, vocabulary)
        r = (ranks_ <= round(share)) * 1.0 if tail == "even" else ranks_ ** float(-share)
        q = np.append((1 - p) * r / r.sum(), p)
        q = q[q > 0]
        entropy = -(q * np.log(q)).sum()
        expected = (q**2 * (np.log(q) + entropy)).sum() - p * (np.log(p) + entropy)
        found = family_sensitivity(np.array([p]), np.array([entropy]), vocabulary, tail)
        assert found[0] == pytest.approx(expected, rel=3e-3, abs=1e-5)
    high = family_sensitivity(np.array([0.5, 0.5]), np.array([0.1, 20.0]), vocabulary, tail)
    assert np.isnan(high).all()
    with pytest.raises(ValueError, match="tail='flat', vocabulary=32; expected even or zipf"):
        family_sensitivity(np.array([0.5]), np.array([1.0]), 32, "flat")


def test_deciles_share_out_all_of_the_flow():
    draw = np.random.default_rng(0)
    p, a, t = draw.uniform(size=1000), draw.normal(size=1000), draw.normal(size=1000)
    a[:100] = 0
    rows = by_probability(p, a, t, change=a * t)
    assert len(rows) == 20
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert sum(row["expansion"] + row["contraction"] for row in rows) == pytest.approx(1)
    total = np.abs(a * t).sum()
    for row in rows:
        within = (p >= row["from"]) & (p <= row["to"]) & (np.sign(a) == (1 if row["advantage"] == "positive" else -1))
        flow = (a * t)[within]
        assert row["expansion"] == pytest.approx(flow[flow > 0].sum() / total, abs=2e-3)
        assert row["change"] == pytest.approx(flow.mean(), abs=2e-2)
    assert by_probability(p[:0], a[:0], t[:0])[0]["share"] == 0


def test_many_equal_probabilities_still_make_ten_tenths():
    p = np.concatenate([np.linspace(0.1, 0.9, 400), np.ones(600)])
    rows = by_probability(p, np.ones(1000), np.full(1000, -1.0))
    assert [row["share"] for row in rows if row["advantage"] == "positive"] == pytest.approx([0.1] * 10)
    assert [row["to"] for row in rows[::2]][3:] == [0.9] + [1.0] * 6


def test_the_map_shows_the_tokens_beside_the_nearest_vocabulary():
    cells = {"p": [0.0, 0.5, 1.0], "entropy": [0.0, 4.0, 8.0], "tokens": [[1, 2], [3, 4]]}
    for vocabulary, columns in ((None, {"x", "x5"}), (150_000, {"x4", "x8"})):
        figure = family_chart(cells, vocabulary).figure
        assert {trace.xaxis for trace in figure.data if trace.type == "contour"} == columns
        assert figure.layout.yaxis.range[1] == 8.0


# ---- the summary -------------------------------------------------------------------------------------------


def told(entropy: np.ndarray, seed: int = 0) -> list[dict]:
    """Updates whose exact level is right and whose local one is noise, from a curve of the entropy."""
    changes = np.diff(entropy)
    noise = np.random.default_rng(seed).normal(size=len(changes))
    account = lambda k: {  # noqa: E731
        "local": noise[k], "shared": noise[k] / 2, "preconditioned": None, "exact": changes[k],
        "forecast": changes[k] / 2, "realised": changes[k],
    }  # fmt: skip
    return [{"step": k + 1, "momentum": 0.9, "batch": account(k), "held_out": account(k)} for k in range(len(changes))]


def test_baselines_are_judged_on_the_updates_after_the_first():
    found = summarise([told(np.array([5.0, 4, 2, 3, 1, 0.5, 0.25, 0, 1, 2]))])["cheap"]
    # changes -1 -2 1 -2 -.5 -.25 -.25 1 1; after the first, 5 of 8 fall
    assert found["falls"] == 5 / 8
    # of the change before: -1/-2 yes, -2/1, 1/-2, -2/-.5 yes, -.5/-.25 yes, -.25/-.25 yes, -.25/1, 1/1 yes
    assert found["the last change"]["sign_agreement"]["value"] == 5 / 8
    assert found["the mean so far"]["sign_agreement"]["value"] == 5 / 8
    assert found["forecast"]["sign_agreement"]["value"] == 1
    # errors after the first five: the changes are -.25 -.25 1 1
    assert found["forecast"]["error"]["value"] == pytest.approx(0.5)
    assert found["the last change"]["error"]["value"] == pytest.approx((0.25 + 0 + 1.25 + 0) / 2.5)
    assert found["local"]["error"] is None


def test_what_a_level_explains_adds_up_and_may_fall_short_of_the_one_before():
    levels = summarise([told(np.cumsum(np.random.default_rng(s).normal(size=31)), s) for s in range(2)])
    assert levels["preconditioned"] is None
    assert list(levels["explained"]) == ["local", "shared", "exact"]
    for prefix in ("", "detrended_"):
        r2, steps = ([found[prefix + what] for found in levels["explained"].values()] for what in ("r2", "difference"))
        assert r2[2]["value"] == pytest.approx(1)
        for before, after, step in zip(r2, r2[1:], steps[1:], strict=False):
            assert step["value"] == pytest.approx(after["value"] - before["value"])
            assert step["low"] <= step["value"] <= step["high"]


def accounts_of(pressure, change, sensitivity=None) -> TokenAccount:
    """Tokens of one state each."""
    pressure, change = torch.tensor(pressure), torch.tensor(change)
    sensitivity = torch.ones_like(change) if sensitivity is None else torch.tensor(sensitivity)
    state = torch.arange(len(change))
    return TokenAccount(change, change, sensitivity, change, -sensitivity, pressure, change, state)


def test_tokens_are_weighed_by_what_they_press_and_beside_what_falls():
    found = by_token(accounts_of([1.0, -2.0, 3.0, 0.0], [0.1, -0.1, -0.2, -0.3]))
    assert found["local_sign_agreement"] == pytest.approx(2 / 3)
    assert found["local_falls"] == pytest.approx(2 / 3)
    assert found["local_weighted_sign_agreement"] == pytest.approx(3 / 6)
    assert found["local_weighted_falls"] == pytest.approx(5 / 6)
    assert found["sensitivity_weighted_sign_agreement"] == 0
    assert found["sensitivity_falls"] is None
    assert found["state_spearman"] is None


def test_an_update_without_an_advantage_has_no_figures_and_leaves_the_others(tmp_path):
    still = by_token(accounts_of([0.0, 0.0, 0.0], [0.1, -0.1, -0.2], [1.0, 2.0, 3.0]))
    assert {still[f"local_{figure}"] for figure in TOKEN_FIGURES} == {None}
    assert still["sensitivity_weighted_sign_agreement"] is None
    assert still["sensitivity_spearman"] == -1
    updates = told(np.array([5.0, 4, 2, 3, 1, 0.5]))
    updates[0]["tokens"] = still
    updates[1]["tokens"] = by_token(accounts_of([1.0, -2.0, 3.0], [0.1, -0.1, -0.2]))
    tokens = summarise([updates])["tokens"]
    assert tokens["local_sign_agreement"] == pytest.approx(2 / 3)
    write_document(tmp_path / "a.json", {"figures": [1.0, float("nan")], "tokens": tokens})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)["figures"] == [
        1.0,
        None,
    ]
