"""Make an embedded policy again, from a seed: supervised steps on demonstrations, nothing else.

The policy should be good enough that reinforcement finds rewards, and uncertain enough that there is entropy to
lose. A few hundred steps on imperfect demonstrations give exactly that.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from entropy_polarity.policy.demonstrations import Source, source_of
from entropy_polarity.policy.tokenizer import CHARACTERS, LENGTHS, character_tokenizer, phrase_tokenizer
from entropy_polarity.support.files import new_folder

LOOKED_AT = 500  # demonstrations from which phrases are learned


@dataclass(frozen=True)
class PretrainSettings:
    """What is read, width, depth and length of the supervised run. The defaults made the shipped weights.

    `task` is "countdown"; "guess" or "keydoor", played by a program; or "gym:DATASET", problems with their answers.
    `numbers` are countdown's, `config` is the data set's; `steps` by default the task's own.
    """

    task: str = "countdown"
    seed: int = 0
    steps: int | None = None
    learning_rate: float = 2e-3
    numbers: tuple[int, ...] = (3, 4)
    config: dict[str, Any] = field(default_factory=dict)
    layers: int = 4
    width: int = 128

    def __post_init__(self) -> None:
        if self.width < 32 or self.width % 32:
            raise ValueError(f"width is {self.width}; expected a multiple of 32")
        for name, value in (("layers", self.layers), ("steps", self.steps)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected 1 or more")

    @property
    def family(self) -> str:
        return self.task.partition(":")[0]


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
        max_position_embeddings=LENGTHS[settings.family],
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(settings.seed)
    return Qwen3ForCausalLM(config)


def _batch(source: Source, tokenizer, seed: int, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, T) of what was said, <eos> after each part of the player, and labels of those parts alone."""
    rows, labels = [], []
    for index in range(start, start + source.batch_size):
        row, label = [], []
        for text, from_player in source.parts(seed, index):
            ids = tokenizer.encode(text) + [tokenizer.eos_token_id] * from_player
            row += ids
            label += ids if from_player else [-100] * len(ids)
        rows.append(torch.tensor(row))
        labels.append(torch.tensor(label))
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return pad(rows, padding_value=tokenizer.pad_token_id), pad(labels, padding_value=-100)


def pretrain(settings: PretrainSettings, output: Path, progress: Callable[[int, float], None]) -> None:
    """Train a new policy and write it (bf16 safetensors) with its tokenizer to `output`.

    `progress(step, loss)` is called after each step.
    """
    source = source_of(settings.task, settings.numbers, settings.config)
    steps = source.steps if settings.steps is None else settings.steps
    if settings.family in CHARACTERS:
        tokenizer = character_tokenizer(settings.family)
    else:
        tokenizer = phrase_tokenizer(part.text for index in range(LOOKED_AT) for part in source.parts(0, index))
    model = new_policy(settings, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        # torch divides by pct_start * steps - 1: a run of twenty steps must not make that 0.
        optimizer,
        settings.learning_rate,
        total_steps=steps,
        pct_start=0.05 if steps > 20 else 0.3,
    )
    for step in range(steps):
        ids, labels = _batch(source, tokenizer, settings.seed, step * source.batch_size)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress(step + 1, loss.item())
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    with new_folder(output) as folder:
        model.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
