"""Every method inside TRL's trainer: the same for any split or number of processes, equal to TRL where TRL has it."""

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from test_trl import history, make_trainer, recorded
from trl import GRPOTrainer

from entropy_polarity.diagnostics.exact import exact_sensitivity
from entropy_polarity.methods import METHODS
from entropy_polarity.tokens import Tokens
from entropy_polarity.trainers.trl import PolarityConfig, PolarityTrainer
from entropy_polarity.trainers.trl.loss import averaged
from entropy_polarity.trainers.trl.sequences import sequences_of

EXAMPLES = {name: (name, method.example) for name, method in METHODS.items()}
STATEFUL = {
    **{name: EXAMPLES[name] for name in ("clip_cov", "entropic", "gepo", "adaptive_coefficient")},
    "stare": ("stare", {"adaptive": True}),
    "thermostat": ("papo", {"controller": "thermostat", "level": 0.3}),
    "trend": ("papo", {"controller": "trend"}),
    "reference": ("papo", {"controller": "reference", "level": 0.3}),
    "exact": ("papo", {"controller": "reference", "level": 0.3, "sign_from": "exact", "every": 2}),
    "conserved": ("papo", {"controller": "reference", "level": 0.3, "conserve": True}),
}
REUSED = {"num_iterations": 2, "max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}


def trained(folder, method, reward=None, **settings):
    """(first rollout, way of the weights) of a short run; plain SGD, as Adam blows rounding up to whole steps."""
    trainer = make_trainer(PolarityTrainer, folder, method=method, **REUSED | settings)
    if reward is not None:
        trainer.reward_funcs = [reward]
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    rollouts = recorded(trainer)
    trainer.train()
    way = torch.cat([(p.detach() - start[name]).flatten() for name, p in trainer.model.named_parameters()])
    return rollouts[0], way


def uneven(completions, **_):
    """A reward without ties: no group is dropped."""
    return [math.sin(7 * sum(map(ord, text)) + len(text)) for text in completions]


@pytest.mark.parametrize(
    "splits", [pytest.param(2, marks=pytest.mark.slow), 4, pytest.param(8, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("method", EXAMPLES.values(), ids=EXAMPLES)
def test_a_rollout_trained_in_pieces_moves_the_policy_the_same_way(tmp_path, method, splits):
    whole, way = trained(tmp_path / "whole", method, num_generations=2)
    pieces = {"per_device_train_batch_size": 16 // splits, "gradient_accumulation_steps": splits}
    split, same_way = trained(tmp_path / "split", method, num_generations=2, **pieces)
    assert torch.equal(split.inputs["completion_ids"], whole.inputs["completion_ids"])
    torch.testing.assert_close(split.weight, whole.weight, rtol=1e-4, atol=1e-5)
    assert way.norm() > 0
    assert (way - same_way).norm() <= 1e-3 * way.norm()


@pytest.mark.parametrize("method", STATEFUL.values(), ids=STATEFUL)
def test_the_state_of_a_method_survives_a_checkpoint(tmp_path, method):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "num_iterations": 2, "method": method}
    unbroken = make_trainer(PolarityTrainer, tmp_path / "a", **settings)
    unbroken.train()
    resumed = make_trainer(PolarityTrainer, tmp_path / "b", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    assert unbroken.checkpoint_state != {"entropy": None, "inner": unbroken.transform.init()}
    assert resumed.checkpoint_state == unbroken.checkpoint_state
    for (name, a), b in zip(resumed.model.named_parameters(), unbroken.model.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("method", "theirs"),
    [
        (("entropy_bonus", {"coefficient": 0.02}), {"entropy_coef": 0.02}),
        (
            ("adaptive_coefficient", {"target": 0.5, "step": 0.01, "maximum": 0.015}),
            {
                "use_adaptive_entropy": True, "entropy_coef": 0.0, "entropy_target": 0.5, "entropy_coef_delta": 0.01,
                "entropy_coef_min": 0.0, "entropy_coef_max": 0.015,
            },
        ),
        (("top_entropy", {"fraction": 0.3, "denominator": "all"}), {"top_entropy_quantile": 0.3}),
        (("dapo", {}), {"epsilon": 0.2, "epsilon_high": 0.28, "loss_type": "dapo"}),
        (("dapo", {"clip_low": 0.01, "clip_high": 0.02}), {"epsilon": 0.01, "epsilon_high": 0.02}),
    ],
    ids=["entropy bonus", "adaptive coefficient", "80/20", "clip-higher", "tight clip"],
)  # fmt: skip
def test_what_trl_has_too_is_trls(tmp_path, method, theirs):
    more = {} if method[0] != "dapo" else {"num_iterations": 2}
    ours, trls = [], []
    for kind, settings, kept in (
        (PolarityTrainer, {"method": method, "statistics_head": "trl"}, ours),
        (GRPOTrainer, theirs, trls),
    ):
        trainer = make_trainer(kind, tmp_path / kind.__name__, max_steps=4, optim="sgd", **settings, **more)
        trainer.reward_funcs = [uneven]
        trainer.train()
        kept += history(trainer, "loss", "grad_norm")
        kept.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(ours.pop(), trls.pop(), rtol=1e-5, atol=1e-7)
    assert len(ours) == 4
    for a, b in zip(ours, trls, strict=True):
        assert a == pytest.approx(b, rel=2e-3, abs=1e-6)


def test_dapo_drops_equal_groups_from_the_loss(tmp_path):
    """Two of four groups have equal rewards: the gradient is a mean over the tokens of the other two."""

    def some_equal(completions, **_):
        return [1.0 if row < 8 else reward for row, reward in enumerate(uneven(completions))]

    one = {"max_steps": 1, "num_iterations": 1, "max_grad_norm": 1e9, "reward": some_equal}
    plain, plain_way = trained(tmp_path / "plain", ("grpo", {}), epsilon_high=0.28, **one)
    dropped, way = trained(tmp_path / "dapo", ("dapo", {}), **one)
    for column in ("response", "position"):  # the record keeps every token
        assert getattr(dropped.tokens, column).equal(getattr(plain.tokens, column))
    share = (plain.tokens.response >= 8).float().mean().item()
    torch.testing.assert_close(way * share, plain_way, rtol=1e-3, atol=1e-5)
    # What is measured before the method is measured on all that the policy wrote; what is left after it is not.
    for name in ("polarity/entropy", "polarity/positive_flow", "polarity/negative_flow"):
        assert dropped.metrics[name] == pytest.approx(plain.metrics[name], rel=1e-4)
    change = "polarity/predicted_entropy_change"
    assert dropped.metrics[change] * share == pytest.approx(plain.metrics[change], rel=1e-3, abs=1e-7)


def test_a_rollout_whose_groups_are_all_equal_moves_nothing_under_dapo(tmp_path):
    trainer = make_trainer(PolarityTrainer, tmp_path, method=("dapo", {}), max_steps=1, optim="sgd")
    trainer.reward_funcs = [lambda completions, **_: [1.0] * len(completions)]
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), before, strict=True))


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo", "vespo"])
def test_loss_terms_are_averaged_as_trl_averages_its_loss(tmp_path, monkeypatch, loss_type):
    """Were every token's loss the same number, TRL's average and ours would differ by that factor, whatever the
    micro-batch, its lengths and its padding."""
    trainer = make_trainer(
        PolarityTrainer, tmp_path, method=("grpo", {}), loss_type=loss_type, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, steps_per_generation=4, max_steps=2,
        epsilon_high=5.0 if loss_type == "cispo" else None,
    )  # fmt: skip
    factors, compute, generate = [], GRPOTrainer._compute_loss, trainer._generate_and_score_completions

    def same_for_all(self, model, inputs):
        ones = torch.ones_like(inputs["completion_mask"], dtype=torch.float32)
        result = (-ones).requires_grad_(), ones, None  # log p = -1, H = 1
        self._get_per_token_logps_and_entropies = lambda *args, **kwargs: result
        inputs["old_per_token_logps"] = -ones
        loss = compute(self, model, inputs)
        del self._get_per_token_logps_and_entropies
        tokens = Tokens.pack(inputs["completion_mask"].bool(), ones)
        factors.append((loss / averaged(self, tokens.advantages, tokens, inputs)).item())
        return loss

    monkeypatch.setattr(
        trainer, "_generate_and_score_completions", lambda inputs: generate(inputs) | {"advantages": torch.ones(16)}
    )
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", same_for_all)
    monkeypatch.setattr(PolarityTrainer, "_compute_loss", same_for_all)
    trainer.train()
    assert len(factors) == 4
    assert factors == pytest.approx([factors[0]] * 4, rel=1e-5)
    assert abs(factors[0]) == pytest.approx({"sapo": 2.0}.get(loss_type, 1.0), rel=1e-3)


def test_no_extra_pass_where_trl_makes_one_for_old_log_probs(tmp_path):
    """A method that looks at the whole rollout costs a pass only where TRL makes none itself."""
    passes = {}
    for name, method in {"none": ("grpo", {}), "batch": ("opefo", {}), "rewards": ("dapo", {})}.items():
        for iterations in (1, 2):
            trainer = make_trainer(
                PolarityTrainer, tmp_path / f"{name}{iterations}", method=method, max_steps=2, num_iterations=iterations
            )
            count = [0]
            trainer.model.register_forward_pre_hook(
                lambda m, a, kw, count=count: count.__setitem__(0, count[0] + ("labels" in kw)), with_kwargs=True
            )
            trainer.train()
            passes[name, iterations] = count[0]
    assert passes == {
        ("none", 1): 2, ("batch", 1): 4, ("rewards", 1): 2,
        ("none", 2): 3, ("batch", 2): 3, ("rewards", 2): 3,
    }  # fmt: skip


def test_exact_sensitivities_are_made_when_they_are_due_and_leave_no_trace(tmp_path):
    """T* of the policy that sampled, on the scale of T; with λ = 0 the run is the one without, bit for bit."""
    settings = {"max_steps": 6, "num_iterations": 2}
    plain = make_trainer(PolarityTrainer, tmp_path / "a", method=("papo", {"controller": "constant"}), **settings)
    plain.train()
    method = ("papo", {"controller": "constant", "sign_from": "exact", "every": 2})
    trainer = make_trainer(PolarityTrainer, tmp_path / "b", method=method, **settings)
    given, expected = [], []

    def watched(rollout):
        given.append(rollout.tokens.exact_sensitivity)

    policy = trainer.model
    decided = trainer._decided

    def decide(rollout):
        sequences = sequences_of(rollout.inputs, rollout.tokens)
        found = exact_sensitivity(policy, sequences, temperature=trainer.temperature).sensitivity
        expected.append(found[sequences.mask] * sequences.mask.sum())
        return decided(rollout)

    trainer.on_rollout, trainer._decided = watched, decide
    trainer.train()
    assert [e is None for e in given] == [False, True, False]
    torch.testing.assert_close(given[0], expected[0])
    torch.testing.assert_close(given[2], expected[2])
    assert not torch.equal(expected[0], expected[2])
    for (name, a), b in zip(trainer.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_images_are_not_looked_at_in_part():
    with pytest.raises(ValueError, match="looks at text alone, and this batch has images"):
        sequences_of({"pixel_values": None}, Tokens.pack(torch.ones(1, 1, dtype=torch.bool), torch.ones(1)))


def test_kl_cov_on_policy_warns(tmp_path):
    with pytest.warns(UserWarning, match="does nothing with a single update"):
        make_trainer(PolarityTrainer, tmp_path / "on", method=("kl_cov", {}))
    with warnings.catch_warnings(record=True) as given:
        make_trainer(PolarityTrainer, tmp_path / "off", method=("kl_cov", {}), num_iterations=2)
    assert not [warning for warning in given if "single update" in str(warning.message)]


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("dapo", {"epsilon_high": 0.3}, r"epsilon_high=0.3 was given, but method 'dapo' sets it to 0.28"),
        ("dapo", {"loss_type": "grpo"}, r"loss_type='grpo' was given, but method 'dapo'"),
        ("kl_cov", {"epsilon": 0.1}, r"epsilon=0.1 was given"),
        ("clip_cov", {"loss_type": "cispo"}, r"sets the PPO clip, which loss_type='cispo' does not have"),
    ],
)
def test_a_setting_that_the_method_fixes_has_one_owner(tmp_path, method, settings, said):
    with pytest.raises(ValueError, match=said):
        PolarityConfig(str(tmp_path), method=method, bf16=False, use_cpu=True, report_to="none", **settings)


def flat(value, path=""):
    """Numbers, and whatever else is no container, by their place in nested JSON."""
    if not isinstance(value, dict | list):
        return {path: value}
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: leaf for name, part in parts for key, leaf in flat(part, f"{path}/{name}").items()}


