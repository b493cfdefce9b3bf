"""The driver's part in verl: the advantages of the whole global batch go through a method in one process.

verl's driver reads what advantages are made of from TransferQueue, makes them for the padded batch and writes them
back. In between the method has its turn, with the two columns of statistics that the workers sent: one controller, no
collective, the same for every engine and any number of nodes. What an environment said and verl's padding have mask 0.
"""

import functools
import inspect
import logging
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_polarity.runs.method_state import load_state, save_state
from entropy_polarity.support.machine import idle_cores, kept_memory
from entropy_polarity.trainers.verl.config import KEY, method_of, prepare
from entropy_polarity.trainers.verl.packing import nested, tokens_of
from entropy_polarity.trainers.verl.workers import ASKED, BONUS, DECIDED, ENTROPY, PENALTY, SENSITIVITY
from entropy_polarity.transforms import Transform

logger = logging.getLogger("entropy_polarity")

# While a trainer makes advantages: what is to be done with them before they are written.
_REWRITE: ContextVar[Callable[[Any], None] | None] = ContextVar("rewrite", default=None)


def trainer_init(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def __init__(self, config, *arguments, **named):  # noqa: N807
        prepared = prepare(config)  # before anything is started
        self._polarity = None
        if prepared is not None:
            from entropy_polarity.trainers.verl import missing_hook

            missing = missing_hook(config.actor_rollout_ref.actor.strategy)
            if missing is not None:
                raise RuntimeError(f"{KEY}: {missing}")
            self._polarity = method = Reweighting(*prepared)
            logger.warning("entropy-polarity is on: method %s, settings %s", method.method, method.settings)
        original(self, config, *arguments, **named)

    return __init__


def refused(original: Callable[..., Any]) -> Callable[..., Any]:
    """For what a trainer that has no place for a method does first: its constructor or, where that calls no other, the
    start of its workers."""
    parameters = inspect.signature(original)

    @functools.wraps(original)
    def first(self, *arguments, **named):
        given = parameters.bind_partial(self, *arguments, **named).arguments
        config = given["config"] if "config" in given else self.config  # noqa: SIM401 (a constructor has none yet)
        if method_of(config) is not None:
            from entropy_polarity.trainers.verl import untested_version

            reason = untested_version()
            reason = reason or "this trainer of verl's has no place for it: use its own, trainer.use_v1=true"
            raise ValueError(f"{KEY}: {reason}")
        return original(self, *arguments, **named)

    return first


def old_log_prob(original: Callable[..., Any]) -> Callable[..., Any]:
    """The pass for old log-probs, with statistics; passes of a reference model after it have none."""

    @functools.wraps(original)
    def _compute_old_log_prob(self, batch, metrics):
        if _at_work(self) is None:
            return original(self, batch, metrics)
        batch.extra_info[ASKED] = True
        after = original(self, batch, metrics)
        for meta in (batch, after):
            (meta.extra_info or {}).pop(ASKED, None)
        return after

    return _compute_old_log_prob


def advantage(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _compute_advantage(self, batch, metrics):
        method = _at_work(self)
        if method is None:
            return original(self, batch, metrics)
        columns: list[dict[str, Tensor]] = []
        token = _REWRITE.set(lambda made: columns.append(method.rewrite(made, batch, metrics)))
        try:
            with kept_memory():
                after = original(self, batch, metrics)
        finally:
            _REWRITE.reset(token)
        if len(columns) != 1:
            raise RuntimeError(f"{KEY}: verl did not make its advantages where the version does that was tested")
        return _put(after, columns[0])

    return _compute_advantage


def advantages_made(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def compute_advantage_for_multi_trajectories(*arguments, **named):
        made = original(*arguments, **named)
        rewrite = _REWRITE.get()
        if rewrite is not None:
            rewrite(made)
        return made

    return compute_advantage_for_multi_trajectories


def update_actor(original: Callable[..., Any]) -> Callable[..., Any]:
    """Where a method dropped responses: a critic, updated before, has learnt from all of them."""

    @functools.wraps(original)
    def _update_actor(self, batch, metrics):
        method = _at_work(self)
        if method is not None:
            batch = method.restrict(batch)
        return original(self, batch, metrics)

    return _update_actor


def save_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """The method's state goes first: verl marks the checkpoint as its latest when it has written everything else."""

    @functools.wraps(original)
    def _save_checkpoint(self):
        method = _method_of(self)
        if method is not None:
            method.save(Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}")
        return original(self)

    return _save_checkpoint


def load_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _load_checkpoint(self):
        result = original(self)
        method, trainer = _method_of(self), self.config.trainer
        if method is not None and self.global_steps > 0:
            here = Path(trainer.default_local_dir) / f"global_step_{self.global_steps}"
            method.load(Path(trainer.resume_from_path) if trainer.resume_mode == "resume_path" else here)
        return result

    return _load_checkpoint


def _method_of(trainer: Any) -> "Reweighting | None":
    return getattr(trainer, "_polarity", None)


def _at_work(trainer: Any) -> "Reweighting | None":
    """The method, unless only the critic is trained as yet: a policy that stands still needs no steering."""
    return None if trainer.global_steps < trainer.config.trainer.critic_warmup else _method_of(trainer)


class Reweighting:
    """A method on the batches of verl's driver, with its state."""

    def __init__(self, method: str, settings: dict[str, Any], transform: Transform) -> None:
        self.method, self.settings, self.transform = method, settings, transform
        self.state = transform.init()
        self._masks: dict[str, Tensor] = {}  # of the last batch, until the actor is updated on it

    def rewrite(self, made: Any, batch: Any, metrics: dict[str, Any]) -> dict[str, Tensor]:
        """Rewrite the advantages that verl `made`, its padded batch, whose keys and tags `batch` has. Returns the
        columns that have to be put into TransferQueue beside verl's own."""
        import transfer_queue as tq

        names = [ENTROPY, SENSITIVITY]
        sent = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
        with idle_cores():
            columns, measured = self.rewritten(made.batch, sent, batch.keys, batch.tags)
        metrics.update(measured)
        self._masks = {name: columns.pop(name) for name in ("response_mask", "loss_mask") if name in columns}
        return columns

    def restrict(self, batch: Any) -> Any:
        """Put the masks of the last batch there, where the method dropped responses of it."""
        masks, self._masks = self._masks, {}
        return _put(batch, masks)

    def rewritten(
        self, batch: Any, sent: Any, keys: list[str], tags: list[dict[str, Any]]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """(columns that are new or changed, nested; metrics) for a padded batch, whose advantages are replaced, and the
        statistics that the workers sent. The state moves on."""
        if SENSITIVITY not in sent:
            raise RuntimeError(
                f"{KEY}: the workers sent no {SENSITIVITY}: entropy-polarity is not installed where they run, or could "
                "not hook their engine (its log says why; so does `papo doctor` there)"
            )
        lengths = [tag.get("response_len", -1) for tag in tags]
        before = tokens_of(batch, sent, keys, lengths)
        after, self.state, metrics = self.transform.update(before, self.state)
        # verl has the same tensor as its returns: it must not be written into.
        batch["advantages"] = after.advantages
        columns: dict[str, Tensor] = {}
        if not torch.equal(before.mask, after.mask):
            columns["response_mask"] = nested(after.mask.to(batch["response_mask"].dtype), lengths)
            columns["loss_mask"] = columns["response_mask"].clone()  # what verl counts a mini-batch's tokens by
        terms = {BONUS: after.entropy_bonus, PENALTY: after.ratio_penalty}
        columns |= {name: nested(term, lengths) for name, term in terms.items() if term is not None}
        return columns, metrics

    def save(self, folder: Path) -> None:
        save_state(folder, self.method, self.settings, self.state)

    def load(self, folder: Path) -> None:
        self.state = load_state(folder, self.method, self.settings, self.transform.init())


def _put(batch: Any, columns: dict[str, Tensor]) -> Any:
    """Put columns into TransferQueue. The keys and tags that come back leave the statistics out of what follows: the
    engines would be sent them with every batch."""
    if columns:
        import transfer_queue as tq
        from tensordict import TensorDict

        fields = TensorDict(columns, batch_size=len(batch))
        batch = tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)
    if batch.fields is not None:
        batch.fields = [name for name in batch.fields if name not in (ENTROPY, SENSITIVITY)]
    batch.extra_info = {**(batch.extra_info or {}), DECIDED: True}
    return batch
