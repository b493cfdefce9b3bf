"""What PolarityTrainer tells where it changes nothing: under losses of whole sequences, and in evaluations."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from test_trl import NEUTRAL, make_trainer, recorded
from trl import GRPOTrainer

from entropy_polarity import token_stats
from entropy_polarity.methods import make_transform
from entropy_polarity.tokens import Tokens
from entropy_polarity.trainers.trl import PolarityConfig, PolarityTrainer
from entropy_polarity.trainers.trl.evaluation import EvaluatedTokens
from entropy_polarity.trainers.trl.loss import averaged, importance
from entropy_polarity.trainers.trl.packing import COLUMNS
from entropy_polarity.trainers.trl.rollout import Rollout, Statistics
from entropy_polarity.transforms import token_polarity
from entropy_polarity.transforms.core import rewriting, token_by_token

LOSSES = ("dapo", "grpo", "bnpo", "dr_grpo", "luspo", "cispo", "sapo", "vespo")


@pytest.fixture(scope="module")
def rolled_out(tmp_path_factory):
    """A trainer after one step at learning rate 0, and its rollout."""
    folder = tmp_path_factory.mktemp("rolled")
    trainer = make_trainer(PolarityTrainer, folder, method=NEUTRAL["grpo"], max_steps=1, learning_rate=0.0)
    rollouts = recorded(trainer)
    trainer.train()
    return trainer, rollouts[0]


@pytest.mark.parametrize("corrected", [False, True], ids=["", "engine's correction"])
@pytest.mark.parametrize(("level", "loss_type"), itertools.product(("token", "sequence"), LOSSES))
def test_w_and_the_average_are_the_derivative_of_trls_loss(rolled_out, monkeypatch, level, loss_type, corrected):
    """d loss / d log p = -A w · share of every token, with ratios on both sides of the clip, rows of several lengths
    and one of no token at all; share is what `averaged` gives a token."""
    trainer, rollout = rolled_out
    monkeypatch.setattr(trainer, "loss_type", loss_type)
    monkeypatch.setattr(trainer, "importance_sampling_level", level)
    monkeypatch.setattr(trainer, "use_vllm", corrected)
    monkeypatch.setattr(trainer, "vllm_importance_sampling_correction", corrected)
    inputs = dict(rollout.inputs)
    shape = inputs["completion_ids"].shape
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(shape[1]) < torch.randint(1, shape[1] + 1, (shape[0], 1), generator=generator)
    mask[0] = False
    inputs["completion_mask"] = mask.int()
    logp = rollout.tokens.unpack(rollout.tokens.require("logp"), shape, -1.0).double().requires_grad_()
    # A part that all tokens of a sequence share, so that some sequences as a whole lie outside of the clip.
    noise = 0.4 * torch.randn(shape, generator=generator) + 0.4 * torch.randn(shape[0], 1, generator=generator)
    inputs["old_per_token_logps"] = logp.detach() + noise
    inputs["advantages"] = torch.randn(shape[0], generator=generator).double()
    correction = torch.rand(shape, generator=generator).double() + 0.5 if corrected else None
    if corrected:
        inputs["importance_sampling_ratio"] = correction

    zeros = torch.zeros(shape)
    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", lambda *a, **k: (logp, zeros, None))
    trainer.model.train()
    GRPOTrainer._compute_loss(trainer, trainer.model, inputs).backward()
    old_logp, samples = inputs["old_per_token_logps"], torch.arange(shape[0])
    tokens = Tokens.pack(mask, inputs["advantages"], logp=logp.detach(), old_logp=old_logp, sample_id=samples)
    w = importance(trainer, tokens, correction)
    ones = torch.ones_like(w, requires_grad=True)
    (share,) = torch.autograd.grad(averaged(trainer, ones, tokens, inputs), ones)
    expected = tokens.unpack(-tokens.advantages * w * share, shape)
    torch.testing.assert_close(logp.grad, expected, rtol=1e-5, atol=1e-12)
    if loss_type in ("dapo", "grpo", "bnpo", "dr_grpo", "luspo"):
        assert (w == 0).any(), "some are outside of the clip"
        assert (w != 0).any()


def test_a_sequences_ratio_is_that_of_its_mean_log_ratio(rolled_out, monkeypatch):
    """log r = 0.1, -0.3 of two model tokens (and 5, which is masked): s = exp(-0.1) for both, alive under clip 0.2 with
    A > 0 or A < 0; with log r = 0.1, 0.5: s = exp(0.3) > 1.2, dead with A > 0 and alive with A < 0."""
    trainer, _ = rolled_out
    monkeypatch.setattr(trainer, "importance_sampling_level", "sequence")
    log_ratio = torch.tensor([[0.1, -0.3, 5.0]] * 2 + [[0.1, 0.5, 5.0]] * 2)
    mask = torch.tensor([[True, True, False]] * 4)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    w = importance(trainer, Tokens.pack(mask, advantages, logp=log_ratio, old_logp=torch.zeros(4, 3)), None)
    low, high = 0.9048374180359595, 1.3498588075760032
    torch.testing.assert_close(w.view(4, 2), torch.tensor([[low, low], [low, low], [0.0, 0.0], [high, high]]))


def flipped(tokens):
    return replace(tokens, advantages=-tokens.advantages)


TURNING = {
    "each token": token_by_token(lambda tokens, state: flipped(tokens)),
    "rewards": rewriting(flipped, "reward"),
    "whole batch": rewriting(flipped, "entropy"),
    "w_reinforce": make_transform("w_reinforce", {"right": 1.0, "wrong": 1.0}),
}


@pytest.mark.parametrize("transform", TURNING.values(), ids=TURNING)
def test_the_clip_is_judged_with_the_sign_of_the_advantage_that_is_put_in(rolled_out, monkeypatch, transform):
    """r = 1.5, 1.5, 0.5 and T = 2, 3, 4 with the clip at 0.2, in a first pass on a policy already updated. TRL's
    A = -1, 1, 1 have w = 1.5, 0, 0.5 and P = -3, 0, 2; A' = 1, -1, -1 have w = 0, 1.5, 0 and P = 0, -4.5, 0."""
    trainer, _ = rolled_out
    rollout, of_row = Rollout(), torch.arange(3)
    for name, value in {"transform": transform, "method_state": transform.init(), "rollout": rollout}.items():
        monkeypatch.setattr(trainer, name, value)
    monkeypatch.setattr(trainer, "epsilon_high", trainer.epsilon_low)
    logp, entropy, t = torch.tensor([[1.5], [1.5], [0.5]]).log(), torch.ones(3, 1), torch.tensor([[2.0], [3.0], [4.0]])
    logp.requires_grad_()
    statistics = Statistics(logp.detach(), entropy, t)
    monkeypatch.setattr(trainer, "_with_statistics", lambda *a, **k: ((logp, entropy, None), statistics))
    ones = torch.ones(3, 1, dtype=torch.long)
    batch = {"prompt_ids": ones, "prompt_mask": ones, "completion_ids": ones, "completion_mask": ones}
    batch |= {"old_per_token_logps": torch.zeros(3, 1), "advantages": torch.tensor([-1.0, 1.0, 1.0])}
    columns = {"reward": torch.tensor([1.0, 0.0, 0.0]), "group": 0 * of_row, "sample_id": of_row}
    batch |= {COLUMNS[name]: column for name, column in columns.items()}
    rollout.inputs = batch | {"num_items_in_batch": torch.tensor(3)}
    decided = rollout.inputs
    if transform.decides_from != "each token":
        rollout.tokens = trainer._tokens(rollout.inputs, *statistics if transform.decides_from == "whole batch" else ())
        decided = trainer._decided(rollout)
    trainer.model.train()
    trainer._compute_loss(trainer.model, decided).backward()
    torch.testing.assert_close(logp.grad, torch.tensor([[0.0], [1.5 / 3], [0.0]]))
    assert rollout.tokens.advantages.tolist() == [-1, 1, 1]
    assert rollout.after.advantages.tolist() == [1, -1, -1]
    torch.testing.assert_close(rollout.tokens.importance, torch.tensor([1.5, 0.0, 0.5]))
    torch.testing.assert_close(rollout.after.importance, torch.tensor([0.0, 1.5, 0.0]))
    names = ("positive_flow", "negative_flow", "predicted_entropy_change")
    found = [rollout.metrics[f"polarity/{name}"] for name in names]
    assert found == pytest.approx([2 / 3, 3 / 3, -4.5 / 3], rel=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"importance_sampling_level": "sequence", "loss_type": "grpo"},
        {"importance_sampling_level": "sequence", "loss_type": "luspo", "epsilon": 1e-4},
        {"loss_type": "luspo"},
    ],
    ids=["sequence", "luspo of sequences", "luspo of tokens"],
)
@pytest.mark.parametrize("method", ["grpo", "entropy_bonus"])
def test_whole_sequences_are_monitored_and_nothing_is_changed(tmp_path, settings, method):
    """GRPOTrainer's own losses, metrics and weights, to the last bit, beside every polarity metric."""
    settings = settings | {"num_iterations": 2, "per_device_train_batch_size": 8, "steps_per_generation": 2}
    ours = make_trainer(
        PolarityTrainer, tmp_path / "ours", statistics_head="trl", max_steps=4, **settings,
        method=(method, {"coefficient": 0.0} if method == "entropy_bonus" else {}),
    )  # fmt: skip
    rollouts = recorded(ours)
    ours.train()
    theirs = make_trainer(GRPOTrainer, tmp_path / "theirs", max_steps=4, **settings)
    theirs.train()
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for mine, other in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        for name, value in other.items():
            assert mine[name] == value or "time" in name or "per_second" in name, name
    assert rollouts
    for rollout in rollouts:
        p = token_polarity(rollout.tokens)
        flow = p.clamp(min=0).sum() / rollout.inputs["completion_mask"].sum()
        assert rollout.metrics["polarity/positive_flow"] == pytest.approx(flow.item(), rel=1e-6)
    assert any(rollout.metrics["polarity/positive_flow"] > 0 for rollout in rollouts)


