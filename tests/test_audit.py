"""The audit: perfect where theory is exact, true to the trainer's own gradient, and without a trace in the run."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from small import SMALL
from test_exact import Table, batch, embedded, log_probs, tiny
from test_trl import make_trainer

from entropy_polarity.agreement import agreement, pearson, ranks, spearman
from entropy_polarity.asymmetry import by_probability, family_sensitivity, threshold
from entropy_polarity.audit import audited
from entropy_polarity.exact import Sequences, entropy_gradient
from entropy_polarity.experiments.audit import ON_POLICY, audit
from entropy_polarity.forecast import Forecaster, spaced
from entropy_polarity.recipe import load_recipe
from entropy_polarity.trainers.auditing import UpdateAuditor, UpdateForecaster
from entropy_polarity.trainers.trl import PolarityTrainer


def one_update(model, sequences, optimizer, pressure, **options):
    """A step on the objective whose gradient is Σ c ∇ log π, audited."""
    optimizer.zero_grad()
    sampled = log_probs(model, sequences).gather(-1, sequences.input_ids[:, 1:, None])[..., 0]
    (-(pressure[:, 1:] * sampled)[sequences.mask[:, 1:]].sum()).backward()
    with audited(model, optimizer, sequences, pressure, **options) as found:
        optimizer.step()
    return found


def pressures(sequences: Sequences, seed: int = 0) -> torch.Tensor:
    draw = torch.randn(sequences.mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.where(sequences.mask, draw, 0.0) / sequences.mask.sum()


def test_in_a_table_the_local_formula_is_perfect():
    """Every state has its own parameters: over updates the local prediction is the realised change, times η / N."""
    rate, table = 1e-5, Table()
    optimizer = torch.optim.SGD(table.parameters(), lr=rate)
    mask = torch.tensor([[False, True, True, True, True, True]])
    found = []
    for step in range(8):
        draw = torch.Generator().manual_seed(step)
        sequences = Sequences(torch.randint(9, (1, 6), generator=draw), mask)
        found.append(one_update(table, sequences, optimizer, pressures(sequences, step)))
        tokens = found[-1].tokens
        torch.testing.assert_close(tokens.change, rate * tokens.pressure * tokens.sensitivity, rtol=1e-3, atol=1e-11)
    accounts = [audit.accounts["batch"] for audit in found]
    said = agreement([(np.array([a.local for a in accounts]), np.array([a.realised for a in accounts]))])
    assert said.pearson.value > 1 - 1e-6
    assert said.sign_agreement.value == 1
    assert said.slope.value == pytest.approx(rate / mask.sum().item(), rel=1e-4)
    for a in accounts:
        assert a.shared == pytest.approx(a.local / mask.sum().item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adamw"])
def test_each_level_knows_what_it_claims_to(kind):
    model, sequences, other = tiny(), batch(), batch(seed=3)
    optimizer = {
        "sgd": lambda p: torch.optim.SGD(p, lr=1e-4),
        "momentum": lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9),
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-6, weight_decay=0.0),
    }[kind](model.parameters())
    c = pressures(sequences)
    first, second = (one_update(model, sequences, optimizer, c, held_out=other) for _ in range(2))
    for seen in (first, second):
        for account in seen.accounts.values():
            assert account.exact == pytest.approx(account.realised, rel=0.02)  # the steps are small
            assert sum(account.parts.values()) == pytest.approx(account.exact)
        tokens, account = seen.tokens, seen.accounts["batch"]
        assert account.local == pytest.approx((tokens.pressure * tokens.sensitivity).sum().item())
        exact = (tokens.pressure * tokens.exact_sensitivity).sum().item()
        assert account.shared == pytest.approx(exact, rel=1e-3)  # two ways to <g, ∇J>
    start = first.accounts["held_out"]
    assert start.preconditioned == pytest.approx(start.exact)  # no momentum yet
    if kind == "sgd":
        assert start.preconditioned == pytest.approx(1e-4 * start.shared)
    later = second.accounts["held_out"]
    assert (later.preconditioned == pytest.approx(later.exact, rel=1e-3)) == (kind == "sgd")
    assert set(first.accounts["batch"].parts) == {
        "model.embed_tokens",
        "model.layers.0",
        "model.layers.1",
        "model.norm",
    }


def test_an_optimiser_that_is_not_known_leaves_its_level_out():
    model, sequences = tiny(), batch()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-6)
    found = one_update(model, sequences, optimizer, pressures(sequences)).accounts["batch"]
    assert found.preconditioned is None
    assert found.exact == pytest.approx(found.realised, rel=0.02)


def test_pressure_of_another_shape_is_refused():
    model, sequences = embedded(torch.float32), batch()
    with (
        pytest.raises(ValueError, match=r"pressure has shape \(5, 3\), the sequences \(5, 12\); expected one number"),
        audited(model, None, sequences, torch.zeros(5, 3)),
    ):
        pass


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (("grpo", {}), {}),
        (("grpo", {}), {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}),
        (("grpo", {}), {"loss_type": "grpo"}),
        (("grpo", {}), {"loss_type": "dr_grpo", "num_iterations": 2}),
        (("papo", {"controller": "constant", "lambda_": 0.5}), {"loss_type": "bnpo", "num_iterations": 2}),
        (("clip_cov", {"fraction": 0.1}), {"num_iterations": 2}),
        (("dapo", {}), {}),
    ],
)
def test_what_the_trainer_presses_is_what_its_gradient_says(tmp_path, method, settings):
    """Σ c T* from the tokens is -<g, G> from the gradient that TRL's loss made, whatever the loss and the method."""
    trainer = make_trainer(PolarityTrainer, tmp_path, method=method, max_grad_norm=0.0, max_steps=4, **settings)
    found = []
    UpdateAuditor(lambda step, audit: found.append((step, audit))).attach(trainer)
    trainer.train()
    assert [step for step, _ in found] == [1, 2, 3, 4]
    sizes = [abs(made.accounts["batch"].shared) for _, made in found]
    for _, made in found:
        said = (made.tokens.pressure * made.tokens.exact_sensitivity).sum().item()
        assert said == pytest.approx(made.accounts["batch"].shared, rel=1e-3, abs=1e-4 * max(sizes))
    assert max(sizes) > 0


