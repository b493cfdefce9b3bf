"""PolarityTrainer is called as GRPOTrainer is: every argument, by place and by name, and any configuration of TRL's."""

import inspect
import warnings
from dataclasses import dataclass, fields

import pytest
import torch
from datasets import Dataset
from test_trl import PROBLEMS, judge
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from entropy_polarity.policy.loading import load_policy
from entropy_polarity.trainers.trl import PolarityConfig, PolarityTrainer
from entropy_polarity.trainers.trl import config as trl_config

DATA = Dataset.from_dict({"prompt": [p.prompt for p in PROBLEMS[:16]], "problem": list(range(16))})
SMALL = {
    "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 8, "max_steps": 2, "bf16": False,
    "learning_rate": 1e-3, "logging_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no",
    "disable_tqdm": True, "gradient_checkpointing": False,
}  # fmt: skip


def length(completions, **_):
    return [len(text) / 8 for text in completions]


def test_the_signature_is_trls_own():
    assert inspect.signature(PolarityTrainer) == inspect.signature(GRPOTrainer)
    assert inspect.signature(PolarityTrainer.__init__) == inspect.signature(GRPOTrainer.__init__)


@pytest.fixture
def without_accelerator(monkeypatch):
    """PolarityConfig as a machine without GPU needs it: TRL's own defaults ask for bf16 on one."""

    @dataclass
    class OnCpu(PolarityConfig):
        use_cpu: bool = True
        bf16: bool = False
        per_device_train_batch_size: int = 8

    monkeypatch.setattr(trl_config, "PolarityConfig", OnCpu)


def test_no_configuration_is_the_default_one(without_accelerator, embedded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_name = PolarityTrainer(embedded, judge, train_dataset=DATA)
    by_place = PolarityTrainer(load_policy(embedded)[0], [judge, length], None, DATA, DATA)
    for trainer in (by_name, by_place):
        assert trainer.args.output_dir == "countdown-PAPO"
        assert (trainer.args.method, trainer.args.settings) == (PolarityConfig.method, {})
        assert trainer.train_dataset is DATA
    assert by_place.eval_dataset is DATA
    assert by_place.reward_func_names == ["judge", "length"]


def test_every_argument_has_its_place(embedded, tmp_path):
    """All of them by place: those that need what is not here (bitsandbytes, tools) are None, as is their default."""
    model, tokenizer = load_policy(embedded)
    callback = TrainerCallback()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rollout = lambda prompts, trainer: {}  # noqa: E731
    trainer = PolarityTrainer(
        model, [judge], PolarityConfig(str(tmp_path), **SMALL), DATA, {"held out": DATA}, tokenizer, [None],
        [callback], (optimizer, None), None, None, None, rollout, None,
    )  # fmt: skip
    assert trainer.eval_dataset == {"held out": DATA}
    assert trainer.processing_class is tokenizer
    assert callback in trainer.callback_handler.callbacks
    assert trainer.optimizer is optimizer
    assert trainer.rollout_func is rollout


def test_a_configuration_of_trls_keeps_its_settings(embedded, tmp_path):
    settings = SMALL | {"num_iterations": 2, "steps_per_generation": 2, "beta": 0.1, "reward_weights": [1.0, 0.5]}
    given = GRPOConfig(str(tmp_path), **settings)
    with pytest.warns(UserWarning, match="names no method: 'papo' is used"):
        config = PolarityTrainer(embedded, [judge, length], given, DATA).args
    assert isinstance(config, PolarityConfig)
    assert [getattr(config, f.name) for f in fields(GRPOConfig)] == [getattr(given, f.name) for f in fields(GRPOConfig)]
    assert vars(given).items() <= vars(config).items()
    assert given.__class__ is GRPOConfig
    as_written = PolarityConfig(str(tmp_path), **settings)
    assert (config.method, config.settings, config.statistics_head) == (
        as_written.method, as_written.settings, as_written.statistics_head
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trl_config.polarity_config(as_written, None)


def test_a_configuration_that_cannot_be_used_says_so(embedded, tmp_path):
    with pytest.raises(TypeError, match=r"takes args=PolarityConfig\(\.\.\.\), got dict"):
        PolarityTrainer(embedded, judge, {"output_dir": "out"}, DATA)
    with pytest.raises(TypeError, match="train_dat"):
        PolarityTrainer(embedded, judge, PolarityConfig(str(tmp_path), **SMALL), train_dat=DATA)
    with pytest.raises(TypeError, match="model"):
        PolarityTrainer()
    sequences = GRPOConfig(str(tmp_path), importance_sampling_level="sequence", **SMALL)
    with pytest.raises(ValueError, match="importance_sampling_level"):
        PolarityTrainer(embedded, judge, sequences, DATA)
