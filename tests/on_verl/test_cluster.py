"""The whole way of a batch on a real cluster: Ray, two workers, TransferQueue, verl's own trainer methods."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("verl", reason="verl needs an environment of its own: make verl-test")
pytest.importorskip("transfer_queue")

import numpy as np
import ray
import transfer_queue as tq
from omegaconf import OmegaConf
from on_verl.batches import config, golden_rows, lengths, nested, padded, tensordict
from on_verl.workers import TEMPERATURE, VOCABULARY, Actor, logits_of

import entropy_polarity
from entropy_polarity.kernels.reference import reference_token_stats
from entropy_polarity.methods import METHODS, make_transform
from entropy_polarity.tokens import Tokens
from entropy_polarity.trainers.verl.config import prepare
from entropy_polarity.trainers.verl.driver import Reweighting
from entropy_polarity.transforms import Monitor

PROMPT = 3


@pytest.fixture(scope="module")
def workers():
    from verl.single_controller.ray.base import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

    source = Path(entropy_polarity.__file__).parents[1]  # the workers' package is the one that is tested
    here = {"env_vars": {"PYTHONPATH": os.pathsep.join([str(source), str(Path(__file__).parents[1])])}}
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, runtime_env=here)
    storage = {
        "storage_backend": "SimpleStorage",
        "SimpleStorage": {"total_storage_size": 3000, "num_data_storage_units": 1},
    }
    tq.init(OmegaConf.create({"backend": storage}))

    def group():
        pool = RayResourcePool(process_on_nodes=[2], use_gpu=False, max_colocate_count=1)
        return RayWorkerGroup(resource_pool=pool, ray_cls_with_init=RayClassWithInitArgs(cls=ray.remote(Actor)))

    yield group
    tq.close()
    ray.shutdown()


class Workers:
    """The group, whose update also gives the metrics that verl's own would give; `sent` is what each of the workers
    was sent beside the columns."""

    def __init__(self, group):
        self.group, self.compute_log_prob = group, group.compute_log_prob

    def update_actor(self, batch):
        self.sent = self.group.update_actor(batch).extra_info["metrics"]
        return {"metrics": {"mfu": [0.0]}}


def trainer(group, **papo):
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    made = config(**papo)
    made.actor_rollout_ref.rollout.temperature = TEMPERATURE
    prepared = prepare(made)
    it = object.__new__(PPOTrainerSync)
    vars(it).update(
        config=made, actor_rollout_wg=Workers(group), use_critic=False, global_steps=1,
        _polarity=None if prepared is None else Reweighting(*prepared),
    )  # fmt: skip
    return it


def put(partition: str, ids_up_to: int = VOCABULARY - 1, outputs: int = 1) -> tuple[tq.KVBatchMeta, Tokens]:
    """A batch in TransferQueue as the rollouts leave it, `outputs` a session, and its tokens, computed here."""
    rows = golden_rows()
    mask = rows["mask"].bool()
    mask[2, 1] = False  # an environment's token
    long = lengths(mask)
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(ids_up_to, (PROMPT + n,), generator=generator) for n in long]
    keys = [f"p{i // 4}_{i % 4 // outputs}_{i % outputs}" for i in range(16)]
    scores = torch.zeros(mask.shape)
    for row, n in enumerate(long):
        scores[row, n - 1] = rows["reward"].flatten()[row]
    columns = {
        "uid": np.array([key.split("_")[0] for key in keys], dtype=object),
        "input_ids": nested(ids),
        "response_mask": nested([mask[row, :n].long() for row, n in enumerate(long)]),
        "loss_mask": nested([mask[row, :n].long() for row, n in enumerate(long)]),
        "rm_scores": nested([scores[row, :n] for row, n in enumerate(long)]),
    }
    meta = tq.kv_batch_put(
        keys=keys,
        partition_id=partition,
        fields=tensordict(columns),
        tags=[{"response_len": n, "seq_len": PROMPT + n} for n in long],
    )
    statistics = {name: torch.zeros(mask.shape) for name in ("logp", "entropy", "sensitivity")}
    for row, (x, n) in enumerate(zip(ids, long, strict=True)):
        stats = reference_token_stats(logits_of(x).double()[:-1] / TEMPERATURE, x[1:])
        for name, column in statistics.items():
            column[row, :n] = getattr(stats, name)[-n:].float()
    reward = rows["reward"].flatten()
    grouped = reward.view(-1, 4)
    advantage = ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-6)).flatten()
    return meta, Tokens.pack(
        mask, advantage, old_logp=statistics["logp"], reward=reward, group=torch.arange(16) // 4,
        sample_id=torch.arange(16), **statistics,
    )  # fmt: skip


def in_rows(tokens: Tokens, name: str = "advantages") -> torch.Tensor:
    """A column as the padded batch has it."""
    return tokens.unpack(tokens.require(name), tuple(golden_rows()["mask"].shape))


def stepped(it, meta) -> tuple[dict[str, torch.Tensor], dict]:
    """verl's own order of a step; what the workers were given for their update, and verl's returns, padded."""
    metrics: dict = {}
    width = golden_rows()["mask"].shape[1]
    given = tq.kv_batch_get(keys=meta.keys, partition_id=meta.partition_id, select_fields=["response_mask"])
    critics = padded(given["response_mask"], width)
    meta = it._compute_old_log_prob(meta, metrics)
    assert "polarity_statistics" not in (meta.extra_info or {})
    meta = it._compute_advantage(meta, metrics)
    before = tq.kv_batch_get(keys=meta.keys, partition_id=meta.partition_id, select_fields=["response_mask"])
    meta = it._update_actor(meta, metrics)
    assert torch.equal(padded(before["response_mask"], width), critics), "a critic learns from every response"
    for sent in it.actor_rollout_wg.sent:
        assert sent["decided"] == (it._polarity is not None)
        assert not sent["statistics_sent_again"]
    names = ("advantages", "response_mask", "loss_mask", "polarity_entropy_bonus", "polarity_ratio_penalty")
    seen = tq.kv_batch_get(
        keys=meta.keys, partition_id=meta.partition_id, select_fields=["returns", *(f"seen_{name}" for name in names)]
    )
    return {name.removeprefix("seen_"): padded(column, width) for name, column in seen.items()}, metrics


@pytest.fixture(scope="module")
def group(workers):
    return workers()


def test_without_settings_verl_is_untouched(group):
    meta, tokens = put("plain")
    seen, metrics = stepped(trainer(group), meta)
    torch.testing.assert_close(seen["advantages"], in_rows(tokens), rtol=1e-5, atol=1e-6)
    assert not any(name.startswith("polarity") for name in metrics)
    stored = tq.kv_batch_get(keys=meta.keys, partition_id="plain")
    assert not any(name.startswith("polarity") for name in stored.keys())  # noqa: SIM118


def test_every_method_trains_on_the_advantages_that_it_makes_elsewhere(group):
    plain, _ = stepped(trainer(group), put("bits")[0])
    for name, method in METHODS.items():
        for partition in ("first", "second"):
            settings = {"controller": "balance"} if name == "papo" else method.example
            meta, tokens = put(f"{name}-{partition}")
            if partition == "first":
                it, transform = trainer(group, method=name, **settings), make_transform(name, settings)
                state, monitor = transform.init(), Monitor()
            seen, metrics = stepped(it, meta)
            after, state, decided = transform.update(tokens, state)
            expected = monitor.measure(tokens, after) | decided
            kept = in_rows(replace(after, advantages=torch.ones_like(after.advantages))).bool()
            assert torch.equal(seen["response_mask"].bool(), kept), name
            assert torch.equal(seen["loss_mask"].bool(), kept), name
            torch.testing.assert_close(seen["advantages"][kept], after.advantages, rtol=2e-3, atol=1e-5, msg=name)
            for key, value in expected.items():
                assert metrics[key] == pytest.approx(value, rel=1e-3, abs=1e-5), (name, key)
            assert torch.equal(seen["returns"], plain["returns"]), name
            if torch.equal(after.advantages, tokens.advantages):
                assert torch.equal(seen["advantages"], plain["advantages"]), name
            for term in ("entropy_bonus", "ratio_penalty"):
                wanted = getattr(after, term)
                assert (wanted is None) == (f"polarity_{term}" not in seen), name
                if wanted is not None:
                    torch.testing.assert_close(seen[f"polarity_{term}"][kept], wanted)


CORRECTION = {"rollout_is": "token", "rollout_rs": "token_k1", "rollout_rs_threshold": "0.6_1.5"}


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize(
    "algorithm",
    [{"rollout_correction": CORRECTION}, {"adv_estimator": "gae"}, {"adv_estimator": "reinforce_plus_plus"}],
)
def test_a_method_goes_on_from_what_verl_makes(group, algorithm, outputs):
    """Other estimators, weights and rejected tokens of a rollout engine's correction, sessions of several outputs."""
    kept = ("advantages", "returns", "response_mask", "rollout_is_weights")
    seen = {}
    for name, settings in (("plain", {}), ("papo", {"method": "papo", "controller": "balance"})):
        it = trainer(group, **settings)
        it.config.merge_with({"algorithm": algorithm})
        meta, tokens = put(f"{name}-{outputs}-{'-'.join(map(str, algorithm.values()))}", outputs=outputs)
        logp = in_rows(tokens, "logp")
        noise = 0.3 * torch.randn(logp.shape, generator=torch.Generator().manual_seed(5))
        rows = {"values": noise, "rollout_log_probs": logp + noise}
        long = [tag["response_len"] for tag in meta.tags]
        more = {name: nested([row[:n] for row, n in zip(column, long, strict=True)]) for name, column in rows.items()}
        tq.kv_batch_put(keys=meta.keys, partition_id=meta.partition_id, fields=tensordict(more))
        meta = it._compute_advantage(it._compute_old_log_prob(meta, {}), {})
        stored = tq.kv_batch_get(keys=meta.keys, partition_id=meta.partition_id, select_fields=[*kept])
        seen[name] = {name: padded(column, logp.shape[1]) for name, column in stored.items()}
    plain, papo = seen["plain"], seen["papo"]
    mask = plain["response_mask"].bool()
    fewer = int(mask.sum()) < len(tokens.response)
    assert ("rollout_is_weights" in plain) == ("rollout_correction" in algorithm) == fewer
    statistics = {name: in_rows(tokens, name) for name in ("logp", "old_logp", "entropy", "sensitivity")}
    responses = {name: tokens.require(name) for name in ("reward", "group", "sample_id")}
    before = Tokens.pack(
        mask, plain["advantages"], importance=plain.get("rollout_is_weights"), **statistics, **responses
    )
    transform = make_transform("papo", {"controller": "balance"})
    after, _, _ = transform.update(before, transform.init())
    assert not torch.equal(after.advantages, before.advantages)
    torch.testing.assert_close(papo["advantages"][mask], after.advantages, rtol=2e-3, atol=1e-5)
    for name in plain.keys() - {"advantages"}:
        assert torch.equal(papo[name], plain[name]), name