def test_an_update_without_a_token_is_passed_over(tmp_path):
    """dapo drops groups of equal rewards: with all of them equal nothing is left to audit."""
    trainer = make_trainer(PolarityTrainer, tmp_path, method=("dapo", {}), max_steps=2)
    trainer.reward_funcs = [lambda completions, **_: [0.0] * len(completions)]
    found = []
    UpdateAuditor(lambda step, audit: found.append(step), lambda step: batch()).attach(trainer)
    trainer.train()
    assert trainer.state.global_step == 2
    assert found == []


def test_the_audit_leaves_no_trace_in_a_run(tmp_path):
    plain, seen = (make_trainer(PolarityTrainer, tmp_path / name, max_steps=3) for name in ("plain", "seen"))
    sequences = batch()
    found = []
    UpdateAuditor(lambda step, audit: found.append(audit), lambda step: sequences).attach(seen)
    random = []
    for trainer in (plain, seen):
        torch.manual_seed(0)
        trainer.train()
        random.append(torch.get_rng_state())
    assert len(found) == 3
    assert torch.equal(*random)
    for a, b in zip(plain.model.parameters(), seen.model.parameters(), strict=True):
        assert torch.equal(a, b)
    without = [
        {k: v for k, v in row.items() if "time" not in k and "per_second" not in k} for row in plain.state.log_history
    ]
    assert without == [
        {k: v for k, v in row.items() if k in without[i]} for i, row in enumerate(seen.state.log_history)
    ]


