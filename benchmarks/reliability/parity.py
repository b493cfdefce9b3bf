"""Is PolarityTrainer GRPOTrainer where it changes nothing? Weights, losses and metrics, to the last bit.

    nice python benchmarks/reliability/parity.py [--only NAME ...] [--output FILE]

Every configuration below trains the embedded policy a few tiny steps three times: with TRL's GRPOTrainer, with
PolarityTrainer and method "grpo", and with PAPO at λ = 0, both with TRL's head; under losses of whole sequences, where
PAPO is refused, with "entropy_bonus" and a coefficient of 0 in its place. Held: the same weights, and in every line of
the log all of TRL's values but those of the clock. About ten minutes on a busy core.
"""

import argparse
import asyncio
import copy
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from entropy_polarity.policy import resolve_model
from entropy_polarity.support.provenance import environment
from entropy_polarity.tasks.countdown import Countdown
from entropy_polarity.trainers.trl import PolarityConfig, PolarityTrainer

OUTPUT = Path(__file__).parents[1] / "results/reliability-parity.json"
TASK = Countdown(numbers=(3,))
PROBLEMS = [TASK.problem(0, index, "train") for index in range(64)]
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
SMALL = {
    "per_device_train_batch_size": 16, "num_generations": 4, "max_completion_length": 12, "max_steps": 3,
    "learning_rate": 1e-3, "logging_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False,
    "save_strategy": "no", "disable_tqdm": True, "seed": 0, "gradient_checkpointing": False,
}  # fmt: skip
REUSED = {"num_iterations": 2, "per_device_train_batch_size": 8, "steps_per_generation": 2, "max_steps": 4}
CLOCK = ("step_time", "runtime", "per_second")
Rewards = list[float | None]


def verified(completions, problem, **_) -> Rewards:
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [TASK.score(PROBLEMS[i], text).reward for i, text in zip(problem, texts, strict=True)]


def digits(completions, **_) -> Rewards:
    return [len([c for c in str(completion) if c.isdigit()]) / 8 for completion in completions]


def sometimes(completions, **_) -> Rewards:
    return [None if "*" in str(completion) else 1.0 for completion in completions]


def never(completions, **_) -> Rewards:
    return [None] * len(completions)


async def awaited(completions, **_) -> Rewards:
    await asyncio.sleep(0)
    return [float("+" in str(completion)) for completion in completions]


def of_prompts(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """A rollout function: every prompt is answered with its own first tokens; the second is not the policy's."""
    ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    answers = [[*row[: 3 + i % 4], 1] for i, row in enumerate(ids)]
    masks = [[1, 0, *[1] * (len(answer) - 2)] for answer in answers]
    return {"prompt_ids": ids, "completion_ids": answers, "logprobs": None, "env_mask": masks}


@dataclass
class Configuration:
    """`settings` of GRPOConfig; `arguments` of the trainer, made anew for each; `model` by default the embedded one."""

    settings: dict[str, Any] = field(default_factory=dict)
    arguments: Callable[[], dict[str, Any]] = dict
    model: Callable[[], Any] | None = None
    chat: bool = False
    data: Callable[[Dataset], Any] = lambda data: data
    by_place: bool = False
    reward: Any = verified


def dropping() -> Any:
    """A tiny GPT-2 that has dropout: the random state of the training itself is looked at."""
    torch.manual_seed(0)
    size = {"vocab_size": 21, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **size))


def lora() -> dict[str, Any]:
    return {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)}


def adapted() -> Any:
    return get_peft_model(embedded(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))


def embedded() -> Any:
    return AutoModelForCausalLM.from_pretrained(resolve_model("embedded"), dtype=torch.float32)


def half() -> Any:
    return AutoModelForCausalLM.from_pretrained(resolve_model("embedded"), dtype=torch.bfloat16)


def held_out() -> dict[str, Any]:
    rows = {"prompt": [p.prompt for p in PROBLEMS[:8]], "problem": list(range(8))}
    return {"eval_dataset": Dataset.from_dict(rows)}