def test_padding_that_verl_adds_stays_out(group):
    """A batch filled up to what the ranks can share, as verl fills it."""
    from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size

    plain, expected = stepped(trainer(group, method="dapo"), put("even")[0])
    meta, _ = put("uneven")
    meta = upsample_batch_to_divisible_size(meta, 18, 0)
    assert [tag.get("is_padding", False) for tag in meta.tags] == [False] * 16 + [True] * 2
    filled, metrics = stepped(trainer(group, method="dapo"), meta)
    assert metrics.keys() == expected.keys()
    for name in (name for name in metrics if name.startswith("polarity/")):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-6), name
    for name, column in plain.items():
        assert torch.equal(filled[name][:16], column), name
    assert not filled["response_mask"][16:].any()


def test_while_only_the_critic_is_trained_a_method_waits(group):
    it = trainer(group, method="papo", controller="balance")
    it.config.trainer.critic_warmup = 2
    meta, tokens = put("warming")
    metrics: dict = {}
    meta = it._compute_advantage(it._compute_old_log_prob(meta, metrics), metrics)
    stored = tq.kv_batch_get(keys=meta.keys, partition_id="warming", select_fields=["advantages"])
    expected = in_rows(tokens)
    torch.testing.assert_close(padded(stored["advantages"], expected.shape[1]), expected)
    untouched = {"entropy": None, "inner": it._polarity.transform.init()}
    assert it._polarity.state == untouched
    assert "polarity_sensitivity" not in tq.kv_batch_get(keys=meta.keys, partition_id="warming"), "nothing is made"
    it.global_steps = 2
    stepped(it, put("warm")[0])
    assert it._polarity.state != untouched


def test_workers_without_the_package_are_said_so(group):
    meta = trainer(group)._compute_old_log_prob(put("silent")[0], {})
    with pytest.raises(RuntimeError, match=r"the workers sent no polarity_sensitivity.*papo doctor"):
        trainer(group, method="papo")._compute_advantage(meta, {})


def test_a_verl_that_makes_its_advantages_elsewhere_is_said_so(group, monkeypatch):
    from verl.trainer.ppo.v1 import trainer_base

    hooked = trainer_base.compute_advantage_for_multi_trajectories
    monkeypatch.setattr(trainer_base, "compute_advantage_for_multi_trajectories", hooked.__wrapped__)
    it = trainer(group, method="papo")
    with pytest.raises(RuntimeError, match="did not make its advantages where"):
        it._compute_advantage(it._compute_old_log_prob(put("elsewhere")[0], {}), {})


def test_a_worker_that_dies_is_verls_own_error(workers):
    doomed = workers()
    meta, _ = put("doomed", ids_up_to=VOCABULARY)
    with pytest.raises(ray.exceptions.RayActorError):
        trainer(doomed, method="papo")._compute_old_log_prob(meta, {})