def test_a_forecast_of_all_sequences_is_the_exact_level_and_of_some_that_of_these():
    model, sequences = tiny(), batch(rows=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    c = pressures(sequences)
    one_update(model, sequences, optimizer, c)  # there is momentum now
    whole = one_update(model, sequences, optimizer, c, forecaster=Forecaster(1.0, 0.0)).accounts["batch"]
    assert whole.forecast == pytest.approx(whole.exact)
    few = Sequences(*(None if x is None else x[[0, 4]] for x in sequences))
    seen = one_update(model, sequences, optimizer, c, forecaster=Forecaster(1 / 4), held_out=few)
    assert seen.accounts["batch"].forecast == pytest.approx(seen.accounts["held_out"].exact)  # nothing to average yet
    assert seen.accounts["batch"].forecast != pytest.approx(seen.accounts["batch"].exact, rel=0.01)
    assert seen.momentum == 0.9
    assert one_update(model, sequences, optimizer, c).accounts["batch"].forecast is None


def test_a_forecaster_averages_the_slopes_that_it_saw():
    model, forecaster, slopes = tiny(), Forecaster(1.0, 0.75, every=2), []
    for seed in range(6):
        if seed % 2 == 0:
            slopes.append(entropy_gradient(model, batch(seed=seed))[1])
        with forecaster.foretold(model, batch(seed=seed)) as forecast:
            assert math.isnan(forecast.change)
            with torch.no_grad():
                for p in model.parameters():
                    p += 1e-3
    weights = [0.25 * 0.75**2, 0.25 * 0.75, 0.25]
    said = sum(w * 1e-3 * sum(p.sum() for p in g.values()) for w, g in zip(weights, slopes, strict=True)) / sum(weights)
    assert forecast.change == pytest.approx(said.item())
    with pytest.raises(ValueError, match=r"memory is 1\.0; expected at least 0 and below 1"):
        Forecaster(memory=1.0)
    with pytest.raises(ValueError, match=r"share is 2\.0; expected a part"):
        Forecaster(share=2.0)
    with pytest.raises(ValueError, match=r"every is 0; expected a number of updates"):
        Forecaster(every=0)


def test_a_share_is_taken_of_sequences_that_have_something():
    sequences = batch(rows=8)
    mask = sequences.mask.clone()
    mask[[0, 2]] = False
    kept = spaced(sequences._replace(mask=mask), 1 / 3).input_ids
    assert torch.equal(kept, sequences.input_ids[[1, 5]])
    assert len(spaced(sequences, 1e-3).mask) == 1
    for share in (0.0, 1.5, -1.0):
        with pytest.raises(ValueError, match=f"share is {share}; expected a part"):
            spaced(sequences, share)


def test_a_state_is_the_text_before_a_token_wherever_the_padding_is():
    ids = torch.tensor([[0, 5, 6, 7, 8], [5, 6, 7, 9, 8], [5, 6, 8, 9, 8]])
    attention = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    mask = torch.tensor([[False, False, True, True, True], [False, True, True, True, True], [False] + [True] * 4])
    model = embedded(torch.float32)
    model.config.vocab_size = 10
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.5)
    seen = one_update(model, Sequences(ids, mask, attention), optimizer, torch.where(mask, 0.1, 0.0))
    first, second, third = seen.tokens.state.split([3, 4, 4])
    assert torch.equal(first, second[:3])  # after 5, 56, 567
    assert second[3] not in first
    assert torch.equal(third[:2], second[:2])
    assert len(torch.cat([second, third[2:]]).unique()) == 6
    assert seen.momentum == 0.5


def test_the_forecaster_logs_every_update_and_leaves_no_trace(tmp_path):
    settings = {"max_steps": 4, "num_iterations": 2}
    plain, told, seen = (make_trainer(PolarityTrainer, tmp_path / n, **settings) for n in ("a", "b", "c"))
    UpdateForecaster(share=1 / 4, memory=0.0, every=1).attach(told)
    found = []
    UpdateAuditor(lambda step, audit: found.append(audit.accounts["batch"].exact)).attach(seen)
    for trainer in (plain, told, seen):
        torch.manual_seed(0)
        trainer.train()
    for a, b in zip(plain.model.parameters(), told.model.parameters(), strict=True):
        assert torch.equal(a, b)
    forecasts = [row["polarity/forecast_entropy_change"] for row in told.state.log_history if "loss" in row]
    assert len(forecasts) == len(found) == 4
    assert np.corrcoef(forecasts, found)[0, 1] > 0.5
    assert not any("polarity/forecast_entropy_change" in row for row in plain.state.log_history)


# ---- statistics ------------------------------------------------------------------------------------------


def test_correlations_of_known_cases():
    x, y = np.array([1.0, 2, 3, 4, 5]), np.array([2.0, 1, 4, 3, 5])
    assert pearson(x, y) == pytest.approx(0.8)
    assert spearman(x, np.exp(y)) == pytest.approx(0.8)
    assert spearman(np.array([1.0, 2, 2, 3]), np.array([1.0, 3, 2, 4])) == pytest.approx(0.9486832980505138)
    assert ranks(np.array([2.0, 2, 1])).tolist() == [1.5, 1.5, 0]
    assert np.isnan(pearson(x, np.ones(5)))


