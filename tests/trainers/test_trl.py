"""PolarityTrainer against TRL's own trainer, against the plain loop, and against itself split differently."""

import json
import math
from dataclasses import replace
from pathlib import Path

import loop
import pytest
import torch
import trl
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)
from trl import GRPOConfig, GRPOTrainer

from entropy_polarity import token_stats
from entropy_polarity.policy.tokenizer import character_tokenizer
from entropy_polarity.runs.method_state import STATE_FILE
from entropy_polarity.tasks.countdown import Countdown
from entropy_polarity.trainers.trl import PolarityConfig, PolarityTrainer
from entropy_polarity.trainers.trl.head import check_trl, warn_once
from entropy_polarity.transforms import token_polarity

TASK = Countdown(numbers=(3,))
PROBLEMS = [TASK.problem(0, i, "train") for i in range(64)]
NEUTRAL = {
    "constant": ("papo", {"controller": "constant", "lambda_": 0.0}),
    "trend": ("papo", {"controller": "trend", "lambda_max": 0.0}),
    "reference": ("papo", {"controller": "reference", "lambda_max": 0.0}),
    "balance": ("papo", {"controller": "balance", "lambda_max": 0.0}),
    "grpo": ("grpo", {}),
}


def judge(completions, problem, **_):
    return [TASK.score(PROBLEMS[i], text).reward for i, text in zip(problem, completions, strict=True)]


def make_trainer(kind, folder: Path, model=None, method=None, tokenizer=None, peft_config=None, held_out=0, **settings):
    """A small trainer on the embedded policy: 4 prompts x 4 completions a rollout unless said otherwise."""
    embedded = Path(__file__).parents[2] / "src/entropy_polarity/policy/weights/countdown"
    if model is None:
        model = AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32)
    if method is not None:
        settings["method"], settings["method_settings"] = method
    defaults = {
        "per_device_train_batch_size": 16, "num_generations": 4, "max_completion_length": 16, "max_steps": 5,
        "learning_rate": 1e-3, "logging_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False,
        "save_strategy": "no", "disable_tqdm": True, "seed": 0, "gradient_checkpointing": False,
    }  # fmt: skip
    config = PolarityConfig if kind is PolarityTrainer else GRPOConfig
    data = Dataset.from_dict({"prompt": [p.prompt for p in PROBLEMS], "problem": list(range(64))})
    return kind(
        model=model,
        reward_funcs=judge,
        args=config(output_dir=str(folder), **defaults | settings),
        train_dataset=data,
        processing_class=tokenizer or AutoTokenizer.from_pretrained(embedded),
        peft_config=peft_config,
        eval_dataset=data.select(range(held_out)) if held_out else None,
    )


def history(trainer, *names):
    return [[row[name] for name in names] for row in trainer.state.log_history if "loss" in row]


def recorded(trainer) -> list:
    """The rollouts that the trainer will finish, kept."""
    kept = []
    trainer.on_rollout = kept.append
    return kept


@pytest.mark.parametrize("method", NEUTRAL.values(), ids=NEUTRAL)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
        {
            "num_iterations": 2,
            "per_device_train_batch_size": 8,
            "steps_per_generation": 2,
            "loss_type": "grpo",
        },
    ],
    ids=["plain", "accumulated", "reused"],
)
def test_neutral_equals_grpo(tmp_path, method, settings):
    """With λ = 0 and TRL's head: losses, gradient norms and the weights after five steps are equal to the last bit."""
    theirs = make_trainer(GRPOTrainer, tmp_path / "grpo", **settings)
    theirs.train()
    ours = make_trainer(PolarityTrainer, tmp_path / "ours", method=method, statistics_head="trl", **settings)
    ours.train()
    names = ("loss", "grad_norm", "entropy", "clip_ratio/region_mean")
    assert history(ours, *names) == history(theirs, *names)
    for (name, a), b in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert any(row.get("polarity/positive_flow", 0) > 0 for row in ours.state.log_history)


