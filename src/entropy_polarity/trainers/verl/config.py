"""The settings of a run in verl's configuration: which method, what it fixes of verl's loss, what cannot go with it."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from entropy_polarity.methods import chain_name, make_transform
from entropy_polarity.trainers.loss import fixed_settings
from entropy_polarity.transforms import Transform

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger("entropy_polarity")

KEY = "papo"
# Losses in which each token's advantage weighs its own gradient, averaged as loss_agg_mode says. Of the others geo_mean
# averages advantages over a sequence, sapo fixes its average, clip_cov and kl_cov choose tokens themselves.
TOKEN_LOSSES = ("vanilla", "dppo_tv", "dppo_kl", "gspo", "gpg", "cispo")
ENGINES = ("fsdp", "fsdp2", "veomni", "megatron")
NO_DUAL_CLIP = 1e30
# verl's own, of what a method may fix.
DEFAULTS = {
    "clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": 3.0, "loss_agg_mode": "token-mean",
    "calculate_entropy": False,
}  # fmt: skip


def method_of(config: "DictConfig") -> tuple[str, dict[str, Any]] | None:
    """The method that a run asks for and its settings, or None. Raises ValueError for what is no method."""
    asked = config.get(KEY)
    if asked is None:
        return None
    if not isinstance(asked, Mapping):
        raise ValueError(f"{KEY}={asked!r}; expected settings: +{KEY}.method=papo, +{KEY}.controller=thermostat, ...")
    from omegaconf import OmegaConf

    settings: dict[str, Any] = OmegaConf.to_container(asked, resolve=True)  # type: ignore[assignment]
    return chain_name(settings.pop("method", "papo")), settings


def prepare(config: "DictConfig") -> tuple[str, dict[str, Any], Transform] | None:
    """Check a run's configuration, put in what its method fixes of the loss, and build the method; None if not asked.

    Raises ValueError, with one line, before anything of the run was started.
    """
    asked = method_of(config)
    if asked is None:
        return None
    name, settings = asked
    transform = make_transform(name, settings)
    _refuse_what_cannot_work(config, name, transform)
    actor = config.actor_rollout_ref.actor
    _fix_loss(actor, name, transform)
    epochs = actor.get("ppo_epochs") or 1
    if transform.several_updates and epochs * config.data.train_batch_size <= actor.ppo_mini_batch_size:
        logger.warning(
            "entropy-polarity: method %r does nothing with a single update on each rollout, where the importance ratio "
            "is 1: use a smaller actor.ppo_mini_batch_size or more actor.ppo_epochs",
            name,
        )
    return name, settings, transform


def _refuse_what_cannot_work(config: "DictConfig", method: str, transform: Transform) -> None:
    """Raise ValueError for settings of verl's that a method would not survive, or that it would silently undo."""
    actor, algorithm = config.actor_rollout_ref.actor, config.algorithm
    loss = (actor.get("policy_loss") or {}).get("loss_mode", "vanilla")
    bypass = (algorithm.get("rollout_correction") or {}).get("bypass_mode", False)
    distilled = (config.get("distillation") or {}).get("enabled", False)
    refused = (
        (
            bypass,
            "algorithm.rollout_correction.bypass_mode=true leaves out the pass for old log-probs, in which the "
            "statistics of the policy are made: set it to false",
        ),
        (
            config.actor_rollout_ref.model.get("use_fused_kernels", False),
            "verl's fused kernels return no logits to make statistics from: set "
            "actor_rollout_ref.model.use_fused_kernels=false",
        ),
        (
            actor.strategy not in ENGINES,
            f"no statistics in the engine {actor.strategy!r}; expected one of {', '.join(ENGINES)}",
        ),
        (
            loss not in TOKEN_LOSSES,
            f"actor.policy_loss.loss_mode={loss!r} does not weigh each token by its own advantage, or averages in a "
            f"way of its own; expected one of {', '.join(TOKEN_LOSSES)}",
        ),
        (
            loss != "vanilla" and transform.loss.clip_low is not None,
            f"method {method!r} sets the PPO clip, which loss_mode={loss!r} does not have: use 'vanilla'",
        ),
        (distilled, "distillation has a loss of its own: set distillation.enabled=false"),
        (
            algorithm.get("use_kl_in_reward", False) and "reward" in transform.needs,
            f"method {method!r} makes advantages from the rewards, without the KL penalty in them: set "
            "algorithm.use_kl_in_reward=false (and actor.use_kl_loss=true for a penalty)",
        ),
        (
            algorithm.get("use_pf_ppo", False),
            "algorithm.use_pf_ppo=true draws other responses than the statistics are of: set it to false",
        ),
        (transform.exact_every > 0, "sign_from='exact' needs whole parameters in one process: not in verl"),
    )
    for holds, reason in refused:
        if holds:
            raise ValueError(f"{KEY}: {reason}")


def _fix_loss(actor: "DictConfig", method: str, transform: Transform) -> None:
    from omegaconf import open_dict

    fixed = transform.loss
    wanted: dict[str, Any] = {
        "clip_ratio_low": fixed.clip_low,
        "clip_ratio_high": fixed.clip_high,
        # Where the usual clip goes, verl's second one, of negative advantages, has to go as well.
        "clip_ratio_c": NO_DUAL_CLIP if fixed.clip_low is not None and fixed.clip_low >= 1 else None,
        "loss_agg_mode": "token-mean" if fixed.average == "token" else None,
        "calculate_entropy": True if transform.entropy_gradient else None,
    }
    with open_dict(actor):
        actor.update(fixed_settings(method, wanted, actor, DEFAULTS))
