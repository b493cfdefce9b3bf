"""Sampling: what top-p leaves, batches that halve when memory runs out, and vLLM as a fake module sees us call it."""

import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from transformers import LlamaConfig

from entropy_polarity.generation import GREEDY, Sampling, memory
from entropy_polarity.generation.episodes import _sampled
from entropy_polarity.generation.memory import bytes_per_sequence, first_size, in_batches, is_out_of_memory
from entropy_polarity.generation.sampling import TransformersGenerator
from entropy_polarity.generation.vllm import VllmGenerator, prompt_seed
from entropy_polarity.policy.loading import load_policy
from entropy_polarity.tasks.prompts import encoded

PROMPTS = ["1 2 3=6:", "4 5 6 1=99:", "9 9 9=81:"]


class Small:
    """A device that holds `fits` items at a time; it draws before it fails, as a real one does."""

    def __init__(self, fits, error=torch.OutOfMemoryError):
        self.fits, self.error, self.tried = fits, error, []

    def run(self, batch):
        self.tried.append(len(batch))
        drawn = torch.rand(len(batch))
        if len(batch) > self.fits:
            raise self.error("CUDA out of memory. Tried to allocate 2 GiB")
        return list(zip(batch, drawn.tolist(), strict=True))


def test_a_batch_that_does_not_fit_is_halved_until_it_does():
    device = Small(fits=3)
    made, sizes = in_batches(range(10), 16, device.run)
    assert [item for item, _ in made] == list(range(10))
    assert sizes == [16, 8, 4, 2]
    assert device.tried == [10, 8, 4, 2, 2, 2, 2, 2]


def test_what_failed_leaves_no_trace_in_the_random_stream():
    torch.manual_seed(3)
    halved, sizes = in_batches(range(10), 4, Small(fits=2).run)
    torch.manual_seed(3)
    assert in_batches(range(10), sizes[-1], Small(fits=10).run)[0] == halved


def test_a_single_item_that_does_not_fit_is_one_clear_line():
    with pytest.raises(ValueError, match="out of memory with a batch of one: a smaller model, fewer tokens"):
        in_batches(range(3), 4, Small(fits=0).run)


def test_only_errors_of_memory_are_taken_for_such():
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
    )
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory is what this text is about"))
    with pytest.raises(RuntimeError, match="a bug"):
        in_batches([1], 4, Small(0, lambda _: RuntimeError("a bug")).run)