@pytest.mark.parametrize(
    "settings", [{}, {"num_iterations": 2, "beta": 0.0, "entropy_coef": 0.01}], ids=["plain", "bonus"]
)
def test_neutral_is_grpo_up_to_rounding_with_our_head(tmp_path, settings):
    """With λ = 0 and our head: the same samples, losses and gradient norms to the digits that TRL logs, four; and the
    weights after five steps within 1e-3 of the way they went (Adam makes whole steps of gradients near rounding)."""
    theirs = make_trainer(GRPOTrainer, tmp_path / "grpo", **settings)
    start = {name: p.detach().clone() for name, p in theirs.model.named_parameters()}
    theirs.train()
    ours = make_trainer(PolarityTrainer, tmp_path / "ours", method=NEUTRAL["constant"], **settings)
    ours.train()
    names = ("loss", "grad_norm", "entropy")
    for a, b in zip(history(ours, *names), history(theirs, *names), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
    way = sum((p - start[name]).square().sum() for name, p in theirs.model.named_parameters())
    apart = sum((p - theirs.model.get_parameter(name)).square().sum() for name, p in ours.model.named_parameters())
    assert way > 0
    assert (apart / way).sqrt() <= 1e-3


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("bonus", [0.0, 0.01], ids=["", "entropy bonus"])
def test_both_heads_give_the_same_gradients(tmp_path, frozen, bonus):
    """A frozen head has a backward of its own, and none of it serves a loss that holds the entropy."""
    gradients = {}
    for head in ("trl", "fused"):
        trainer = make_trainer(
            PolarityTrainer, tmp_path / head, statistics_head=head, max_steps=1, entropy_coef=bonus,
            method=("papo", {"controller": "constant", "lambda_": 0.5}),
        )  # fmt: skip
        trainer.model.get_output_embeddings().weight.requires_grad_(not frozen)
        step = trainer.training_step

        def keep(model, *args, step=step, head=head):
            loss = step(model, *args)
            gradients[head] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            return loss

        trainer.training_step = keep
        trainer.train()
    assert gradients["trl"].keys() == gradients["fused"].keys()
    for name, theirs in gradients["trl"].items():
        torch.testing.assert_close(gradients["fused"][name], theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))


def products_with_the_head(trainer) -> int:
    """How often a training step multiplies with the output head's weights."""
    shape = trainer.model.get_output_embeddings().weight.shape
    count = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal count
            factors = [x for x in args if isinstance(x, torch.Tensor) and x.dim() == 2]
            if "mm" in func.__name__ and any(x.shape in (shape, shape[::-1]) for x in factors):
                count += 1
            return func(*args, **kwargs or {})

    batch = next(iter(trainer.get_train_dataloader()))
    trainer.create_optimizer_and_scheduler(num_training_steps=10)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    inputs = trainer._prepare_inputs(batch)
    with Watch():
        trainer._compute_loss(trainer.model, inputs)
    return count


def test_the_loss_multiplies_with_the_head_once(tmp_path):
    counts = {
        head: products_with_the_head(make_trainer(PolarityTrainer, tmp_path / head, statistics_head=head))
        for head in ("fused", "trl")
    }
    assert counts == {"fused": 1, "trl": 2}


def test_a_sharded_head_falls_back_to_trls_and_says_so_once(tmp_path, caplog):
    trainer = make_trainer(PolarityTrainer, tmp_path, max_steps=2)
    trainer.model.get_output_embeddings().weight.ds_id = 0  # what DeepSpeed's ZeRO-3 marks its shards with
    warn_once.cache_clear()
    trainer.train()
    told = [record.message for record in caplog.records if record.name == "entropy_polarity"]
    assert len(told) == 1
    assert "ZeRO-3" in told[0]
    assert "TRL's own output head" in told[0]
    assert any(row.get("polarity/positive_flow", 0) > 0 for row in trainer.state.log_history)


def test_other_trainers_of_the_process_keep_their_head(tmp_path):
    """Creating a PolarityTrainer leaves a GRPOTrainer created before it, or after it, without our statistics."""
    before = make_trainer(GRPOTrainer, tmp_path / "before")
    make_trainer(PolarityTrainer, tmp_path / "ours")
    after = make_trainer(GRPOTrainer, tmp_path / "after")
    ids = torch.tensor([[5, 6, 7]])
    for trainer in (before, after):
        output = trainer.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True)
        assert output.entropy is not None
        assert output.mean_logits is None


