"""The audit: perfect where theory is exact, true to the trainer's own gradient, and without a trace in the run."""

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_exact import Table, batch, embedded, log_probs, tiny
from test_trl import make_trainer

from entropy_polarity.diagnostics.audit import audited
from entropy_polarity.diagnostics.entropy import Sequences, entropy_gradient
from entropy_polarity.diagnostics.forecast import Forecaster, subsample
from entropy_polarity.experiments.auditing import (
    held_out_states,
)
from entropy_polarity.statistics.agreement import agreement_of
from entropy_polarity.tasks.prompts import encoded
from entropy_polarity.trainers.trl import PolarityTrainer
from entropy_polarity.trainers.trl.auditing import UpdateAuditor, UpdateForecaster


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


def test_in_a_table_of_states_visited_once_the_local_formula_is_perfect():
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
    said = agreement_of([(np.array([a.local for a in accounts]), np.array([a.realised for a in accounts]))])
    assert said.pearson.value > 1 - 1e-6
    assert said.sign_agreement.value == 1
    assert said.slope.value == pytest.approx(rate / mask.sum().item(), rel=1e-4)
    for a in accounts:
        assert a.shared == pytest.approx(a.local / mask.sum().item(), rel=1e-4)


@pytest.mark.parametrize("lengths", [[6, 6], [6, 4, 3], [2, 5, 5, 3]])
def test_in_a_table_each_token_counts_as_often_as_its_state_was_visited(lengths):
    """η/N Σ m_s c T is the change of the mean over N states, m_s of which are one; -<g, G> is it without η."""
    rate, table = 1e-6, Table()
    optimizer = torch.optim.SGD(table.parameters(), lr=rate)
    mask = torch.tensor([[0 < place < length for place in range(6)] for length in lengths])
    ids = torch.randint(9, mask.shape, generator=torch.Generator().manual_seed(1))
    found = one_update(table, Sequences(ids, mask), optimizer, pressures(Sequences(ids, mask)))
    visits = mask.sum(0, keepdim=True).expand_as(mask)[mask]  # the rows of the table are positions
    tokens, account = found.tokens, found.accounts["batch"]
    expected = (visits * tokens.pressure * tokens.sensitivity).sum().item() / mask.sum().item()
    assert account.shared == pytest.approx(expected, rel=1e-3)
    assert account.realised == pytest.approx(rate * expected, rel=1e-3)


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


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.RMSprop(p, lr=1e-6), lambda p: torch.optim.SGD(p, lr=1e-6, maximize=True)]
)
def test_an_optimiser_that_is_not_known_leaves_its_level_out(make):
    model, sequences = tiny(), batch()
    seen = one_update(model, sequences, make(model.parameters()), pressures(sequences))
    found = seen.accounts["batch"]
    assert found.preconditioned is None
    assert seen.momentum is None
    assert found.exact == pytest.approx(found.realised, rel=0.02)


def test_the_state_of_the_optimiser_gets_no_entry():
    model, sequences = tiny(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    one_update(model, sequences, optimizer, pressures(sequences))
    assert not optimizer.state


def test_adapters_alone_are_audited():
    model = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    sequences = batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    seen = one_update(model, sequences, optimizer, pressures(sequences), forecaster=Forecaster(1.0, 0.0))
    account = seen.accounts["batch"]
    assert account.exact == pytest.approx(account.realised, rel=0.02)
    assert account.forecast == pytest.approx(account.exact)
    assert account.shared == pytest.approx(
        (seen.tokens.pressure * seen.tokens.exact_sensitivity).sum().item(), rel=1e-3
    )


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
    """With held-out states as the command samples them."""
    plain, seen = (make_trainer(PolarityTrainer, tmp_path / name, max_steps=3) for name in ("plain", "seen"))
    prompts = [encoded(row["prompt"], seen.processing_class) for row in seen.train_dataset.select(range(3))]
    found = []

    def held_out(step):
        modes = [module.training for module in seen.model.modules()]
        states = held_out_states(seen.model, seen.processing_class, prompts, 6, 1.0, step)
        assert [module.training for module in seen.model.modules()] == modes
        return states

    seen.model.model.norm.eval()  # one mode of its own
    plain.model.model.norm.eval()
    UpdateAuditor(lambda step, audit: found.append(audit), held_out).attach(seen)
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


def test_a_forecaster_averages_the_gradients_that_it_observed():
    model, forecaster, slopes = tiny(), Forecaster(1.0, 0.75, every=2), []
    for seed in range(6):
        if seed % 2 == 0:
            slopes.append(entropy_gradient(model, batch(seed=seed))[1])
        with forecaster.forecasting(model, batch(seed=seed)) as forecast:
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
    kept = subsample(sequences._replace(mask=mask), 1 / 3).input_ids
    assert torch.equal(kept, sequences.input_ids[[1, 5]])
    assert len(subsample(sequences, 1e-3).mask) == 1
    for share in (0.0, 1.5, -1.0):
        with pytest.raises(ValueError, match=f"share is {share}; expected a part"):
            subsample(sequences, share)


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


@pytest.mark.parametrize("first", [UpdateForecaster, lambda: UpdateAuditor(print)])
def test_one_watches_the_losses_of_a_trainer(tmp_path, first):
    trainer = make_trainer(PolarityTrainer, tmp_path, max_steps=1)
    first().attach(trainer)
    for second in (UpdateForecaster(), UpdateAuditor(print)):
        with pytest.raises(ValueError, match="needs the trainer's on_loss, which is taken: attach one UpdateAuditor"):
            second.attach(trainer)
        assert second not in trainer.callback_handler.callbacks


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
