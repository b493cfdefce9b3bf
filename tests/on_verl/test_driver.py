"""The driver's part: verl's nested columns to Tokens and back, state, checkpoints, loss terms."""

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("verl", reason="verl needs an environment of its own: make verl-test")

from on_verl.batches import GOLDEN, config, golden_rows, lengths, nested, of_driver, of_verl, padded

from entropy_polarity.methods import METHODS, make_transform
from entropy_polarity.tokens import Tokens
from entropy_polarity.trainers.verl.config import prepare
from entropy_polarity.trainers.verl.driver import Reweighting
from entropy_polarity.trainers.verl.packing import Packing
from entropy_polarity.transforms import Monitor


def reweighting(name: str, settings: dict) -> Reweighting:
    prepared = prepare(config(method=name, **settings))
    assert prepared is not None
    return Reweighting(*prepared)


def rewritten(method: Reweighting, keys: list[str], columns: dict) -> tuple[dict, dict]:
    """(padded columns as the actor gets them, where a method had a say; metrics)"""
    batch, sent, tags = of_driver(columns)
    made, metrics = method.rewritten(batch, sent, keys, tags)
    width = batch["advantages"].shape[1]
    for name, column in made.items():
        assert torch.equal(column.offsets(), columns["response_mask"].offsets()), name
        assert column.dtype == columns.get(name, columns["advantages"]).dtype, name
    assert batch["advantages"].dtype == columns["advantages"].dtype
    return {name: padded(column, width) for name, column in made.items()} | {"advantages": batch["advantages"]}, metrics


def tokens_in(keys: list[str], columns: dict) -> Tokens:
    batch, sent, tags = of_driver(columns)
    packing = Packing.of(batch["response_mask"], [tag["response_len"] for tag in tags])
    return packing.tokens(batch, sent, keys)


def test_the_golden_batch_has_every_method():
    assert {case["method"][0] for case in GOLDEN["methods"].values()} == METHODS.keys()