def test_a_weight_of_sequences_is_logged_as_trl_logs_it(tmp_path):
    """VESPO's φ is one for each response, and so is its mean: λ = 0 leaves the tokens of one the same advantage."""
    settings = {"loss_type": "vespo", "num_iterations": 2, "statistics_head": "trl", "max_steps": 2}
    ours = make_trainer(PolarityTrainer, tmp_path / "ours", method=NEUTRAL["constant"], **settings)
    ours.train()
    del settings["statistics_head"]
    theirs = make_trainer(GRPOTrainer, tmp_path / "theirs", **settings)
    theirs.train()
    names = ("loss", "grad_norm", "vespo/phi_seq_mean")
    found = [[[row[name] for name in names] for row in t.state.log_history if "loss" in row] for t in (ours, theirs)]
    assert found[0] == found[1]
    assert found[0][1][2] != 1.0, "the second update is away from the policy that sampled"


@pytest.mark.parametrize("name", ["papo", "opefo", "top_entropy", "adaptive_coefficient"])
def test_token_weights_are_refused_with_sequences_in_one_line(tmp_path, name):
    settings = {"report_to": "none", "use_cpu": True, "bf16": False, "importance_sampling_level": "sequence"}
    told = f"method '{name}' looks at single tokens, .*: use importance_sampling_level='token'"
    with pytest.raises(ValueError, match=told):
        PolarityConfig(str(tmp_path), method=name, **settings)