@pytest.mark.slow
def test_several_processes_make_the_same_policy_as_one(tmp_path):
    """One launch each, every method: the same completions on two and four gloo ranks and on one process."""
    script = Path(__file__).parents[1] / "several_ranks.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--master-port=29577", "--nproc-per-node"]
    came = {}
    for ranks in ("1", "2", "4"):
        done = subprocess.run(
            [*command, ranks, str(script), str(tmp_path / f"{ranks}.pt")], capture_output=True, encoding="utf-8"
        )
        assert done.returncode == 0, done.stderr[-3000:]
        came[ranks] = torch.load(tmp_path / f"{ranks}.pt", weights_only=True)
    one = came.pop("1")
    assert one.keys() >= EXAMPLES.keys() | STATEFUL.keys()
    for ranks, several in came.items():
        assert several.keys() == one.keys()
        for name, expected in one.items():
            assert expected["way"].norm() > 0, name
            assert (several[name]["way"] - expected["way"]).norm() <= 1e-3 * expected["way"].norm(), (ranks, name)
            for what in ("state", "metrics", "checkpoint"):
                a, b = (flat(json.loads(results[what])) for results in (several[name], expected))
                assert a.keys() == b.keys(), (ranks, name, what)
                for place, number in b.items():
                    near = pytest.approx(number, rel=2e-3, abs=1e-6) if isinstance(number, float) else number
                    assert a[place] == near, (ranks, name, what, place)
