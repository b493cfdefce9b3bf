"""How the package comes into verl: by itself, once, not at all into another verl, and off until asked for."""

import logging
import os
import subprocess
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("verl", reason="verl needs an environment of its own: make verl-test")

from omegaconf import OmegaConf
from on_verl.batches import config
from verl.workers.config import ActorConfig

from entropy_polarity.methods import METHODS
from entropy_polarity.trainers.verl import hooks, plugin
from entropy_polarity.trainers.verl.config import DEFAULTS, TOKEN_LOSSES, prepare

RECIPES = Path(__file__).parents[2] / "examples/cluster"
LOOK = """
import sys, importlib
{first}
import verl
print("entropy_polarity.trainers.verl" in sys.modules)
for hook in __import__("entropy_polarity.trainers.verl", fromlist=["HOOKS"]).HOOKS:
    try:
        place = importlib.import_module(hook.module)
    except ImportError:
        print(hook.target, "not installed")
        continue
    for part in hook.target.split("."):
        place = getattr(place, part)
    times = 0
    while place is not None:
        times += getattr(place, "of_entropy_polarity", False)
        place = getattr(place, "__wrapped__", None)
    print(hook.target, times)
"""


def looked(first: str = "", **environment: str) -> list[str]:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOOK.format(first=first)],
        capture_output=True, encoding="utf-8", env=os.environ | environment, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.mark.parametrize(
    ("first", "environment"),
    [
        ("", {}),
        ("", {"VERL_USE_EXTERNAL_PLUGINS": "none", "VERL_USE_EXTERNAL_MODULES": "entropy_polarity.trainers.verl"}),
        ("import entropy_polarity.trainers.verl", {}),
        ("import verl.workers.engine_workers, verl.trainer.ppo.v1\nimport entropy_polarity.trainers.verl", {}),
    ],
    ids=["entry point", "external module", "before verl", "after verl"],
)
def test_every_hook_is_in_place_once(first, environment):
    loaded, *lines = looked(first, **environment)
    assert loaded == "True"
    assert len(lines) == len(hooks.HOOKS)
    for line in lines:
        assert line.endswith((" 1", "not installed")), line
    assert sum(line.endswith("not installed") for line in lines) <= sum(hook.optional for hook in hooks.HOOKS)


def test_without_plugins_verl_is_verls_own():
    code = (
        "import verl.trainer.ppo.v1.trainer_base as t; print(hasattr(t.PPOTrainer._compute_advantage, '__wrapped__'))"
    )
    environment = os.environ | {"VERL_USE_EXTERNAL_PLUGINS": "none"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        encoding="utf-8",
        env=environment,
        timeout=300,
    )
    assert run.stdout.strip() == "False", run.stderr


def test_settings_and_packing_need_no_verl():
    code = """
import sys
sys.modules.update(dict.fromkeys(["verl", "omegaconf", "tensordict", "transfer_queue"]))
import entropy_polarity.trainers.verl.config, entropy_polarity.trainers.verl.packing
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=300)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("version", ["0.10.2", "0.10.0.dev0", "0.8.5"])
def test_another_version_is_left_alone_says_so_and_refuses_the_settings(version, monkeypatch, caplog):
    put = []
    import_module("verl.trainer.ppo.v1.trainer_base")  # what is not imported yet is hooked later
    monkeypatch.setattr(hooks, "version", lambda _: version)
    monkeypatch.setattr(plugin, "put", lambda *hook: put.append(hook))
    with caplog.at_level(logging.ERROR):
        plugin.activate()
    assert f"verl 0.9, but verl {version} is installed" in caplog.text
    assert {hook.replacement for hook, _ in put} - {hooks.refuse_workers} == {hooks.refuse_run}
    trainers = [
        lambda asked: hooks.refuse_run(lambda self, config: None, None, asked),
        lambda asked: hooks.refuse_workers(lambda self: None, SimpleNamespace(config=asked)),
    ]
    for start in trainers:
        start(config())
        with pytest.raises(ValueError, match=f"papo: .* verl {version} is installed"):
            start(config(method="papo"))


def test_the_version_of_a_checkout_is_that_of_its_module(monkeypatch):
    def missing(_):
        raise PackageNotFoundError

    monkeypatch.setattr(hooks, "version", missing)
    monkeypatch.setitem(sys.modules, "verl", SimpleNamespace(__version__="0.9.3.dev"))
    assert hooks.untested_version() is None
    monkeypatch.setitem(sys.modules, "verl", SimpleNamespace(__version__="0.8.3.dev"))
    assert "verl 0.8.3.dev is installed" in str(hooks.untested_version())


def test_a_run_is_refused_where_a_hook_is_missing(monkeypatch):
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    assert hooks.why_not_hooked("fsdp") is None
    monkeypatch.setattr(PPOTrainer, "_compute_advantage", PPOTrainer._compute_advantage.__wrapped__)
    with pytest.raises(RuntimeError, match=r"papo: .*PPOTrainer\._compute_advantage is not hooked"):
        PPOTrainerSync(config(method="papo"))
    monkeypatch.setattr(PPOTrainer, "_compute_advantage", lambda self, data: data)
    with pytest.raises(RuntimeError, match=r"papo: .*PPOTrainer\._compute_advantage has no parameter batch, metrics"):
        PPOTrainerSync(config(method="papo"))


def test_what_does_not_look_as_tested_is_left_alone_and_said_so(caplog):
    module = ModuleType("changed")

    class PPOTrainer:
        def _compute_advantage(self, data):
            return data

    module.PPOTrainer = PPOTrainer  # type: ignore[attr-defined]
    hook = hooks.HOOKS[2]._replace(module="changed")
    with caplog.at_level(logging.ERROR):
        hooks.put(hook, module)
        hooks.put(hook._replace(target="PPOTrainer.gone"), module)
    assert not hasattr(PPOTrainer._compute_advantage, "of_entropy_polarity")
    assert "changed.PPOTrainer._compute_advantage has no parameter batch, metrics" in caplog.text
    assert "verl has no changed.PPOTrainer.gone" in caplog.text


def test_nothing_is_prepared_unless_asked_for():
    untouched = config()
    assert prepare(untouched) is None
    assert untouched == config()


def test_a_run_asks_by_keys_of_its_command_line():
    """As Hydra composes verl's own configuration."""
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        composed = compose("ppo_trainer", overrides=["+papo.method=papo", "+papo.lambda_max=0.5", "+papo.gain=3"])
        plain = compose("ppo_trainer")
    prepared = prepare(composed)
    assert prepared is not None
    assert prepared[:2] == ("papo", {"lambda_max": 0.5, "gain": 3})
    assert OmegaConf.to_container(composed.actor_rollout_ref) == OmegaConf.to_container(plain.actor_rollout_ref)