@pytest.mark.parametrize("name", ["dapo", "qae", "w_reinforce", "nsr"])
def test_methods_of_whole_responses_train_sequences(tmp_path, name):
    """One advantage a response, and TRL's clip ratios are shares of sequences: multiples of 1 / 16."""
    trainer = make_trainer(
        PolarityTrainer, tmp_path, method=(name, {}), max_steps=2, importance_sampling_level="sequence",
        num_iterations=2,
    )  # fmt: skip
    trainer.train()
    for row in trainer.state.log_history[:2]:
        assert (row["clip_ratio/region_mean"] * 16) % 1 == 0


# ---- evaluations ----------------------------------------------------------------------------------------------


def evaluating(kind, folder, **settings):
    return make_trainer(kind, folder, held_out=16, max_steps=2, per_device_eval_batch_size=8, **settings)


@pytest.mark.parametrize("head", ["trl", "fused"])
def test_an_evaluation_has_the_statistics_of_its_rollouts(tmp_path, head, monkeypatch):
    """From the model's own logits at temperature 0.7: means over all tokens, not over batches of unlike size."""
    trainer = evaluating(
        PolarityTrainer, tmp_path, method=NEUTRAL["grpo"], statistics_head=head, temperature=0.7,
    )  # fmt: skip
    batches = []
    compute = GRPOTrainer._compute_loss
    monkeypatch.setattr(
        GRPOTrainer, "_compute_loss", lambda self, m, inputs: batches.append(inputs) or compute(self, m, inputs)
    )
    found = trainer.evaluate()
    assert len(batches) == 8
    entropies, sensitivities, polarities = [], [], []
    for inputs in batches:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        keep, mask = inputs["completion_ids"].shape[1], inputs["completion_mask"].bool()
        with torch.no_grad():
            logits = trainer.model(input_ids=ids, attention_mask=attention).logits[:, -keep - 1 : -1]
        stats = token_stats(logits, ids[:, -keep:], temperature=0.7)
        entropies.append(stats.entropy[mask])
        sensitivities.append(stats.sensitivity[mask])
        polarities.append((inputs["advantages"][:, None] * stats.sensitivity)[mask])
    entropy, t, p = map(torch.cat, (entropies, sensitivities, polarities))
    expected = {
        "entropy": entropy.mean(), "sensitivity": t.mean(), "contracting_fraction": (t < 0).float().mean(),
        "positive_flow": p.clamp(min=0).mean(), "negative_flow": (-p).clamp(min=0).mean(),
        "positive_fraction": (p > 0).float().mean(), "predicted_entropy_change": p.mean(), "nonfinite_tokens": 0.0,
    }  # fmt: skip
    assert p.any()
    got = {n.removeprefix("eval_polarity/"): v for n, v in found.items() if n.startswith("eval_polarity/")}
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name] == pytest.approx(float(value), rel=1e-4, abs=1e-6), name
    assert trainer.state.log_history[-1].items() >= {name: found[name] for name in found if "polarity" in name}.items()


