"""Weights that are not the model's: refused in one line wherever a model is loaded, and nothing whole is."""

import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_trl import PROBLEMS, judge, make_trainer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import GRPOTrainer
from trl.trainer import grpo_trainer

from entropy_polarity.experiments.evaluate import Settings, evaluate_models
from entropy_polarity.experiments.training import train
from entropy_polarity.generation.vllm import VllmGenerator
from entropy_polarity.policy.loading import load_policy
from entropy_polarity.policy.tokenizer import character_tokenizer
from entropy_polarity.runs.recipe import load_recipe
from entropy_polarity.support.weights import check_loaded, load_whole
from entropy_polarity.trainers.trl import PolarityConfig, PolarityTrainer

WEIGHTS = "model.safetensors"
NORM = "model.norm.weight"
Weights = dict[str, torch.Tensor]
LAYER = "11 missing in the file, which would be random (model.layers.3.input_layernorm.weight, model.layers.3.mlp."


def without_a_layer(weights: Weights) -> Weights:
    return {name: weight for name, weight in weights.items() if "layers.3." not in name}


FAULTS = {
    "a layer is missing": (without_a_layer, LAYER),
    "other names": (
        lambda weights: {f"transformer.{name}": weight for name, weight in weights.items()},
        "47 missing in the file, which would be random (lm_head.weight, model.embed_tokens.weight, ...); 46 in the "
        "file and nowhere in the model (transformer.model.embed_tokens.weight, ",
    ),
    "one too many": (lambda w: w | {"model.layers.4.a": torch.zeros(2)}, "1 in the file and nowhere in the model"),
    "another shape": (
        lambda weights: weights | {NORM: torch.zeros(3)},
        f"1 of another shape ({NORM} has [3] where [128] fits)",
    ),
    "an untied head": (
        lambda weights: weights | {"lm_head.weight": torch.zeros(3, 128)},
        "(lm_head.weight has [3, 128] where [21, 128] fits)",
    ),
}
HARMLESS = {
    "as they are": lambda weights: weights,
    "the tied head twice": lambda weights: weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()},
    "a buffer": lambda weights: weights | {"model.rotary_emb.inv_freq": torch.ones(16)},
}


@pytest.fixture
def changed(tmp_path, embedded) -> Callable[..., str]:
    """The embedded policy in a folder, its weights changed."""

    def changed(change: Callable[[Weights], Weights], folder: str = "model") -> str:
        shutil.copytree(embedded, tmp_path / folder)
        save_file(change(load_file(Path(embedded) / WEIGHTS)), tmp_path / folder / WEIGHTS, metadata={"format": "pt"})
        return str(tmp_path / folder)

    return changed


@pytest.mark.parametrize(("change", "told"), FAULTS.values(), ids=FAULTS)
def test_weights_that_do_not_fit_are_one_line(changed, change, told):
    model = changed(change)
    with pytest.raises(ValueError, match=r"the weights in .* are not those of the model in its config\.json") as error:
        load_policy(model)
    assert model in str(error.value)
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_tied_weights_and_buffers_are_no_fault(changed, change, embedded):
    loaded, expected = load_policy(changed(change))[0].state_dict(), load_policy(embedded)[0].state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in expected.items())


def test_names_out_of_a_file_are_cut():
    found = {"missing_keys": set(), "unexpected_keys": {"x" * 10_000}, "mismatched_keys": set()}
    with pytest.raises(ValueError, match="1 in the file and nowhere") as error:
        check_loaded("folder", found)
    assert len(str(error.value)) < 300


def test_commands_refuse_them_before_they_compute(changed, tmp_path):
    model = changed(without_a_layer)
    with pytest.raises(ValueError, match="11 missing in the file"):
        evaluate_models([model], Settings(problems=2, samples=1))
    with pytest.raises(ValueError, match="11 missing in the file"):
        train(load_recipe("countdown", [f"policy.model={model}"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_vllm_is_not_started_with_them(changed, monkeypatch):
    def engine(**settings):
        raise AssertionError("the engine was started")

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=engine, SamplingParams=None))
    with pytest.raises(ValueError, match="11 missing in the file"):
        VllmGenerator(changed(without_a_layer))


def trained(folder, model, reward=judge, **settings):
    """A PolarityTrainer that loads by name."""
    config = PolarityConfig(
        str(folder), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=8, **settings
    )
    data = Dataset.from_dict({"prompt": [p.prompt for p in PROBLEMS], "problem": list(range(64))})
    return PolarityTrainer(model, reward, config, data)


def test_a_trainer_that_loads_by_name_refuses_them(changed, tmp_path, embedded):
    broken = changed(without_a_layer)
    with pytest.raises(ValueError, match="11 missing in the file"):
        trained(tmp_path, broken)
    trainer = trained(tmp_path, embedded)
    assert torch.equal(trainer.model.model.norm.weight, load_policy(embedded)[0].model.norm.weight)
    lenient = {"ignore_mismatched_sizes": True}  # a user's own word
    trained(tmp_path, changed(FAULTS["another shape"][0], "other"), model_init_kwargs=lenient)


def test_so_do_its_reference_and_its_reward_model(changed, tmp_path, embedded):
    broken = changed(without_a_layer)
    policy = load_policy(embedded)[0]
    policy.config._name_or_path = broken  # where TRL loads the reference from
    with pytest.raises(ValueError, match="11 missing in the file"):
        make_trainer(PolarityTrainer, tmp_path, model=policy, beta=0.1)
    with pytest.raises(ValueError, match=r"1 missing in the file, which would be random \(score.weight\)"):
        trained(tmp_path, embedded, reward=[judge, embedded])
    scorer = AutoModelForSequenceClassification.from_pretrained(embedded, num_labels=1)
    scorer.save_pretrained(tmp_path / "scorer")
    character_tokenizer().save_pretrained(tmp_path / "scorer")
    assert len(trained(tmp_path, embedded, reward=[judge, str(tmp_path / "scorer")]).reward_funcs) == 2


def test_what_trl_loads_for_others_is_its_own_affair(changed, tmp_path):
    before = grpo_trainer.create_model_from_path, grpo_trainer.AutoModelForSequenceClassification
    with pytest.raises(ValueError, match="11 missing"):
        trained(tmp_path, model := changed(without_a_layer))
    assert (grpo_trainer.create_model_from_path, grpo_trainer.AutoModelForSequenceClassification) == before
    make_trainer(GRPOTrainer, tmp_path, model=model, tokenizer=AutoTokenizer.from_pretrained(model))


def test_an_adapter_is_looked_at_with_what_is_below_it(changed, tmp_path):
    base, adapter = Path(changed(dict)), tmp_path / "adapter"
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    policy.save_pretrained(adapter)
    load = partial(load_whole, AutoModelForCausalLM.from_pretrained, adapter)
    assert load().model.layers[0].self_attn.q_proj.lora_A
    whole = load_file(base / WEIGHTS)
    save_file(without_a_layer(whole), base / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="11 missing in the file"):
        load()
    save_file(whole, base / WEIGHTS, metadata={"format": "pt"})
    file = adapter / "adapter_model.safetensors"
    fewer = {name: weight for name, weight in load_file(file).items() if "layers.2." not in name}
    save_file(fewer, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"2 missing in the file.*lora_A"):
        load()


def test_a_trainer_takes_an_adapter_of_its_own(tmp_path, embedded):
    config = PolarityConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=8)
    data = Dataset.from_dict({"prompt": ["1 2=3:"] * 8, "problem": [0] * 8})
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    trainer = PolarityTrainer(embedded, judge, config, data, peft_config=lora)
    assert trainer.model.peft_config["default"].r == 2