def test_what_a_method_fixes_of_the_loss_goes_into_the_actor():
    asked = config(method="dapo")
    prepare(asked)
    actor = asked.actor_rollout_ref.actor
    assert (actor.clip_ratio_low, actor.clip_ratio_high, actor.clip_ratio_c) == (0.2, 0.28, 3.0)
    assert actor.loss_agg_mode == "token-mean"
    for name, default in DEFAULTS.items():
        assert getattr(ActorConfig, "__dataclass_fields__")[name].default == default  # noqa: B009
    unclipped = config(method="clip_cov")
    prepare(unclipped)
    assert unclipped.actor_rollout_ref.actor.clip_ratio_c > 1e9
    bonus = config(method="entropy_bonus", coefficient=0.01)
    prepare(bonus)
    assert bonus.actor_rollout_ref.actor.calculate_entropy


@pytest.mark.parametrize("asked", ["dapo+papo", "[dapo,papo]"])
def test_a_run_may_ask_for_a_chain(asked):
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        composed = compose("ppo_trainer", overrides=[f"+papo.method={asked}", "+papo.level=0.3"])
    prepared = prepare(composed)
    assert prepared is not None
    assert prepared[:2] == ("dapo+papo", {"level": 0.3})
    assert composed.actor_rollout_ref.actor.clip_ratio_high == 0.28


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"papo": "papo"}, "expected settings: +papo.method=papo"),
        ({"papo": {"method": "pappo"}}, "unknown method"),
        ({"papo": {"method": "papo", "lamda_max": 0.5}}, "lamda_max"),
        ({"papo": {"method": "entropy_bonus"}}, "coefficient"),
        ({"papo": {"sign_from": "exact"}}, "sign_from='exact'"),
        ({"algorithm": {"rollout_correction": {"bypass_mode": True}}}, "bypass_mode=true leaves out the pass"),
        ({"actor_rollout_ref": {"model": {"use_fused_kernels": True}}}, "use_fused_kernels=false"),
        ({"actor_rollout_ref": {"actor": {"strategy": "torchtitan"}}}, "no statistics in the engine 'torchtitan'"),
        ({"actor_rollout_ref": {"actor": {"policy_loss": {"loss_mode": "geo_mean"}}}}, "loss_mode='geo_mean'"),
        ({"actor_rollout_ref": {"actor": {"policy_loss": {"loss_mode": "sapo"}}}}, "loss_mode='sapo'"),
        ({"algorithm": {"use_pf_ppo": True}}, "use_pf_ppo=true draws other responses"),
        ({"distillation": {"enabled": True}}, "distillation has a loss of its own"),
        ({"papo": {"method": "qae"}, "algorithm": {"use_kl_in_reward": True}}, "without the KL penalty in them"),
        (
            {"papo": {"method": "dapo"}, "actor_rollout_ref": {"actor": {"loss_agg_mode": "seq-mean-token-mean"}}},
            "loss_agg_mode='seq-mean-token-mean' was given, but method 'dapo' sets it to 'token-mean'",
        ),
        (
            {"papo": {"method": "dapo"}, "actor_rollout_ref": {"actor": {"policy_loss": {"loss_mode": "gpg"}}}},
            "sets the PPO clip",
        ),
    ],
)
def test_what_cannot_work_is_one_line_before_anything_starts(change, said):
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    asked = OmegaConf.merge(config(method="papo") if "papo" not in change else config(), change)
    with pytest.raises(ValueError, match=r"[\s\S]*") as raised:
        PPOTrainerSync(asked)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_verls_other_trainers_do_not_ignore_the_settings():
    from verl.experimental.fully_async_policy.fully_async_trainer import FullyAsyncTrainer
    from verl.experimental.one_step_off_policy.ray_trainer import OneStepOffRayTrainer
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer

    with pytest.raises(ValueError, match=r"trainer\.use_v1=true"):
        RayPPOTrainer(config(method="papo"))
    for trainer in (FullyAsyncTrainer, OneStepOffRayTrainer):
        started = object.__new__(getattr(trainer, "__ray_actor_class__", trainer))
        started.config = config(method="papo")
        with pytest.raises(ValueError, match=r"trainer\.use_v1=true"):
            started._init_resource_pools()