@pytest.mark.parametrize("method", [NEUTRAL["grpo"], NEUTRAL["trend"]], ids=["grpo", "trend"])
def test_an_evaluation_leaves_the_training_as_it_was(tmp_path, method):
    """Evaluated after each step: TRL's keys and values and the weights are GRPOTrainer's, the method's state that of a
    run without evaluations."""
    settings = {"eval_strategy": "steps", "eval_steps": 1}
    ours = evaluating(PolarityTrainer, tmp_path / "ours", method=method, statistics_head="trl", **settings)
    ours.train()
    theirs = evaluating(GRPOTrainer, tmp_path / "theirs", **settings)
    theirs.train()
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for mine, other in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        assert all(mine[n] == v or "time" in n or "per_second" in n for n, v in other.items())
        extra = mine.keys() - other.keys()
        assert all(name.startswith("eval_polarity/" if "eval_loss" in mine else "polarity/") for name in extra)
    assert sum("eval_polarity/entropy" in row for row in ours.state.log_history) == 2
    alone = make_trainer(PolarityTrainer, tmp_path / "alone", method=method, statistics_head="trl", max_steps=1)
    alone.train()
    before = copy.deepcopy(alone.checkpoint_state)
    alone.evaluate(alone.train_dataset.select(range(8)))
    assert alone.checkpoint_state == before
    assert not alone._metrics["train"]


def test_groups_of_one_have_no_flows(tmp_path):
    found = evaluating(PolarityTrainer, tmp_path, num_generations_eval=1).evaluate()
    assert {name for name in found if name.startswith("eval_polarity/")} == {
        "eval_polarity/entropy", "eval_polarity/sensitivity", "eval_polarity/contracting_fraction",
        "eval_polarity/nonfinite_tokens",
    }  # fmt: skip


def test_means_are_over_tokens_and_of_what_is_finite():
    """By hand: H = 1, 2, 3 (and an infinite one); T = -1, 2, 3; A = 1 for the first batch and -2 for the second."""

    def batch(entropy, t, a):
        row = [torch.tensor([values]) for values in (entropy, t)]
        mask = torch.ones_like(row[0], dtype=torch.bool)
        return Tokens.pack(mask, torch.tensor([a]), entropy=row[0], sensitivity=row[1])

    evaluated = EvaluatedTokens()
    evaluated.add(batch([1.0], [-1.0], 1.0))
    evaluated.add(batch([2.0, 3.0, torch.inf], [2.0, 3.0, 1.0], -2.0))
    assert evaluated.take(flows=True) == pytest.approx({
        "polarity/entropy": 2.0, "polarity/sensitivity": 4 / 3, "polarity/contracting_fraction": 1 / 3,
        "polarity/positive_flow": 0.0, "polarity/negative_flow": (1 + 4 + 6) / 3, "polarity/positive_fraction": 0.0,
        "polarity/predicted_entropy_change": -11 / 3, "polarity/nonfinite_tokens": 1.0,
    })  # fmt: skip
    assert evaluated.take(flows=True) == {}


def test_where_nothing_was_written_no_entropy_is_logged(tmp_path):
    """Every token masked (all completions cut off): polarity/entropy is absent, not None."""
    trainer = make_trainer(
        PolarityTrainer, tmp_path, max_steps=2, max_completion_length=1, mask_truncated_completions=True
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows
    for row in rows:
        assert [name for name, value in row.items() if value is None] == []
        assert "polarity/entropy" not in row
        assert row["polarity/positive_flow"] == 0