def test_intervals_cover_and_blocks_widen_them_where_updates_hang_together():
    draw = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        x = draw.normal(size=60)
        y = 2 * x + draw.normal(size=60)
        found = agreement([(x[:30], y[:30]), (x[30:], y[30:])], draws=200).slope
        hits += found.low <= 2 <= found.high
    assert hits >= 85
    common = np.repeat(draw.normal(size=(2, 12)), 5, axis=1)  # every value five times in a row
    single, blocks = (agreement([(common[0], common[1])], block=block, draws=500).pearson for block in (1, 5))
    assert blocks.high - blocks.low > 1.5 * (single.high - single.low)


def test_what_cannot_be_compared_is_refused():
    for x, y in (([1.0, 2.0], [1.0, 2.0]), ([1.0, 2.0, 3.0], [1.0, 2.0]), ([1.0, 2.0, np.nan], [1.0, 2.0, 3.0])):
        with pytest.raises(ValueError, match="expected as many of each"):
            agreement([(np.array(x), np.array(y))])


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
@pytest.mark.parametrize("vocabulary", [32, 5000])
def test_a_family_has_the_sensitivity_of_its_members(tail, vocabulary):
    for share, p in ((8, 0.05), (1.3, 0.4), (3, 0.9)):
        ranks_ = np.arange(1, vocabulary)
        r = (ranks_ <= round(share)) * 1.0 if tail == "even" else ranks_ ** float(-share)
        q = np.append((1 - p) * r / r.sum(), p)
        q = q[q > 0]
        entropy = -(q * np.log(q)).sum()
        expected = (q**2 * (np.log(q) + entropy)).sum() - p * (np.log(p) + entropy)
        found = family_sensitivity(np.array([p]), np.array([entropy]), vocabulary, tail)
        assert found[0] == pytest.approx(expected, rel=0.01, abs=1e-5)
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


# ---- the command -------------------------------------------------------------------------------------------

TINY = (*SMALL, "evaluation.problems=8", "trainer.max_completion_length=16")


def test_an_audit_is_made_kept_and_read_again(tmp_path):
    recipe = load_recipe("countdown", [*TINY, *ON_POLICY, "trainer.max_steps=4"], "grpo")
    seen = []
    document = audit(recipe, [0, 1], tmp_path, lambda *line: seen.append(line))
    assert [line[:2] for line in seen] == [(seed, step) for seed in (0, 1) for step in range(1, 5)]
    stored = json.loads((tmp_path / "audit.json").read_text())
    for levels in (stored, stored["held_out"]):
        assert set(levels["exact"]) == {"pearson", "spearman", "sign_agreement", "slope", "offset"}
        explained = [levels["gap"][name] for name in list(levels["gap"])[1:]]
        assert sum(explained) == pytest.approx(levels["gap"]["local leaves"])
    page = (tmp_path / "audit.html").read_text()
    assert "What closes the gap" in page
    assert page.count("<h3>") == 5
    again = []
    kept = audit(recipe, [0, 1], tmp_path, lambda *line: again.append(line))
    assert again == []
    assert {k: v for k, v in kept.items() if k != "environment"} == {
        k: v for k, v in document.items() if k != "environment"
    }
    with pytest.raises(ValueError, match="holds an audit of another recipe"):
        audit(load_recipe("countdown", [*TINY, *ON_POLICY], "dapo"), [0], tmp_path)


def test_the_command_prints_one_document(tmp_path):
    flags = [f"--set={override}" for override in TINY]
    command = [sys.executable, "-m", "entropy_polarity.cli", "audit", "--steps", "4", "--optimizer", "sgd", "--json"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "a"), *flags], capture_output=True, text=True, check=True
    )
    document = json.loads(done.stdout)
    assert -1 <= document["exact"]["pearson"]["value"] <= 1
    assert 0 <= document["local"]["spearman"]["high"] <= 1
    assert "update 4/4" in done.stderr


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--method", "grop"], "grop"),
        (["--steps", "0"], "max_steps is 0"),
        (["--steps", "2"], "2 updates, seeds [0]: an audit needs 3 updates"),
        (["--model", "nowhere"], "cannot load a model from 'nowhere'"),
        (["--optimizer", "lion"], "lion"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, flags, told):
    command = [sys.executable, "-m", "entropy_polarity.cli", "audit", "--output", str(tmp_path / "a"), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "a").exists()