def test_nested_columns_become_the_same_tokens():
    rows = golden_rows()
    keys, columns = of_verl(rows)
    tokens = tokens_in(keys, columns)
    mask = rows["mask"].bool()
    assert torch.equal(torch.stack([tokens.response, tokens.position], 1), mask.nonzero())
    for name in ("advantages", "logp", "entropy", "sensitivity"):
        assert torch.equal(tokens.require(name), rows[name][mask]), name
    assert torch.equal(tokens.require("reward"), rows["reward"].flatten())
    assert tokens.require("group").tolist() == [row // 4 for row in range(16)]
    assert tokens.require("sample_id").tolist() == list(range(16))


@pytest.mark.parametrize("case", GOLDEN["methods"])
def test_every_method_makes_what_it_makes_in_trl(case):
    (name, settings), made = GOLDEN["methods"][case]["method"], GOLDEN["methods"][case]["made"]
    rows = golden_rows()
    keys, columns = of_verl(rows)
    written, metrics = rewritten(reweighting(name, settings), keys, columns)
    mask = rows["mask"].bool()
    of_trl = {key: torch.tensor(value) for key, value in made.items()}
    kept = written["response_mask"].bool() if "response_mask" in written else mask
    assert torch.equal(kept, of_trl["mask"].bool())
    torch.testing.assert_close(written["advantages"][kept], of_trl["advantages"][kept], rtol=1e-5, atol=1e-7)
    for term in ("entropy_bonus", "ratio_penalty"):
        assert (f"polarity_{term}" in written) == (term in of_trl)
        if term in of_trl:
            torch.testing.assert_close(written[f"polarity_{term}"][mask], of_trl[term][mask])
    if "response_mask" in written:
        assert torch.equal(written["loss_mask"], written["response_mask"])
    assert metrics["polarity/entropy"] == pytest.approx(float(rows["entropy"][mask].double().mean()), rel=1e-6)


def test_weight_one_touches_nothing():
    rows = golden_rows()
    keys, columns = of_verl(rows)
    for name, settings in (("grpo", {}), ("papo", {"controller": "constant", "lambda_": 0.0})):
        written, metrics = rewritten(reweighting(name, settings), keys, columns)
        assert written.keys() == {"advantages"}
        bits, mask = (of.view(torch.int32) for of in (written["advantages"], rows["advantages"])), rows["mask"].bool()
        assert torch.equal(*(of[mask] for of in bits))
        assert metrics["polarity/changed_fraction"] == 0


def test_rows_that_verl_fills_a_batch_up_with_change_nothing():
    rows = golden_rows()
    more = {name: torch.cat([column, column[:2] * 0 + 7.0]) for name, column in rows.items()}
    more["mask"] = torch.cat([rows["mask"], torch.zeros_like(rows["mask"][:2])])
    for name, settings in (case["method"] for case in GOLDEN["methods"].values()):
        plain, metrics = rewritten(reweighting(name, settings), *of_verl(rows))
        filled, same = rewritten(reweighting(name, settings), *of_verl(more))
        assert same == metrics, name
        for column, values in plain.items():
            assert torch.equal(filled[column][:16], values), (name, column)


def test_verls_returns_are_left_as_they_are():
    keys, columns = of_verl(golden_rows())
    batch, sent, tags = of_driver(columns)
    returns = batch["advantages"]
    before = returns.clone()
    reweighting("papo", {"controller": "balance"}).rewritten(batch, sent, keys, tags)
    assert torch.equal(returns, before)
    assert not torch.equal(batch["advantages"], before)


def test_lengths_that_cannot_be_are_said_so():
    keys, columns = of_verl(golden_rows())
    batch, sent, tags = of_driver(columns)
    longest, short = max(tag["response_len"] for tag in tags), [{**tag} for tag in tags]
    row = next(i for i, tag in enumerate(tags) if 1 < tag["response_len"] < longest)
    short[row]["response_len"] -= 1
    for wrong in ([{}] * 16, short, [{"response_len": longest - 1}] * 16):
        with pytest.raises(RuntimeError, match="response_len are not the lengths"):
            reweighting("papo", {}).rewritten(batch, sent, keys, wrong)


def test_what_an_environment_said_is_no_token_of_the_model():
    rows = golden_rows()
    rows["mask"][:, 1] = 0  # inside the responses
    keys, columns = of_verl(rows)
    silent = {**columns, "polarity_sensitivity": columns["polarity_sensitivity"].clone()}
    for row, start in enumerate(columns["polarity_sensitivity"].offsets()[:-1].tolist()):
        if lengths(rows["mask"])[row] > 1:
            silent["polarity_sensitivity"].values()[start + 3] = torch.nan
    method = ("papo", {"controller": "balance"})
    plain, metrics = rewritten(reweighting(*method), keys, columns)
    same, as_well = rewritten(reweighting(*method), keys, silent)
    assert metrics == as_well
    assert torch.equal(plain["advantages"], same["advantages"])
    changed = (plain["advantages"] != rows["advantages"]) & golden_rows()["mask"].bool()
    assert changed.any()
    assert not changed[:, 1].any()


def test_a_rollout_engines_correction_is_part_of_the_polarity():
    keys, columns = of_verl(golden_rows())
    plain = tokens_in(keys, columns)
    columns["rollout_is_weights"] = columns["advantages"] * 0 + 0.5
    assert plain.importance is None
    corrected = tokens_in(keys, columns)
    assert (corrected.require("importance") == 0.5).all()


def test_missing_statistics_are_said_so():
    keys, columns = of_verl(golden_rows())
    del columns["polarity_sensitivity"]
    with pytest.raises(RuntimeError, match=r"the workers sent no polarity_sensitivity.*papo doctor"):
        rewritten(reweighting("papo", {}), keys, columns)


def test_the_state_moves_as_by_the_transform_alone():
    rows = golden_rows()
    keys, columns = of_verl(rows)
    method = reweighting("papo", {"controller": "trend"})
    transform = make_transform("papo", {"controller": "trend"})
    state, monitor = transform.init(), Monitor()
    for factor in (1.0, 0.7, 0.5):
        columns["polarity_entropy"] = columns["polarity_entropy"] * factor
        _, metrics = rewritten(method, keys, columns)
        before = tokens_in(keys, columns)
        after, state, expected = transform.update(before, state)
        assert metrics == monitor.measure(before, after) | expected
    assert method.state == {"entropy": monitor.entropy, "inner": state}
    assert state != transform.init()


class Saving:
    """Stands where verl's workers and data do."""

    def __init__(self, folder, **papo):
        from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

        made = config(**papo)
        made.trainer.default_local_dir = str(folder)
        self.trainer = object.__new__(PPOTrainerSync)
        prepared = prepare(made)
        workers = SimpleNamespace(save_checkpoint=lambda *a, **k: None, load_checkpoint=lambda *a, **k: None)
        vars(self.trainer).update(
            config=made, trainer_mode="sync", use_critic=False, global_steps=3, actor_rollout_wg=workers,
            train_dataloader=SimpleNamespace(state_dict=dict, load_state_dict=lambda _: None),
            checkpoint_callback=SimpleNamespace(on_save=lambda **_: None),
            _polarity=None if prepared is None else Reweighting(*prepared),
        )  # fmt: skip


def test_the_controller_is_in_verls_checkpoints(tmp_path):
    trend = {"method": "papo", "controller": "trend"}
    first = Saving(tmp_path, **trend).trainer
    keys, columns = of_verl(golden_rows())
    rewritten(first._polarity, keys, columns)
    first._save_checkpoint()
    assert (
        json.loads((tmp_path / "global_step_3/polarity_state.json").read_text(encoding="utf-8"))["state"]
        == first._polarity.state
    )

    resumed = Saving(tmp_path, **trend).trainer
    assert resumed._polarity.state != first._polarity.state
    resumed._load_checkpoint()
    assert resumed.global_steps == 3
    assert resumed._polarity.state == first._polarity.state

    by_path = Saving(tmp_path / "elsewhere", **trend).trainer
    by_path.config.trainer.resume_mode = "resume_path"
    by_path.config.trainer.resume_from_path = str(tmp_path / "global_step_3")
    by_path._load_checkpoint()
    assert by_path._polarity.state == first._polarity.state

    with pytest.raises(ValueError, match="was trained with settings"):
        Saving(tmp_path, method="papo", controller="trend", gain=9.0).trainer._load_checkpoint()


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    Saving(tmp_path).trainer._save_checkpoint()
    assert not (tmp_path / "global_step_3/polarity_state.json").exists()
    with pytest.raises(FileNotFoundError, match=r"no polarity_state\.json"):
        Saving(tmp_path, method="papo").trainer._load_checkpoint()


def test_a_checkpoint_that_verl_did_not_finish_is_not_its_latest(tmp_path):
    trainer = Saving(tmp_path, method="papo").trainer

    def die(*_, **__):
        raise OSError("no space left on device")

    trainer.actor_rollout_wg.save_checkpoint = die
    with pytest.raises(OSError, match="no space"):
        trainer._save_checkpoint()
    resumed = Saving(tmp_path, method="papo").trainer
    resumed._load_checkpoint()
    assert resumed.global_steps == 0


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_loss_terms_are_averaged_as_verl_averages(mode):
    from verl.trainer.ppo.core_algos import agg_loss
    from verl.utils import tensordict_utils as tu
    from verl.workers.config import ActorConfig
    from verl.workers.engine_workers import ppo_loss

    generator = torch.Generator().manual_seed(0)
    long = [3, 1, 4]
    total = [n + 2 for n in long]
    log_probs, entropy = (torch.randn(sum(total), generator=generator).requires_grad_() for _ in range(2))
    offsets = torch.tensor([0, *total]).cumsum(0)

    def rows(value):
        return nested([torch.full((n,), value) for n in long])

    def data(**terms):
        td = tu.get_tensordict(
            {
                "prompts": nested([torch.ones(2, dtype=torch.long) for _ in long]),
                "responses": nested([torch.ones(n, dtype=torch.long) for n in long]),
                "response_mask": nested([torch.ones(n, dtype=torch.long) for n in long]),
                "old_log_probs": rows(-1.0), "advantages": rows(0.5), **terms,
            },
            {"dp_size": 1, "batch_num_tokens": sum(long), "global_batch_size": 3},
        )  # fmt: skip
        return td

    config_ = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode=mode, entropy_coeff=0.0
    )
    output = {
        "log_probs": torch.nested.nested_tensor_from_jagged(log_probs, offsets),
        "entropy": torch.nested.nested_tensor_from_jagged(entropy, offsets),
    }
    plain, _ = ppo_loss(config=config_, model_output=output, data=data())
    terms = {"polarity_entropy_bonus": rows(0.1), "polarity_ratio_penalty": rows(0.2)}
    loss, metrics = ppo_loss(config=config_, model_output=output, data=data(**terms))

    from verl.workers.utils.padding import no_padding_2_padding

    h, logp = (no_padding_2_padding(output[name], data()) for name in ("entropy", "log_probs"))
    mask = torch.arange(4) < torch.tensor(long)[:, None]
    expected = agg_loss(
        loss_mat=-0.1 * h + 0.2 * (logp + 1.0).abs(), loss_mask=mask, loss_agg_mode=mode, **config_.global_batch_info
    )
    torch.testing.assert_close(loss - plain, expected)
    assert "actor/polarity_loss_terms" in metrics
    (entropy_grad,) = torch.autograd.grad(loss, entropy, retain_graph=True)
    assert entropy_grad.abs().sum() > 0


def test_a_mini_batch_of_which_nothing_is_left_has_loss_zero():
    from verl.utils import tensordict_utils as tu
    from verl.workers.config import ActorConfig
    from verl.workers.engine_workers import ppo_loss

    values = torch.zeros(5, requires_grad=True)
    td = tu.get_tensordict(
        {
            "prompts": nested([torch.ones(2, dtype=torch.long)]),
            "responses": nested([torch.ones(3, dtype=torch.long)]),
            "response_mask": nested([torch.zeros(3, dtype=torch.long)]), "old_log_probs": nested([torch.zeros(3)]),
            "advantages": nested([torch.ones(3)]),
        },
        {"dp_size": 1, "batch_num_tokens": 0, "global_batch_size": 1, "polarity_decided": True},
    )  # fmt: skip
    config_ = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    output = {"log_probs": torch.nested.nested_tensor_from_jagged(values, torch.tensor([0, 5]))}
    loss, _ = ppo_loss(config=config_, model_output=output, data=td)
    assert loss.item() == 0
    loss.backward()
    assert values.grad is not None
    assert (values.grad == 0).all()