@pytest.mark.parametrize(
    "method", [("papo", {"controller": "constant", "lambda_": 0.6}), ("papo", {"controller": "balance"})]
)
def test_weights_reach_the_update(tmp_path, method):
    """With λ ≠ 0 the run leaves GRPO's path, every weight is 1 ± λ, and the sign follows the polarity."""
    theirs = make_trainer(GRPOTrainer, tmp_path / "grpo", max_steps=2)
    theirs.train()
    ours = make_trainer(PolarityTrainer, tmp_path / "ours", method=method, max_steps=2)
    rollouts = recorded(ours)
    ours.train()
    assert history(ours, "grad_norm") != history(theirs, "grad_norm")
    for rollout in rollouts:
        p, lam = token_polarity(rollout.tokens), rollout.metrics["polarity/lambda"]
        assert lam != 0
        moved = p != 0
        assert moved.any()
        torch.testing.assert_close(rollout.weight[moved], (1 + lam * p.sign())[moved])


def test_balance_cancels_the_predicted_flow(tmp_path):
    trainer = make_trainer(
        PolarityTrainer, tmp_path, method=("papo", {"controller": "balance", "lambda_max": 0.99}), max_steps=3
    )
    trainer.train()
    for row in trainer.state.log_history:
        if "polarity/lambda" in row and abs(row["polarity/lambda"]) < 0.99:
            assert abs(row["polarity/predicted_entropy_change"]) < 1e-6 * row["polarity/positive_flow"] + 1e-9


@pytest.mark.parametrize(
    "method", [("papo", {"controller": "constant", "lambda_": 0.5}), ("papo", {"controller": "balance"})]
)
def test_micro_batch_size_does_not_change_the_weights(tmp_path, method):
    """One rollout batch trained in 1, 2, 4 and 8 micro-batches: the same tokens get the same weights and flows."""
    outcomes = []
    for splits in (1, 2, 4, 8):
        trainer = make_trainer(
            PolarityTrainer, tmp_path / str(splits), method=method, max_steps=1, num_generations=2,
            per_device_train_batch_size=16 // splits, gradient_accumulation_steps=splits,
        )  # fmt: skip
        rollouts = recorded(trainer)
        trainer.train()
        outcomes.append(rollouts[0])
    whole = outcomes[0]
    for split in outcomes[1:]:
        assert torch.equal(split.inputs["completion_ids"], whole.inputs["completion_ids"])
        # Products of other shapes round differently: where P is rounding noise its sign may differ.
        sure = token_polarity(whole.tokens).abs() > 1e-6
        torch.testing.assert_close(split.weight[sure], whole.weight[sure], rtol=1e-5, atol=1e-6)
        for name, value in whole.metrics.items():
            assert split.metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_lambda_is_fixed_while_a_rollout_is_reused(tmp_path):
    """Two iterations, two micro-batches: one λ a rollout, and the controller moves once a rollout."""
    trainer = make_trainer(
        PolarityTrainer, tmp_path, method=("papo", {"level": 0.1, "path": "constant"}), max_steps=8,
        num_iterations=2, per_device_train_batch_size=8, steps_per_generation=2,
    )  # fmt: skip
    lambdas = []
    local = trainer.transform.local
    trainer.transform = trainer.transform._replace(
        local=lambda tokens, state: lambdas.append(state["lambda"]) or local(tokens, state)
    )
    trainer.train()
    assert trainer.micro_steps_per_rollout == 4
    assert len(lambdas) == 8
    assert len(set(lambdas[:4])) == 1
    assert len(set(lambdas[4:])) == 1
    assert lambdas[0] != lambdas[4]
    assert trainer.method_state["controller"]["k"] == 2


def tiny_models():
    size = {
        "vocab_size": len(character_tokenizer()),
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    torch.manual_seed(0)
    yield (
        "gpt2",
        GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **no_dropout, **size)),
    )
    gemma = Gemma2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, final_logit_softcapping=2.0, **size,
    )  # fmt: skip
    yield "gemma2 with soft-capping", Gemma2ForCausalLM(gemma)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, **size}
    yield "cohere with a logit scale", CohereForCausalLM(CohereConfig(logit_scale=0.25, **shape))
    yield "granite with logits divided", GraniteForCausalLM(GraniteConfig(logits_scaling=3.0, **shape))
    yield "phi with a bias in its head", PhiForCausalLM(PhiConfig(**shape))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", tiny_models(), ids=lambda pair: pair[0])
