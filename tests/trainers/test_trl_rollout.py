"""One rollout in TRL's trainer: packed, gathered from all processes, decided once, measured once."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from test_trl import make_trainer, recorded

from entropy_polarity.tokens import Tokens
from entropy_polarity.trainers.trl import PolarityTrainer, Rollout
from entropy_polarity.trainers.trl.packing import (
    WRITTEN,
    advantages_for_trl,
    as_decided,
    at,
    for_the_loss,
    gather_columns,
    gather_tokens,
    own_part,
    packed,
    without_dropped,
)
from entropy_polarity.trainers.trl.recording import Judged, RunRecorder


def batch_of(lengths: list[int], width: int, first: int = 0) -> Tokens:
    """Responses of so many model tokens in a padded batch of `width`; numbers tell tokens apart."""
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    rows = torch.arange(len(lengths)) + first
    values = rows[:, None] * 1000.0 + torch.arange(width)
    return Tokens.pack(mask, rows.float(), logp=-values, entropy=values, reward=rows * 2.0, group=rows, sample_id=rows)


class Process:
    """What `packing` uses of an accelerator, for one of several processes that are threads; `sent` counts values."""

    def __init__(self, index: int, slots: list, barrier: threading.Barrier) -> None:
        self.process_index, self.num_processes = index, len(slots)
        self.slots, self.barrier, self.sent = slots, barrier, 0

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        self.slots[self.process_index] = value
        self.sent += value.numel()
        self.barrier.wait(timeout=60)
        assert len({part.shape for part in self.slots}) == 1, "every process sends as much"
        whole = torch.cat(self.slots)
        self.barrier.wait(timeout=60)
        return whole


def in_processes(function, *of_each: list) -> tuple[list, list[Process]]:
    """`function(process, ...)` in as many threads as there are arguments; the results and the processes."""
    slots, barrier = [None] * len(of_each[0]), threading.Barrier(len(of_each[0]))
    processes = [Process(index, slots, barrier) for index in range(len(slots))]
    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(function, processes, *of_each)), processes


def assert_same(a: Tokens, b: Tokens) -> None:
    for field in fields(Tokens):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert (x is None) == (y is None), field.name
        assert x is None or torch.equal(x, y), field.name


LENGTHS = [[500, 1, 2, 1], [0, 0, 0, 0], [3, 0, 7, 1]]


def test_processes_gather_the_tokens_of_all_and_get_their_own_part_back():
    """One process has a long response, one no token at all; a method drops every second token."""
    parts = [batch_of(lengths, 500, first=4 * rank) for rank, lengths in enumerate(LENGTHS)]
    expected = batch_of([length for lengths in LENGTHS for length in lengths], 500)

    def there_and_back(process, part):
        whole = gather_tokens(process, part)
        kept = torch.arange(len(whole.response)) % 2 == 0
        return whole, own_part(process, whole, whole), own_part(process, whole, whole.select(kept))

    results, _ = in_processes(there_and_back, parts)
    begin = 0
    for part, (whole, own, dropped) in zip(parts, results, strict=True):
        assert_same(whole, expected)
        assert_same(own, part)
        kept = (torch.arange(len(part.response)) + begin) % 2 == 0
        begin += len(kept)
        assert dropped.index is not None
        assert dropped.index.tolist() == kept.nonzero().flatten().tolist()
        assert torch.equal(dropped.advantages, part.advantages[kept])
        assert torch.equal(dropped.response, part.response[kept])


def test_traffic_between_processes_is_that_of_the_tokens_not_of_the_padding():
    """504 tokens in a rectangle of 2000: each process sends 504 values of each of five columns, and three of each of
    its four responses."""
    parts = [batch_of(lengths, 500, first=4 * rank) for rank, lengths in enumerate(LENGTHS)]
    _, processes = in_processes(gather_tokens, parts)
    assert [process.sent for process in processes] == [1 + 5 * 504 + 3 * 4] * 3
    wider = [batch_of(lengths, 5000, first=4 * rank) for rank, lengths in enumerate(LENGTHS)]
    _, again = in_processes(gather_tokens, wider)
    assert [process.sent for process in again] == [process.sent for process in processes]


def test_processes_without_any_token_gather_none():
    results, _ = in_processes(gather_columns, [{"advantages": torch.zeros(0)} for _ in range(2)])
    assert [result["advantages"].shape for result in results] == [(0,), (0,)]


def trl_batch(advantages: list[float]) -> dict:
    """Two responses; the environment wrote the middle of the first, the second ends early."""
    return {
        "completion_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "tool_mask": torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]]),
        "advantages": torch.tensor(advantages),
        "num_items_in_batch": torch.tensor(5),
    }


def test_a_batch_is_packed_without_padding_and_environment():
    tokens = packed(trl_batch([1.0, -1.0]), logp=torch.arange(8.0).view(2, 4))
    assert tokens.require("logp").tolist() == [0, 2, 3, 4, 5]
    assert tokens.position.tolist() == [0, 2, 3, 0, 1]
    assert tokens.advantages.tolist() == [1, 1, 1, -1, -1]
    assert at(tokens, torch.tensor([[5.0], [6.0]])).tolist() == [5, 5, 5, 6, 6]


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ([2.0, 2.0, 2.0, -3.0, -3.0], [2.0, -3.0]),
        ([2.0, 2.0, 5.0, -3.0, -3.0], [[2.0, 1.0, 2.0, 5.0], [-3.0, -3.0, -1.0, -1.0]]),
    ],
    ids=["one for each response", "one for each token"],
)
def test_advantages_go_back_in_the_form_that_they_have(made, expected):
    inputs = trl_batch([1.0, -1.0])
    tokens = packed(inputs)
    back = advantages_for_trl(inputs, Tokens(tokens.response, tokens.position, torch.tensor(made)))
    assert back.tolist() == expected
    assert inputs["advantages"].tolist() == [1, -1]


def test_dropped_tokens_leave_the_loss_and_its_denominator_but_not_the_batch():
    inputs = trl_batch([1.0, -1.0])
    tokens = packed(inputs)
    decided = tokens.select(torch.tensor([True, False, True, False, False]))
    batch = for_the_loss(inputs, decided, count=2)
    assert batch["tool_mask"].tolist() == [[1, 0, 0, 1], [0, 0, 0, 0]]
    assert batch["num_items_in_batch"] == 2
    assert batch["advantages"].tolist() == [1, -1]
    assert packed(batch).position.tolist() == [0, 2, 3, 0, 1]
    assert without_dropped(batch, packed(batch)).position.tolist() == [0, 3]
    assert WRITTEN not in for_the_loss(inputs, tokens, count=5)
    assert_same(as_decided(tokens, decided), decided)
    rollout = Rollout()
    rollout.tokens, rollout.after = tokens, decided
    assert rollout.weight.tolist() == [1, 0, 1, 0, 0]


@pytest.mark.parametrize("method", ["papo", "dapo", "opefo"])
def test_a_method_decides_once_and_is_measured_once(tmp_path, monkeypatch, method):
    """Two micro-batches, two iterations: a local method rewrites each micro-batch once and its state moves once; the
    other two kinds see the whole batch once. The measurement covers all tokens in the order of generation."""
    trainer = make_trainer(
        PolarityTrainer, tmp_path, method=(method, {}), max_steps=8, num_iterations=2,
        per_device_train_batch_size=8, steps_per_generation=2,
    )  # fmt: skip
    calls = {"local": 0, "advance": 0, "update": 0, "measure": 0}

    def counted(name, function):
        def call(*arguments):
            calls[name] += 1
            return function(*arguments)

        return call

    parts = {name: getattr(trainer.transform, name) for name in ("local", "advance", "update")}
    trainer.transform = trainer.transform._replace(
        **{name: counted(name, part) for name, part in parts.items() if part is not None}
    )
    monkeypatch.setattr(trainer.monitor, "measure", counted("measure", trainer.monitor.measure))
    rollouts = recorded(trainer)
    trainer.train()
    whole = {"local": 0, "advance": 0, "update": 2, "measure": 2}
    assert calls == {"papo": {"local": 8, "advance": 2, "update": 0, "measure": 2}}.get(method, whole)
    assert len(rollouts) == 2
    for rollout in rollouts:
        assert rollout.tokens.sample_id.tolist() == list(range(16))
        assert len(rollout.weight) == len(rollout.tokens.response) == rollout.inputs["completion_mask"].sum()
        assert torch.equal(rollout.tokens.reward, rollout.rewards)
        assert "polarity/positive_flow" in rollout.metrics
    assert sum("polarity/positive_flow" in row for row in trainer.state.log_history) == 2


@pytest.mark.parametrize("resumed", [0, 2], ids=["from the start", "resumed after two rollouts"])
def test_every_completion_is_recorded_in_its_turn_whatever_the_updates_on_a_rollout(resumed):
    """Two of eight completions, two updates on each rollout: a stride of 4, and the steps 2, 4, 6, 8 share a factor
    with it. Rollout by rollout they are 1 and 5, 2 and 6, 3 and 7, 0 and 4."""
    tokens = Tokens.pack(
        torch.ones(8, 1, dtype=torch.bool), torch.ones(8),
        **{name: torch.zeros(8, 1) for name in ("logp", "entropy", "sensitivity")},
    )  # fmt: skip
    ones = torch.ones(8, 1, dtype=torch.long)
    rollout = Rollout(inputs={"completion_ids": ones, "completion_mask": ones, "advantages": torch.ones(8)})
    rollout.rewards, rollout.tokens, rollout.after = torch.arange(8.0), tokens, tokens
    kept, state = [], SimpleNamespace(global_step=2 * resumed)
    writer = SimpleNamespace(rollouts=lambda rows, columns: kept.append([row["reward"] for row in rows]))
    trainer = SimpleNamespace(
        state=state, micro_steps_per_rollout=2, add_callback=lambda callback: None,
        processing_class=SimpleNamespace(decode=lambda ids: "a"),
    )  # fmt: skip
    recorder = RunRecorder(writer, 2, lambda: [Judged("", "", "")] * 8, lambda row: None)
    recorder.attach(trainer)
    recorder.on_train_begin(SimpleNamespace(gradient_accumulation_steps=1), state, None)
    for number in range(resumed, 4):
        state.global_step = 2 * number + 1  # the second update on the rollout is the one being made
        recorder.record_rollout(rollout)
    assert kept == [[1, 5], [2, 6], [3, 7], [0, 4]][resumed:]
