"""Make the embedded policy again, from a seed: supervised steps on solved problems, nothing else.

The policy should have room on both sides: good enough that reinforcement finds rewards, uncertain enough that
there is entropy to lose. A few hundred steps on random solutions give exactly that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from entropy_polarity.policy.tokenizer import character_tokenizer
from entropy_polarity.tasks.countdown import Countdown


@dataclass(frozen=True)
class PretrainSettings:
    """Width, depth and length of the supervised run. The defaults made the shipped weights."""

    seed: int = 0
    steps: int = 1200
    batch_size: int = 128
    learning_rate: float = 2e-3
    numbers: tuple[int, ...] = (3, 4)
    layers: int = 4
    width: int = 128


def new_policy(settings: PretrainSettings, tokenizer: Any) -> Qwen3ForCausalLM:
    """An untrained policy: Qwen3, tied embeddings, heads of width 32."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=3 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.width // 32,
        num_key_value_heads=settings.width // 32,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(settings.seed)
    return Qwen3ForCausalLM(config)


def _batch(task: Countdown, tokenizer, seed: int, start: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, T) of prompt + solution + <eos>, and labels with prompt and padding left out."""
    rows, labels = [], []
    for index in range(start, start + size):
        problem, solution = task.solved_problem(seed, index, "train")
        prompt = tokenizer.encode(problem.prompt)
        answer = [*tokenizer.encode(solution), tokenizer.eos_token_id]
        rows.append(torch.tensor(prompt + answer))
        labels.append(torch.tensor([-100] * len(prompt) + answer))
    pad = torch.nn.utils.rnn.pad_sequence
    return (
        pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id),
        pad(labels, batch_first=True, padding_value=-100),
    )


def pretrain(settings: PretrainSettings, output: Path, progress: Callable[[int, float], None]) -> None:
    """Train a new policy and write it (bf16 safetensors) with its tokenizer to `output`.

    `progress(step, loss)` is called after each step.
    """
    tokenizer: Any = character_tokenizer()
    model = new_policy(settings, tokenizer)
    task = Countdown(numbers=settings.numbers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        # torch divides by pct_start * steps - 1: a run of twenty steps must not make that 0.
        optimizer,
        settings.learning_rate,
        total_steps=settings.steps,
        pct_start=0.05 if settings.steps > 20 else 0.3,
    )
    for step in range(settings.steps):
        ids, labels = _batch(task, tokenizer, settings.seed, step * settings.batch_size, settings.batch_size)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress(step + 1, loss.item())
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    model.bfloat16().save_pretrained(output)
    tokenizer.save_pretrained(output)