def test_statistics_are_those_of_the_models_own_logits(tmp_path, model, dtype):
    """Whatever the architecture, what the loss saw equals token_stats of the model's logits (temperature 0.7)."""
    trainer = make_trainer(
        PolarityTrainer, tmp_path, model=model[1].float(), tokenizer=character_tokenizer(), max_steps=1,
        temperature=0.7, learning_rate=0.0, bf16=dtype == "bfloat16",
    )  # fmt: skip
    rollouts = recorded(trainer)
    trainer.train()
    (rollout,) = rollouts
    inputs = rollout.inputs
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    keep = inputs["completion_ids"].shape[1]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = trainer.model.eval()(input_ids=ids, attention_mask=attention).logits[:, -keep - 1 : -1]
    stats = token_stats(logits.float(), ids[:, -keep:], temperature=0.7)
    mask = inputs["completion_mask"].bool()
    tolerance = 1e-5 if dtype == "float32" else 3e-2  # TRL rounds the tile's product to bf16, the model its own way
    for name in ("logp", "entropy", "sensitivity"):
        ours, direct = getattr(rollout.tokens, name), getattr(stats, name)[mask]
        torch.testing.assert_close(ours, direct, rtol=tolerance, atol=tolerance, msg=name)


def test_lora_trains_with_statistics(tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(
        PolarityTrainer,
        tmp_path,
        peft_config=lora,
        max_steps=2,
        method=("papo", {"controller": "constant", "lambda_": 0.5}),
    )
    rollouts = recorded(trainer)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all("lora" in name for name in changed)
    assert (rollouts[0].weight != 1).any()


def test_gradient_checkpointing_and_autocast_keep_the_statistics_finite(tmp_path):
    trainer = make_trainer(
        PolarityTrainer, tmp_path, max_steps=2, gradient_checkpointing=True, bf16=True, num_iterations=2,
        per_device_train_batch_size=8, gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer.train()
    rows = [row for row in trainer.state.log_history if "polarity/entropy" in row]
    assert rows
    assert all(row["polarity/nonfinite_tokens"] == 0 and math.isfinite(row["loss"]) for row in rows)


def test_the_plain_loop_and_the_trainer_agree(tmp_path):
    """Same batch: the example's loss and gradient are the trainer's, token weights included."""
    trainer = make_trainer(
        PolarityTrainer,
        tmp_path,
        max_steps=1,
        learning_rate=0.0,
        method=("papo", {"controller": "constant", "lambda_": 0.5}),
    )
    rollouts = recorded(trainer)
    grads = {}
    step = trainer.training_step

    def keep_gradients(model, *args):
        loss = step(model, *args)
        grads.update({n: p.grad.clone() for n, p in model.named_parameters()})
        return loss

    trainer.training_step = keep_gradients
    trainer.train()
    inputs = rollouts[0].inputs

    model = AutoModelForCausalLM.from_pretrained(
        Path(__file__).parents[2] / "src/entropy_polarity/policy/weights/countdown", dtype=torch.float32
    )
    batch = {
        "ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        "prompt_mask": inputs["prompt_mask"],
        "mask": inputs["completion_mask"].bool(),
        "rewards": rollouts[0].tokens.reward,
    }
    advantages = loop.group_advantages(batch["rewards"], group=4)
    torch.testing.assert_close(advantages[rollouts[0].tokens.response], rollouts[0].tokens.advantages)
    tokens = loop.tokens_of(model, batch, advantages)
    weighted, _, _ = trainer.transform.update(tokens.detach(), trainer.transform.init())
    loss = loop.policy_loss(replace(tokens, advantages=weighted.advantages))
    loss.backward()
    assert loss.item() == pytest.approx(history(trainer, "loss")[0][0], abs=5e-5)  # the log rounds to four digits
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-3, atol=1e-5 * float(grads[name].abs().max()) + 1e-8)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level='token'"),
        ({"method": "pappo"}, "did you mean 'papo'"),
        ({"method_settings": {"gian": 1}}, "did you mean 'gain'"),
        ({"method_settings": {"lambda_max": 1.0}}, "lambda_max"),
        ({"statistics_head": "liger"}, "expected 'fused' or 'trl'"),
    ],
)
def test_refused_settings_say_what_to_do(tmp_path, settings, said):
    with pytest.raises(ValueError, match=said):
        PolarityConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, **settings)