LOSSES = ("dapo", "grpo", "bnpo", "dr_grpo", "luspo", "cispo", "sapo", "vespo")
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8}
CONFIGURATIONS: dict[str, Configuration] = {
    **{f"loss {name}": Configuration({"loss_type": name}) for name in LOSSES},
    **{f"loss {name}, reused": Configuration(REUSED | {"loss_type": name, "epsilon": 0.02}) for name in LOSSES},
    **{
        f"sequences, loss {name}": Configuration(
            REUSED | {"loss_type": name, "importance_sampling_level": "sequence", "epsilon": 1e-3}
        )
        for name in LOSSES
        if name != "vespo"
    },
    "sequences, β": Configuration(REUSED | {"importance_sampling_level": "sequence", "beta": 0.1, "loss_type": "grpo"}),
    "β": Configuration({"beta": 0.1}),
    "β, reused, corrected": Configuration(REUSED | {"beta": 0.1, "use_bias_correction_kl": True}),
    "β, synchronised": Configuration({"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1}),
    "accumulated": Configuration({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}),
    "accumulated, several a rollout": Configuration(
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4, "max_steps": 4}
    ),
    "accumulated over rollouts": Configuration(
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "steps_per_generation": 1}
    ),
    "three iterations": Configuration({"num_iterations": 3, "max_steps": 6}),
    "scale none": Configuration({"scale_rewards": "none"}),
    "scale batch": Configuration({"scale_rewards": "batch"}),
    "truncated masked": Configuration({"mask_truncated_completions": True, "max_completion_length": 7}),
    "all truncated": Configuration({"mask_truncated_completions": True, "max_completion_length": 1}),
    "ε high": Configuration(REUSED | {"epsilon": 0.01, "epsilon_high": 0.28}),
    "δ": Configuration(REUSED | {"delta": 1.02, "epsilon": 0.01}),
    "top entropy": Configuration({"top_entropy_quantile": 0.2}),
    "entropy bonus": Configuration(REUSED | {"entropy_coef": 0.01}),
    "adaptive entropy": Configuration({"use_adaptive_entropy": True, "entropy_target": 0.8, "max_steps": 4}),
    "off-policy mask": Configuration(REUSED | {"off_policy_mask_threshold": 1e-4}),
    "several rewards": Configuration({"reward_weights": [1.0, 0.25]}, reward=[verified, digits]),
    "several rewards, each normalised": Configuration(
        {"reward_weights": [1.0, 0.25], "multi_objective_aggregation": "normalize_then_sum"}, reward=[verified, digits]
    ),
    "a reward that is sometimes none": Configuration(reward=[sometimes, verified]),
    "a reward that is always none": Configuration(reward=never),
    "a reward that is awaited": Configuration(reward=[awaited, verified]),
    "evaluated": Configuration(EVALUATED, held_out),
    "evaluated, groups of two": Configuration(EVALUATED | {"num_generations_eval": 2}, held_out),
    "evaluated, groups of one": Configuration(EVALUATED | {"num_generations_eval": 1}, held_out),
    "evaluated, β, reused": Configuration(EVALUATED | REUSED | {"beta": 0.1}, held_out),
    "temperature": Configuration({"temperature": 0.7}),
    "sampling cut": Configuration({"top_p": 0.9, "top_k": 5, "min_p": 0.01, "repetition_penalty": 1.1}),
    "prompts as messages": Configuration(chat=True),
    "LoRA": Configuration(REUSED, lora),
    "LoRA, β": Configuration({"beta": 0.1}, lora),
    "a PEFT model, β": Configuration({"beta": 0.1}, model=adapted),
    "LoRA, activations again": Configuration({"gradient_checkpointing": True}, lora),
    "activations again": Configuration(REUSED | {"gradient_checkpointing": True}),
    "bf16 autocast": Configuration({"bf16": True}),
    "bf16 weights": Configuration(REUSED, model=half),
    "head in float32": Configuration({"cast_lm_head_to_fp32": True}, model=half),
    "dropout": Configuration(REUSED, model=dropping, reward=digits),
    "dropout off": Configuration({"disable_dropout": True}, model=dropping, reward=digits),
    "SGD, cosine": Configuration(
        {"optim": "sgd", "lr_scheduler_type": "cosine", "learning_rate": 0.1, "warmup_steps": 1}
    ),
    "weight decay, no clipping": Configuration({"weight_decay": 0.1, "max_grad_norm": 0.0}),
    "pairs": Configuration({"num_generations": 2}),
    "one group": Configuration({"num_generations": 16}),
    "padded to multiples": Configuration({"pad_to_multiple_of": 8}),
    "every second step logged": Configuration({"logging_steps": 2, "max_steps": 4}),
    "not shuffled": Configuration({"shuffle_dataset": False}),
    "another seed": Configuration({"seed": 7}),
    "two epochs": Configuration({"max_steps": -1, "num_train_epochs": 2}, data=lambda data: data.select(range(8))),
    "a stream": Configuration(data=lambda data: data.to_iterable_dataset()),
    "completions logged": Configuration({"log_completions": True, "num_completions_to_print": 0}),
    "a rollout function": Configuration({"learning_rate": 1e-2}, lambda: {"rollout_func": of_prompts}, reward=digits),
    "model by name": Configuration(model=lambda: resolve_model("embedded")),
    "model by name, β": Configuration({"beta": 0.1}, model=lambda: resolve_model("embedded")),
    "arguments by place": Configuration(by_place=True),
    "saved": Configuration({"save_strategy": "steps", "save_steps": 2}),
}  # fmt: skip


