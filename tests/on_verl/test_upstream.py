"""verl beside us: its own tests pass with the plug-in loaded, and what its micro-batches do to two methods."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("verl", reason="verl needs an environment of its own: make verl-test")

import verl
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import ActorConfig, PolicyLossConfig

from entropy_polarity.methods import make_transform
from entropy_polarity.tokens import Tokens

THEIRS = Path(verl.__file__).parents[1] / "tests"
FILES = (
    "trainer/ppo/test_core_algos_on_cpu.py",
    "trainer/ppo/test_loss_aggregation_on_cpu.py",
    "trainer/ppo/test_metric_utils_on_cpu.py",
    "trainer/ppo/test_dynamic_policy_losses_on_cpu.py",
    "trainer/ppo/test_value_loss_normalization_on_cpu.py",
    "trainer/test_multi_trajectories_advantage_on_cpu.py",
    "trainer/test_constants_ppo_on_cpu.py",
    "test_protocol_on_cpu.py",
    "test_protocol_v2_on_cpu.py",
)


def test_verls_own_tests_pass_with_the_plug_in():
    if not THEIRS.is_dir():
        pytest.skip("this verl was installed without its tests")
    code = f"""
import sys, verl, pytest
assert "entropy_polarity.trainers.verl" in sys.modules
sys.exit(pytest.main(["-q", "-c", "/dev/null", "-p", "no:cacheprovider", *{FILES}]))
"""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=THEIRS, capture_output=True, encoding="utf-8", timeout=600, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]
    assert int(run.stdout.split(" passed")[0].split()[-1]) >= 100


def rollout() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(8, 20, generator=generator)
    new = old + 0.3 * torch.randn(8, 20, generator=generator)
    advantages = torch.randn(8, 1, generator=generator).expand(8, 20).contiguous()
    return {"old_log_prob": old, "log_prob": new, "advantages": advantages, "response_mask": torch.ones(8, 20).bool()}


def verls_gradient(loss_mode: str, micro_batch: int) -> torch.Tensor:
    """The gradient along log p of verl's own loss, unclipped, over a rollout that is trained in pieces."""
    chosen = PolicyLossConfig(
        loss_mode=loss_mode, clip_cov_ratio=2e-4, clip_cov_lb=0.0, clip_cov_ub=100.0, kl_cov_ratio=2e-4
    )
    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=chosen, clip_ratio_low=100.0,
        clip_ratio_high=100.0,
    )  # fmt: skip
    config.global_batch_info.update(dp_size=1, batch_num_tokens=160, global_batch_size=8, loss_scale_factor=None)
    rows = rollout()
    rows["log_prob"].requires_grad_()
    torch.manual_seed(0)
    for start in range(0, 8, micro_batch):
        part = {name: column[start : start + micro_batch] for name, column in rows.items()}
        loss, _ = get_policy_loss_fn(loss_mode)(**part, loss_agg_mode="token-mean", config=config)
        loss.backward()
    assert rows["log_prob"].grad is not None
    return rows["log_prob"].grad


@pytest.mark.parametrize("loss_mode", ["clip_cov", "kl_cov"])
def test_verls_own_covariance_losses_depend_on_the_micro_batch(loss_mode):
    """verl#7829: they choose from each micro-batch, one token of 160 or four. Ours choose from the rollout, next."""
    plain = verls_gradient("vanilla", 8)
    torch.testing.assert_close(plain, verls_gradient("vanilla", 2))
    chosen = {size: int(((verls_gradient(loss_mode, size) - plain).abs() > 1e-6).sum()) for size in (8, 2)}
    assert chosen == {8: 1, 2: 4}


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_ours_choose_once_from_the_whole_rollout(name):
    """The driver has all rows at once; whatever verl makes of micro-batches afterwards, the choice is made."""
    rows = rollout()
    logp = rows["log_prob"]
    tokens = Tokens.pack(rows["response_mask"], rows["advantages"], logp=logp, old_logp=logp, sample_id=torch.arange(8))
    transform = make_transform(name, {"fraction": 0.1})
    whole, _, _ = transform.update(tokens, transform.init())
    shuffled = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    again, _, _ = transform.update(tokens.of_responses(shuffled), transform.init())
    expected = whole.of_responses(shuffled)
    for one, other in ((expected.advantages, again.advantages), (expected.ratio_penalty, again.ratio_penalty)):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert torch.equal(one, other)
    chosen = whole.ratio_penalty if name == "kl_cov" else whole.advantages != tokens.advantages
    assert chosen is not None
    assert (chosen != 0).any()