def test_an_untested_trl_is_refused(monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.raises(ImportError, match=r"pip install 'trl>=1\.16,<1\.17'"):
        check_trl()


def test_a_changed_seam_is_refused(monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, net, batch: None)
    with pytest.raises(ImportError, match="_compute_loss has no parameter"):
        check_trl()


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo", "vespo"])
def test_importance_is_the_derivative_of_trls_own_loss(tmp_path, loss_type):
    """w = -(d loss / d log p) / A for every loss type of TRL, with ratios on both sides of the clip."""
    trainer = make_trainer(PolarityTrainer, tmp_path, loss_type=loss_type, max_steps=1, learning_rate=0.0)
    rollouts = recorded(trainer)
    trainer.train()
    inputs = dict(rollouts[0].inputs)
    shape = inputs["completion_ids"].shape
    generator = torch.Generator().manual_seed(0)
    of_tokens = rollouts[0].tokens
    logp = of_tokens.unpack(of_tokens.logp, shape, -1.0).double().requires_grad_()
    inputs["old_per_token_logps"] = logp.detach() + 0.4 * torch.randn(shape, generator=generator)
    inputs["advantages"] = torch.randn(shape[0], generator=generator).double()
    mask = inputs["completion_mask"].bool()
    zeros = torch.zeros(shape)

    tokens = trainer._tokens(inputs, logp.detach(), zeros, zeros)
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (logp, zeros, None)
    GRPOTrainer._compute_loss(trainer, trainer.model, inputs).backward()
    expected = -logp.grad[mask] / tokens.advantages
    got = tokens.importance.double()
    # Each loss has a normaliser of its own (a constant, or one a row): compare within rows.
    row = tokens.response
    for b in range(shape[0]):
        e, g = expected[row == b], got[row == b]
        assert ((e == 0) == (g == 0)).all()
        if (g != 0).any():
            scale = (e[g != 0] / g[g != 0]).median()
            torch.testing.assert_close(e, g * scale, rtol=1e-4, atol=1e-8)


def test_the_trained_model_loads_and_the_state_is_in_the_checkpoint(tmp_path):
    trainer = make_trainer(PolarityTrainer, tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    saved = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    assert saved["state"] == {"entropy": trainer.monitor.entropy, "inner": trainer.method_state}
    assert saved["resumable"] is True
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("1 2=3:")["input_ids"]) == "1 2=3:"
    for a, b in zip(model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_checkpoints_wait_for_the_end_of_the_rollout(tmp_path):
    """save_steps=3 with four steps a rollout: the saves due at 3 and 6 fall on 4 and 8."""
    trainer = make_trainer(
        PolarityTrainer, tmp_path, max_steps=8, num_iterations=2, per_device_train_batch_size=8,
        steps_per_generation=2, save_strategy="steps", save_steps=3,
    )  # fmt: skip
    trainer.train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]


@pytest.mark.parametrize("controller", ["trend", "balance"])
def test_a_resumed_run_follows_the_same_path(tmp_path, controller):
    """Steps 5 to 8 after resuming from step 4 are those of the run that was never stopped, to the last bit."""
    settings = {
        "method": ("papo", {"controller": controller}), "max_steps": 8, "num_iterations": 2, "save_strategy": "steps",
        "save_steps": 4, "shuffle_dataset": False,
    }  # fmt: skip
    straight = make_trainer(PolarityTrainer, tmp_path, **settings)
    straight.train()
    resumed = make_trainer(PolarityTrainer, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    names = ("step", "loss", "grad_norm", "entropy")
    assert history(resumed, *names) == history(straight, *names)
    assert resumed.checkpoint_state == straight.checkpoint_state
    for a, b in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_checkpoints_that_cannot_be_resumed_say_why(tmp_path):
    trainer = make_trainer(PolarityTrainer, tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    other = make_trainer(PolarityTrainer, tmp_path / "other", max_steps=4, method=("grpo", {}))
    with pytest.raises(ValueError, match="with method 'papo', not 'grpo'"):
        other.train(resume_from_checkpoint=str(folder))
    again = make_trainer(PolarityTrainer, tmp_path / "again", max_steps=4)
    for name in ("optimizer.pt", "model.safetensors"):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"{name} is missing; no other checkpoint beside it is whole"):
            again.train(resume_from_checkpoint=str(folder))
        (folder / name).write_bytes(kept)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        again.train(resume_from_checkpoint=str(tmp_path / "nothing"))
    (folder / STATE_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=STATE_FILE):
        again.train(resume_from_checkpoint=str(folder))
