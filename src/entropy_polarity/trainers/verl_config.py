"""The settings of a run in verl's configuration: which method, what it fixes of verl's loss, what cannot go with it."""

from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from entropy_polarity.methods import make_transform
from entropy_polarity.trainers.fixing import to_set
from entropy_polarity.transforms import Loss, Transform

KEY = "papo"
# Losses in which each token's advantage weighs its own gradient; the others average over sequences, or fix the weights.
TOKEN_LOSSES = ("vanilla", "dppo_tv", "dppo_kl", "sapo", "gpg", "cispo")
ENGINES = ("fsdp", "fsdp2", "veomni", "megatron")
NO_DUAL_CLIP = 1e30
# verl's own, of what a method may fix.
DEFAULTS = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": 3.0, "loss_agg_mode": "token-mean"}


def method_of(config: DictConfig) -> tuple[str, dict[str, Any]] | None:
    """The method that a run asks for and its settings, or None. Raises ValueError for what is no method."""
    asked = config.get(KEY)
    if asked is None:
        return None
    if not isinstance(asked, DictConfig):
        raise ValueError(f"{KEY}={asked!r}; expected settings: +{KEY}.method=papo, +{KEY}.controller=thermostat, ...")
    settings: dict[str, Any] = OmegaConf.to_container(asked, resolve=True)  # type: ignore[assignment]
    return settings.pop("method", "papo"), settings


def prepare(config: DictConfig) -> tuple[str, dict[str, Any], Transform] | None:
    """Check a run's configuration, put in what its method fixes of the loss, and build the method; None if not asked.

    Raises ValueError, with one line, before anything of the run was started.
    """
    asked = method_of(config)
    if asked is None:
        return None
    name, settings = asked
    transform = make_transform(name, settings)
    actor = config.actor_rollout_ref.actor
    correction = config.algorithm.get("rollout_correction")
    if correction is not None and correction.get("bypass_mode", False):
        raise ValueError(
            f"{KEY}: algorithm.rollout_correction.bypass_mode=true leaves out the pass for old log-probs, in which the "
            "statistics of the policy are made: set it to false"
        )
    if config.actor_rollout_ref.model.get("use_fused_kernels", False):
        raise ValueError(
            f"{KEY}: verl's fused kernels return no logits to make statistics from: set "
            "actor_rollout_ref.model.use_fused_kernels=false"
        )
    if actor.strategy not in ENGINES:
        raise ValueError(f"{KEY}: no statistics in the engine {actor.strategy!r}; expected one of {', '.join(ENGINES)}")
    loss = actor.get("policy_loss", {}).get("loss_mode", "vanilla")
    if loss not in TOKEN_LOSSES:
        raise ValueError(
            f"{KEY}: actor.policy_loss.loss_mode={loss!r} does not weigh each token by its own advantage; expected one "
            f"of {', '.join(TOKEN_LOSSES)}"
        )
    if transform.exact_every:
        raise ValueError(f"{KEY}: sign_from='exact' needs whole parameters in one process: not in verl")
    _fix_loss(actor, name, transform.loss, loss)
    if "entropy_grad" in transform.needs:
        with open_dict(actor):
            actor.calculate_entropy = True
    return name, settings, transform


def _fix_loss(actor: DictConfig, method: str, fixed: Loss, loss_mode: str) -> None:
    wanted: dict[str, Any] = {
        "clip_ratio_low": fixed.clip_low,
        "clip_ratio_high": fixed.clip_high,
        # Without a clip verl's second one, of negative advantages, has to go as well.
        "clip_ratio_c": NO_DUAL_CLIP if fixed.clip_low is not None and fixed.clip_low >= 1 else None,
        "loss_agg_mode": "token-mean" if fixed.average == "token" else None,
    }
    if fixed.clip_low is not None and loss_mode != "vanilla":
        raise ValueError(
            f"{KEY}: method {method!r} sets the PPO clip, which loss_mode={loss_mode!r} does not have: use 'vanilla'"
        )
    with open_dict(actor):
        actor.update(to_set(method, wanted, actor, DEFAULTS))
