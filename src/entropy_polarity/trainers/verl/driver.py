"""The driver's part in verl: the advantages of the whole global batch go through a method in one process.

verl's driver reads what advantages are made of from TransferQueue, makes them for the padded batch and writes them
back. In between the method has its turn, with the two columns of statistics that the workers sent: one controller, no
collective, the same for every engine and any number of nodes. The hooks are in the order of a step.
"""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_polarity.controllers import Metrics, State
from entropy_polarity.runs.method_state import load_state, save_state
from entropy_polarity.support.machine import idle_cores, kept_memory
from entropy_polarity.trainers.loss import TERMS
from entropy_polarity.trainers.verl.config import KEY
from entropy_polarity.trainers.verl.packing import Packing
from entropy_polarity.trainers.verl.workers import ASKED, DECIDED, ENTROPY, SENSITIVITY
from entropy_polarity.transforms import Monitor, Transform

# While a trainer makes advantages: what is to be done with them before they are written.
_REWRITE: ContextVar[Callable[[Any], None] | None] = ContextVar("rewrite", default=None)


def ask_for_statistics(original, self, batch, metrics):
    """The pass for old log-probs, with statistics; passes of a reference model after it have none."""
    if _active(self) is None:
        return original(self, batch, metrics)
    batch.extra_info[ASKED] = True
    after = original(self, batch, metrics)
    for meta in (batch, after):
        (meta.extra_info or {}).pop(ASKED, None)
    return after


def apply_method(original, self, batch, metrics):
    """The step for advantages, during which `rewrite_advantages` lets the method rewrite them."""
    method = _active(self)
    if method is None:
        return original(self, batch, metrics)
    columns: list[dict[str, Tensor]] = []
    token = _REWRITE.set(lambda data: columns.append(method.rewrite(data, batch, metrics)))
    try:
        after = original(self, batch, metrics)
    finally:
        _REWRITE.reset(token)
    if len(columns) != 1:
        raise RuntimeError(f"{KEY}: verl did not make its advantages where the version does that was tested")
    return _put(after, columns[0])


def rewrite_advantages(original, data, batch_keys, *arguments, **named):
    """verl's own advantages, rewritten between their making and their writing."""
    data = original(data, batch_keys, *arguments, **named)
    rewrite = _REWRITE.get()
    if rewrite is not None:
        rewrite(data)
    return data


def restrict_masks(original, self, batch, metrics):
    """The actor's update, on what the method left; a critic, updated before, has learnt from every response."""
    method = _active(self)
    if method is not None:
        masks, method.masks = method.masks, {}
        batch = _put(batch, masks)
    return original(self, batch, metrics)


def save_method(original, self):
    """The method's state goes first: verl marks the checkpoint as its latest when it has written everything else."""
    method = _method_of(self)
    if method is not None:
        method.save(_checkpoint_of(self))
    return original(self)


def load_method(original, self):
    result = original(self)
    method, trainer = _method_of(self), self.config.trainer
    if method is not None and self.global_steps > 0:
        by_path = trainer.resume_mode == "resume_path"
        method.load(Path(trainer.resume_from_path) if by_path else _checkpoint_of(self))
    return result


def _checkpoint_of(trainer: Any) -> Path:
    return Path(trainer.config.trainer.default_local_dir) / f"global_step_{trainer.global_steps}"


def _method_of(trainer: Any) -> "Reweighting | None":
    return getattr(trainer, "_polarity", None)


def _active(trainer: Any) -> "Reweighting | None":
    """The method, unless only the critic is trained as yet: a policy that stands still needs no steering."""
    return None if trainer.global_steps < trainer.config.trainer.critic_warmup else _method_of(trainer)


class Reweighting:
    """A method on the batches of verl's driver and the monitor beside it, with their state."""

    def __init__(self, method: str, settings: dict[str, Any], transform: Transform) -> None:
        self.method, self.settings, self.transform = method, settings, transform
        self.monitor, self.method_state = Monitor(), transform.init()
        self.masks: dict[str, Tensor] = {}  # of the last batch, until the actor is updated on it

    def rewrite(self, data: Any, batch: Any, metrics: Metrics) -> dict[str, Tensor]:
        """Rewrite the advantages in verl's padded `data`, whose keys and tags `batch` has. Returns the columns to put
        into TransferQueue beside verl's own."""
        import transfer_queue as tq

        names = [ENTROPY, SENSITIVITY]
        with idle_cores(), kept_memory():
            statistics = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
            columns, measured = self.rewritten(data.batch, statistics, batch.keys, batch.tags)
        metrics.update(measured)
        self.masks = {name: columns.pop(name) for name in ("response_mask", "loss_mask") if name in columns}
        return columns

    def rewritten(
        self, batch: Any, statistics: Mapping[str, Tensor], keys: list[str], tags: list[dict[str, Any]]
    ) -> tuple[dict[str, Tensor], Metrics]:
        """(columns that are new or changed, nested; metrics) for a padded batch, whose advantages are replaced, and the
        statistics that the workers sent. The state moves on."""
        if SENSITIVITY not in statistics:
            raise RuntimeError(
                f"{KEY}: the workers sent no {SENSITIVITY}: entropy-polarity is not installed where they run, or could "
                "not hook their engine (its log says why; so does `papo doctor` there)"
            )
        packing = Packing.of(batch["response_mask"], [tag.get("response_len", -1) for tag in tags])
        before = packing.tokens(batch, statistics, keys)
        after, self.method_state, decided = self.transform.update(before, self.method_state)
        metrics = self.monitor.measure(before, after) | decided
        # verl's advantages tensor is also its returns, so the result goes into the memory of `old_log_probs`, which
        # nothing reads any more; allocating anew costs as much as the method.
        advantages = packing.spread(after.advantages, after, others=batch["advantages"])
        batch["advantages"] = packing.padded(advantages, memory=batch.pop("old_log_probs"))

        def column(values: Tensor) -> Tensor:
            return packing.nested(packing.spread(values, after))

        terms = {name: getattr(after, name) for name in TERMS}
        columns = {TERMS[name]: column(term) for name, term in terms.items() if term is not None}
        if after.index is not None:
            kept = torch.ones_like(after.index, dtype=batch["response_mask"].dtype)
            # The second is what verl counts a mini-batch's tokens by.
            columns |= {name: column(kept) for name in ("response_mask", "loss_mask")}
        return columns, metrics

    @property
    def state(self) -> State:
        return {"entropy": self.monitor.entropy, "inner": self.method_state}

    def save(self, folder: Path) -> None:
        save_state(folder, self.method, self.settings, self.state)

    def load(self, folder: Path) -> None:
        state = load_state(folder, self.method, self.settings, self.state)
        self.monitor, self.method_state = Monitor(state["entropy"]), state["inner"]


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