def test_a_method_that_needs_several_updates_says_so_where_there_is_one(caplog):
    asked = config(method="kl_cov")
    prepare(asked)
    assert "single update" not in caplog.text
    asked.actor_rollout_ref.actor.ppo_mini_batch_size = asked.data.train_batch_size
    prepare(asked)
    assert "'kl_cov' does nothing with a single update" in caplog.text


@pytest.mark.parametrize("loss", TOKEN_LOSSES)
def test_each_tokens_advantage_weighs_its_own_gradient(loss):
    """Of the losses that are let through, at the policy that wrote the tokens: d loss / d log p = -A / N."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import ActorConfig

    generator = torch.Generator().manual_seed(0)
    log_prob = -torch.rand(3, 5, generator=generator) - 0.1
    advantages, mask = torch.randn(3, 5, generator=generator), torch.rand(3, 5, generator=generator) < 0.8
    actor = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    actor.global_batch_info.update(dp_size=1, batch_num_tokens=int(mask.sum()), global_batch_size=3)
    moving = log_prob.clone().requires_grad_()
    value, _ = get_policy_loss_fn(loss)(
        old_log_prob=log_prob, log_prob=moving, advantages=advantages, response_mask=mask.float(),
        loss_agg_mode="token-mean", config=actor,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(value, moving)
    torch.testing.assert_close(gradient, -advantages * mask / mask.sum())


@pytest.mark.parametrize("recipe", ["dapo_math", "dapo_math_megatron", "agent"])
def test_the_recipes_are_configurations_of_verl_that_can_be_prepared(recipe):
    from hydra import compose, initialize_config_dir
    from verl.utils.config import omega_conf_to_dataclass

    here = ["data.train_files=x.parquet", "data.val_files=y.parquet", "actor_rollout_ref.model.path=Qwen/Qwen3-8B"]
    if recipe == "agent":
        here.append(f"actor_rollout_ref.rollout.multi_turn.function_tool_path={RECIPES / 'tools.py'}")
    with initialize_config_dir(str(RECIPES), version_base=None):
        composed = compose(recipe, overrides=here)
    prepared = prepare(composed)
    assert prepared is not None
    assert prepared[0] == "papo"
    actor = omega_conf_to_dataclass(composed.actor_rollout_ref.actor)
    assert actor.strategy == ("megatron" if "megatron" in recipe else "fsdp")
    assert actor.clip_ratio_high == 0.28
    assert composed.trainer.nnodes == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_takes_every_method_as_its_head_says(method):
    from hydra import compose, initialize_config_dir

    # Of two methods the recipe's clip is not theirs.
    clip = ["actor_rollout_ref.actor.clip_ratio_high=0.2"] if method in ("clip_cov", "kl_cov") else []
    plain = ["~papo.controller", "~papo.path", "~papo.level"]
    with initialize_config_dir(str(RECIPES), version_base=None):
        composed = compose("dapo_math", overrides=[f"papo.method={method}", *plain, *clip])
    OmegaConf.update(composed, "papo", {"method": method, **METHODS[method].example}, merge=False, force_add=True)
    assert prepare(composed) is not None


def test_the_agents_tool_is_one_of_verls():
    from verl.tools.function_tool import load_function_tools_from_path

    (tool,) = load_function_tools_from_path(str(RECIPES / "tools.py"))
    assert tool.name == "calculator"
    assert tool.fn("2 * (3 + 4)") == "14"


def test_the_doctor_sees_every_hook():
    from entropy_polarity.cli.health import _verl

    found = {finding.part: finding.status for finding in _verl(["verl"])}
    assert found.pop("verl's plug-in") == "ok"
    assert found.pop("how verl loads it") == "ok"
    assert found.keys() == {hook.target for hook in hooks.HOOKS}
    optional = {hook.target for hook in hooks.HOOKS if hook.optional}
    assert {target for target, status in found.items() if status != "ok"} <= optional
