"""Each kind of task trains other architectures, with and without a chat template, without special cases."""

import json

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from entropy_polarity.experiments.training import train
from entropy_polarity.runs.recipe import load_recipe
from entropy_polarity.runs.record import Run

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}


def printable_tokenizer(chat):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    words = ["<pad>", "<eos>", "<unk>", "\n", *map(chr, range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT if chat else None,
        clean_up_tokenization_spaces=False,
    )


def policy(folder, architecture, chat):
    tokenizer = printable_tokenizer(chat)
    torch.manual_seed(0)
    if architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SHAPE))
    else:
        soft = {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0, "sliding_window": 16, "head_dim": 16}
        model = Gemma2ForCausalLM(Gemma2Config(vocab_size=len(tokenizer), **SHAPE, **soft))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def few_steps(model, task, output, *more):
    recipe = load_recipe(
        "countdown",
        [
            f"task={task}",
            f"policy.model={model!r}",
            "trainer.max_steps=3",
            "trainer.per_device_train_batch_size=8",
            "trainer.num_generations=4",
            "trainer.max_completion_length=6",
            "trainer.use_cpu=true",
            "trainer.bf16=false",
            "evaluation.problems=2",
            "evaluation.samples=2",
            *more,
        ],
    )
    return train(recipe, output)


def math_task(tmp_path):
    pytest.importorskip("math_verify", reason="needs the extra [math]")
    rows = ({"question": f"What is {i}+0?", "answer": i % 10} for i in range(60))
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return f"{{name='math', data='{tmp_path}/sums.jsonl', max_completion_tokens=6}}"


def gym_task(tmp_path):
    pytest.importorskip("reasoning_gym", reason="needs the extra [gym]")
    return "{name='gym:chain_sum', config={min_terms=2, max_terms=2}, max_completion_tokens=6}"


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
@pytest.mark.parametrize("architecture", ["llama", "gemma"])
@pytest.mark.parametrize("task", [math_task, gym_task])
def test_a_few_steps(task, architecture, chat, tmp_path):
    model = policy(tmp_path / "model", architecture, chat)
    summary = few_steps(model, task(tmp_path), tmp_path / "run")
    assert summary["status"] == "finished"
    run = Run.read(tmp_path / "run")
    _, entropy = run.series("polarity/entropy")
    assert len(entropy) == 2  # of two rollouts, with two updates each
    shares = [row for row in run.metrics if any(name.startswith("verdict/") for name in row)]
    assert shares, "verdicts are counted"
    for row in shares:
        assert sum(value for name, value in row.items() if name.startswith("verdict/")) == pytest.approx(1)
    prompt = run.rollouts[0]["prompt"]
    assert ("Reason step by step" in prompt) == (task is math_task), "the record shows what was asked"