def test_the_first_size_follows_memory_and_model(monkeypatch):
    config = LlamaConfig(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1, hidden_size=32, vocab_size=100
    )
    # 2 · 2 layers · 1 head · 8 wide · 4 bytes = 128 a token, and 16 bytes for each of 100 words
    assert bytes_per_sequence(config, tokens=10, itemsize=4) == 1280 + 1600
    model = SimpleNamespace(config=config, device=torch.device("cpu"), dtype=torch.float32)
    for free, expected in ((10**9, 512), (2 * 2880 * 512, 512), (2 * 2880 * 512 - 1, 256), (2 * 2880, 1), (0, 1)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        assert first_size(model, tokens=10, largest=512) == expected
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    assert first_size(model, tokens=10**9, largest=512) == 512  # nobody knows: halving will tell
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    assert first_size(SimpleNamespace(), tokens=10, largest=512) == 512


def test_free_memory_of_this_machine_is_found():
    assert memory.free_bytes(torch.device("cpu")) > 2**20
    assert memory.free_bytes(torch.device("meta")) is None


def ids_of(tokenizer):
    return [encoded(prompt, tokenizer) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def policy():
    return load_policy("embedded")


def test_a_seed_and_a_batch_size_give_the_same_texts_again(policy):
    model, tokenizer = policy

    def made(seed, **size):
        return TransformersGenerator(model, tokenizer, **size).complete(ids_of(tokenizer), 4, 16, Sampling(), seed)

    before = torch.get_rng_state()
    assert made(0) == made(0, batch_size=512)
    assert made(0, batch_size=5) == made(0, batch_size=5)
    assert made(0) != made(1)
    end = tokenizer.eos_token_id
    assert all(end not in completion[:-1] for row in made(0) for completion in row), "nothing stands after the end"
    assert any(completion[-1] == end for row in made(0) for completion in row)
    assert torch.get_rng_state().equal(before)


def test_the_likeliest_completion_does_not_depend_on_the_batch(policy):
    model, tokenizer = policy
    one, all_of_them = (TransformersGenerator(model, tokenizer, size) for size in (1, 512))
    found = all_of_them.complete(ids_of(tokenizer), 1, 16, GREEDY, seed=0)
    assert one.complete(ids_of(tokenizer), 1, 16, GREEDY, seed=5) == found
    assert all_of_them.complete(ids_of(tokenizer), 1, 16, Sampling(top_p=1e-6), seed=0) == found  # nothing else is left


def test_a_generator_remembers_what_fits(policy, monkeypatch):
    model, tokenizer = policy
    generate = type(model).generate
    asked = []

    def short_of_memory(self, input_ids, **settings):
        asked.append(len(input_ids))
        if len(input_ids) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate(self, input_ids=input_ids, **settings)

    monkeypatch.setattr(type(model), "generate", short_of_memory)
    generator = TransformersGenerator(model, tokenizer, batch_size=8)
    sampled = generator.complete(ids_of(tokenizer), 4, 16, Sampling(), seed=0)
    generator.complete(ids_of(tokenizer), 1, 16, GREEDY, seed=0)
    assert asked == [8, 4, 4, 4, 3]
    assert generator.batch_sizes == [8, 4]
    monkeypatch.undo()
    assert TransformersGenerator(model, tokenizer, 4).complete(ids_of(tokenizer), 4, 16, Sampling(), seed=0) == sampled


def test_top_p_of_episodes_leaves_the_likeliest_tokens():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(2000, 1)
    torch.manual_seed(0)

    def seen(top_p):
        return sorted(set(_sampled(p, 1.0, top_p).tolist()))

    assert seen(1.0) == [0, 1, 2, 3]
    assert seen(0.9) == [0, 1, 2]  # 0.5 + 0.3 is too little, 0.95 is enough
    assert seen(0.79) == [0, 1]
    assert seen(0.5) == [0]
    assert seen(1e-9) == [0]


class FakeEngine:
    """What this project uses of vLLM's LLM: n completions a request, as token ids, seeded one by one."""

    made: ClassVar[list] = []

    def __init__(self, **settings):
        self.settings, self.requests = settings, []
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=64))
        FakeEngine.made.append(self)

    def get_tokenizer(self):
        return load_policy("embedded")[1]

    def generate(self, prompts, parameters, use_tqdm):
        assert use_tqdm is True  # its own bar
        self.requests += zip(prompts, parameters, strict=True)
        tokenizer = self.get_tokenizer()

        def completion(parameter, index):
            ids = tokenizer(str((parameter.seed + index) % 1000))["input_ids"]
            return SimpleNamespace(token_ids=(*ids, tokenizer.eos_token_id))

        return [SimpleNamespace(outputs=[completion(p, i) for i in range(p.n)]) for p in parameters]


@pytest.fixture
def fake_vllm(monkeypatch):
    FakeEngine.made.clear()
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=FakeEngine, SamplingParams=SimpleNamespace))


def test_vllm_is_asked_with_the_same_ids_and_a_seed_for_every_prompt(fake_vllm, embedded, policy):
    generator, (_, tokenizer) = VllmGenerator(embedded), policy
    made = generator.complete(ids_of(tokenizer), 3, 16, Sampling(0.7, 0.9), seed=5)
    assert generator.context == 64
    (engine,) = FakeEngine.made
    assert engine.settings == {"model": embedded, "trust_remote_code": False, "load_format": "safetensors"}
    assert [asked["prompt_token_ids"] for asked, _ in engine.requests] == [tokenizer(p)["input_ids"] for p in PROMPTS]
    seeds = [parameters.seed for _, parameters in engine.requests]
    assert seeds == [prompt_seed(5, number) for number in range(3)]
    assert vars(engine.requests[0][1]) == {
        "n": 3, "temperature": 0.7, "top_p": 0.9, "max_tokens": 16, "seed": seeds[0], "detokenize": False,
    }  # fmt: skip
    texts = [tokenizer.batch_decode(row, skip_special_tokens=True) for row in made]
    assert texts == [[str((seed + i) % 1000) for i in range(3)] for seed in seeds]
    assert all(completion[-1] == tokenizer.eos_token_id for row in made for completion in row)
    assert len({prompt_seed(seed, number) for seed in range(5) for number in range(500)}) == 2500


def test_without_vllm_one_line_says_what_to_install(monkeypatch, embedded):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install 'entropy-polarity\[vllm\]', or --backend transformers"):
        VllmGenerator(embedded)