def trainer_of(kind: type, how: Configuration, settings: dict[str, Any], folder: Path) -> Any:
    config = (GRPOConfig if kind is GRPOTrainer else PolarityConfig)(str(folder), **SMALL | how.settings | settings)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("embedded"))
    prompts: list[Any] = [p.prompt for p in PROBLEMS]
    if how.chat:
        tokenizer.chat_template = CHAT
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    data = how.data(Dataset.from_dict({"prompt": prompts, "problem": list(range(len(prompts)))}))
    model = embedded() if how.model is None else how.model()
    reward = copy.copy(how.reward)
    if how.by_place:
        return kind(model, reward, config, data, None, tokenizer)
    arguments = {"train_dataset": data, "processing_class": tokenizer} | how.arguments()
    return kind(model=model, reward_funcs=reward, args=config, **arguments)


class Training(NamedTuple):
    """Weights and log of a training, and whether a weight moved."""

    weights: dict[str, torch.Tensor]
    log: list[dict[str, Any]]
    moved: bool


def trained(kind: type, how: Configuration, settings: dict[str, Any]) -> Training:
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        trainer = trainer_of(kind, how, settings, Path(folder))
        trainer.remove_callback(PrinterCallback)
        start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        moved = any(not torch.equal(weight, start[name]) for name, weight in weights.items())
        return Training(weights, trainer.state.log_history, moved)


def differences(ours: Training, theirs: Training) -> list[str]:
    """What is not equal to the last bit."""
    found = [name for name, weight in theirs.weights.items() if not torch.equal(ours.weights[name], weight)]
    found += ["the names of the weights"] * (ours.weights.keys() != theirs.weights.keys())
    if len(ours.log) != len(theirs.log):
        return [*found, f"{len(ours.log)} lines of the log for {len(theirs.log)}"]
    for row, expected in zip(ours.log, theirs.log, strict=True):
        for name, value in expected.items():
            mine = row.get(name, "absent")
            both_nan = mine != mine and value != value
            if mine != value and not both_nan and not any(sign in name for sign in CLOCK):
                found.append(f"{name} of step {row.get('step')}: {mine} for {value}")
    return found


def neutral(how: Configuration) -> dict[str, dict[str, Any]]:
    """The ways to change nothing."""
    ways: dict[str, dict[str, Any]] = {"grpo": {"method": "grpo"}}
    if how.settings.get("importance_sampling_level") == "sequence":
        return ways | {"entropy_bonus 0": {"method": "entropy_bonus", "method_settings": {"coefficient": 0.0}}}
    settings = {"controller": "constant", "lambda_": 0.0}
    return ways | {"papo λ = 0": {"method": "papo", "method_settings": settings}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(CONFIGURATIONS))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)

    parts: dict[str, dict[str, Any]] = {}
    failures: list[str] = []
    for name in arguments.only:
        how, start = CONFIGURATIONS[name], time.monotonic()
        theirs = trained(GRPOTrainer, how, {})
        ways = {way: trained(PolarityTrainer, how, s | {"statistics_head": "trl"}) for way, s in neutral(how).items()}
        found = {way: differences(ours, theirs) for way, ours in ways.items()}
        failures += [f"{name}, {way}: {'; '.join(told[:5])}" for way, told in found.items() if told]
        held = sum(not told for told in found.values())
        polarity = sum("polarity/entropy" in row for row in ways["grpo"].log)
        parts[name] = {"tried": len(found), "held": held, "moved": theirs.moved, "rows_with_polarity": polarity}
        print(f"{name}: {held} of {len(found)}, {time.monotonic() - start:.1f} s", flush=True)
    told = environment(0)
    del told["command"]
    document = {
        "benchmark": "reliability-parity",
        "environment": told,
        "tried": sum(part["tried"] for part in parts.values()),
        "held": sum(part["held"] for part in parts.values()),
        "configurations": len(parts),
        "configurations_whose_weights_moved": sum(part["moved"] for part in parts.values()),
        "parts": parts,
        "failures": failures,
    }
    arguments.output.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{document['held']} of {document['tried']} in {len(parts)} configurations", *failures, sep="\n")


if __name__ == "__main__":
    main()
