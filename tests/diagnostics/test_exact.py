"""Exact polarity against the gradients it stands for, on real models."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from entropy_polarity import token_stats
from entropy_polarity.diagnostics.entropy import Parameters, Sequences, entropy_gradient
from entropy_polarity.diagnostics.exact import exact_sensitivity
from entropy_polarity.policy import resolve_model
from entropy_polarity.tokens import Tokens
from entropy_polarity.trainers.trl.sequences import exact_sensitivity_of

VOCABULARY = 40
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def tiny(kind: str = "qwen", dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = {
        "qwen": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=True)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
        "gemma": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, query_pre_attn_scalar=8, final_logit_softcapping=4.0)),
    }[kind]()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 2  # states whose entropies differ
    return model.to(dtype)


def embedded(dtype: torch.dtype) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(resolve_model("embedded")).to(dtype)


def batch(rows: int = 5, width: int = 12, seed: int = 0) -> Sequences:
    """Prompts of four tokens; one response is shorter than the others."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 20, (rows, width), generator=draw)
    mask = torch.zeros(rows, width, dtype=torch.bool)
    mask[:, 4:] = True
    mask[1, 9:] = False
    return Sequences(ids, mask)


class Table(nn.Module):
    """A tabular softmax policy: logits of their own at every position, whatever was before."""

    def __init__(self, states: int = 6, actions: int = 9):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.rows = nn.Parameter(torch.randn(1, states, actions, generator=draw).double())
        self.config = Qwen3Config(vocab_size=actions)

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        return type("Output", (), {"logits": self.rows[:, : input_ids.shape[1]] + 0 * input_ids[..., None]})


def log_probs(model: Callable, sequences: Sequences, temperature: float = 1.0) -> Tensor:
    logits = model(input_ids=sequences.input_ids, attention_mask=sequences.attention_mask).logits[:, :-1]
    return (logits / temperature).log_softmax(-1)


def inner_products(model: nn.Module, sequences: Sequences, states: Sequences, temperature: float) -> tuple:
    """<grad mean H, grad mean (A log π)>, the product of their norms, and A: by two backwards of torch's own.

    A favours rare tokens, or at random both gradients would be as good as orthogonal, and zero an answer.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    logp = log_probs(model, states, temperature)
    entropy = -(logp.exp() * logp).sum(-1)[states.mask[:, 1:]].mean()
    sampled = log_probs(model, sequences, temperature).gather(-1, sequences.input_ids[:, 1:, None])[..., 0]
    advantages = nn.functional.pad(-sampled.detach(), (1, 0)) + torch.randn(
        sequences.mask.shape, generator=torch.Generator().manual_seed(1)
    )
    objective = (advantages[:, 1:] * sampled)[sequences.mask[:, 1:]].mean()
    g, b = (torch.autograd.grad(value, parameters, allow_unused=True) for value in (entropy, objective))
    pairs = [(x, y) for x, y in zip(g, b, strict=True) if x is not None and y is not None]
    size = torch.stack([torch.stack([x.norm(), y.norm()]) for x, y in pairs]).norm(dim=0).prod()
    return sum((x * y).sum() for x, y in pairs).item(), size.item(), advantages


@pytest.mark.parametrize("derivative", ["difference", "forward"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["embedded", "qwen", "llama", "gemma"])
def test_the_mean_of_a_times_t_is_the_inner_product_of_the_gradients(kind, dtype, derivative):
    model = embedded(dtype) if kind == "embedded" else tiny(kind, dtype)
    sequences, states = batch(seed=1), batch(seed=2)
    found = exact_sensitivity(model, sequences, states=states, temperature=0.8, derivative=derivative)
    inner, size, advantages = inner_products(model, sequences, states, 0.8)
    mean = (advantages * found.sensitivity)[sequences.mask].mean().item()
    bound = 2e-3 if derivative == "difference" else 1e-5  # what is asked for is 1e-2
    assert abs(mean - inner) <= min(bound * size, 0.2 * abs(inner))
    assert not found.sensitivity[~sequences.mask].any()


# Hugging Face's norms round to float32 in a float64 model as well.
CLOSE = {"rtol": 1e-4, "atol": 1e-7}


def test_one_token_at_a_time_by_its_own_gradient():
    model, sequences = tiny(), batch(rows=2)
    found = exact_sensitivity(model, sequences, derivative="forward").sensitivity
    _, gradient = entropy_gradient(model, sequences)
    logp = log_probs(model, sequences).gather(-1, sequences.input_ids[:, 1:, None])[..., 0]
    for row, place in sequences.mask.nonzero().tolist():
        own = torch.autograd.grad(logp[row, place - 1], [*model.parameters()], retain_graph=True)
        expected = sum((a * b).sum() for a, b in zip(gradient.values(), own, strict=True))
        torch.testing.assert_close(found[row, place], expected, **CLOSE)


def test_a_step_on_a_token_changes_the_mean_entropy_as_foretold():
    """The definition itself: η T* is the change of the mean entropy after a step η ∇ log π on that token."""
    model, sequences = tiny(), batch(rows=2)
    found = exact_sensitivity(model, sequences, derivative="forward")
    row, place, rate = 0, 6, 1e-5
    logp = log_probs(model, sequences)[row, place - 1, sequences.input_ids[row, place]]
    for parameter, part in zip(
        model.parameters(), torch.autograd.grad(logp, [*model.parameters()], allow_unused=True), strict=True
    ):
        parameter.data += rate * part
    after, _ = entropy_gradient(model, sequences)
    assert (after - found.entropy) / rate == pytest.approx(found.sensitivity[row, place].item(), rel=1e-2)


def test_a_tabular_policy_has_only_its_own_state():
    """Without shared parameters T* is T, over the number of states of the mean."""
    ids = torch.tensor([[0, 3, 1, 4, 1, 5]])
    mask = torch.tensor([[False, True, True, True, True, True]])
    table = Table()
    found = exact_sensitivity(table, Sequences(ids, mask), derivative="forward").sensitivity
    local = token_stats(table.rows.detach()[:, :-1], ids[:, 1:]).sensitivity
    torch.testing.assert_close(found[:, 1:], local / 5)


def test_lora_moves_the_adapters_alone():
    base = tiny()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    sequences = batch()
    found = exact_sensitivity(model, sequences)
    inner, size, advantages = inner_products(model, sequences, sequences, 1.0)
    mean = (advantages * found.sensitivity)[sequences.mask].mean().item()
    assert abs(mean - inner) <= min(1e-2 * size, 0.2 * abs(inner))
    assert all("lora" in name for name in entropy_gradient(model, sequences)[1])


def test_where_forward_mode_is_missing_a_difference_is_taken_and_said():
    """An operation of somebody's own, with a backward and nothing else."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    model, sequences = tiny(), batch()
    expected = exact_sensitivity(model, sequences).sensitivity
    model.model.norm.register_forward_hook(lambda module, inputs, output: Doubled.apply(output) / 2)
    with pytest.warns(UserWarning, match="takes a difference, which is less exact: .*jvp"):
        found = exact_sensitivity(model, sequences).sensitivity
    assert (found - expected).norm() < 0.01 * expected.norm()
    with pytest.raises(RuntimeError, match="jvp"):
        exact_sensitivity(model, sequences, derivative="forward")


def test_a_metric_is_that_of_the_step():
    model, sequences = tiny(), batch()
    weights = {name: torch.rand_like(p) + 0.5 for name, p in model.named_parameters()}

    def metric(gradient: Parameters) -> Parameters:
        return {name: weights[name] * part for name, part in gradient.items()}

    found = exact_sensitivity(model, sequences, metric=metric, derivative="forward").sensitivity
    _, gradient = entropy_gradient(model, sequences)
    sampled = log_probs(model, sequences).gather(-1, sequences.input_ids[:, 1:, None])[..., 0]
    objective = sampled[sequences.mask[:, 1:]].sum()
    own = torch.autograd.grad(objective, [*model.parameters()])
    expected = sum((g * w * b).sum() for g, w, b in zip(gradient.values(), weights.values(), own, strict=True))
    torch.testing.assert_close(found.sum(), expected)


def test_chunks_and_padding_change_nothing():
    model, sequences = tiny(), batch()
    plain = exact_sensitivity(model, sequences, derivative="forward")
    for derivative in ("forward", "difference"):
        whole, chunked = (
            exact_sensitivity(model, sequences, derivative=derivative, **k) for k in ({}, {"chunk_bytes": 1})
        )
        torch.testing.assert_close(chunked.sensitivity, whole.sensitivity, rtol=1e-3, atol=1e-6)
    ids = nn.functional.pad(sequences.input_ids, (3, 2), value=7)
    mask = nn.functional.pad(sequences.mask, (3, 2))
    padded = Sequences(ids, mask, nn.functional.pad(torch.ones_like(sequences.input_ids), (3, 2)))
    found = exact_sensitivity(model, padded, derivative="forward")
    torch.testing.assert_close(found.sensitivity[:, 3:-2], plain.sensitivity, **CLOSE)
    assert found.entropy == pytest.approx(plain.entropy)


def test_the_error_is_told():
    model, sequences = tiny(), batch()
    exact = exact_sensitivity(model, sequences, derivative="forward").sensitivity
    for step in (1e-3, 1e-2):
        found = exact_sensitivity(model, sequences, derivative="difference", step=step, estimate_error=True)
        assert found.error == pytest.approx(((found.sensitivity - exact).norm() / exact.norm()).item(), rel=0.1)


@pytest.mark.parametrize("derivative", ["difference", "forward"])
def test_nothing_is_left_changed(derivative):
    model, sequences = tiny(dtype=torch.float32), batch()
    quiet = exact_sensitivity(model, sequences, derivative=derivative)
    model.train().model.layers[0].eval()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    (log_probs(model, sequences).sum()).backward()
    before = {name: (p.detach().clone(), p.grad.clone()) for name, p in model.named_parameters()}
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    with torch.no_grad():  # as in an evaluation
        found = exact_sensitivity(model, sequences, derivative=derivative)
    torch.testing.assert_close(found.sensitivity, quiet.sensitivity, **CLOSE)  # dropout is off
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert torch.equal(parameter.grad, before[name][1])
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("derivative", ["difference", "forward"])
def test_autocast_is_left_outside(derivative):
    model, sequences = tiny(dtype=torch.float32), batch()
    expected = exact_sensitivity(model, sequences, derivative=derivative).sensitivity
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=sequences.input_ids)  # fills the cache of 16-bit weights
        found = exact_sensitivity(model, sequences, derivative=derivative).sensitivity
    assert torch.equal(found, expected)


def test_sums_do_not_depend_on_the_chunks_in_16_bits():
    model = tiny(dtype=torch.bfloat16)
    sequences = batch(rows=300)
    whole, chunked = (entropy_gradient(model, sequences, **k)[1] for k in ({}, {"chunk_bytes": 1}))
    assert {part.dtype for part in whole.values()} == {torch.float32}
    for name, part in whole.items():
        assert (chunked[name] - part).norm() < 0.02 * part.norm()


def test_learned_positions_do_not_count_padding():
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    model, sequences = GPT2LMHeadModel(GPT2Config(**shape)).double(), batch()
    padded = Sequences(*(nn.functional.pad(x, (3, 0)) for x in (*sequences[:2], torch.ones_like(sequences.input_ids))))
    plain, found = (exact_sensitivity(model, s, derivative="forward") for s in (sequences, padded))
    torch.testing.assert_close(found.sensitivity[:, 3:], plain.sensitivity, **CLOSE)


def test_where_nothing_can_move_the_answer_is_zero():
    model, sequences = tiny(dtype=torch.float32), batch()
    model.model.embed_tokens.weight.data.zero_()  # the head as well: uniform at every state, whatever the rest is
    model.requires_grad_(False).model.layers[0].mlp.up_proj.requires_grad_(True)
    found = exact_sensitivity(model, sequences)
    assert found.gradient_norm == 0
    assert not found.sensitivity.any()
    start = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"]))  # B = 0, A moves nothing yet
    assert exact_sensitivity(start, sequences).sensitivity.any()


def test_a_failure_in_the_middle_puts_the_parameters_back(monkeypatch):
    model, sequences = tiny(), batch()
    before = [p.detach().clone() for p in model.parameters()]
    passes = []

    def failing(*args, **kwargs):
        passes.append(args)
        if len(passes) == 2:  # the first of the shifted passes
            assert not torch.equal(before[0], next(model.parameters()))
            raise RuntimeError("out of memory")

    model.register_forward_hook(failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        exact_sensitivity(model, sequences, derivative="difference")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_what_cannot_be_answered_is_one_line():
    model, (ids, mask, _) = tiny(), batch()
    for sequences, told in (
        (Sequences(ids, mask[:, 1:]), r"Sequences have shapes \(5, 12\), \(5, 11\); expected one"),
        (Sequences(ids, torch.zeros_like(mask)), "must be boolean, True at one token or more"),
        (Sequences(ids, mask.long()), "must be boolean"),
        (Sequences(ids, torch.ones_like(mask)), "never at the first of a sequence"),
        (Sequences(ids, mask, torch.zeros_like(ids)), "True where attention_mask is 0"),
    ):
        with pytest.raises(ValueError, match=told):
            exact_sensitivity(model, sequences)
    with pytest.raises(ValueError, match=r"step is 0.0; expected a positive"):
        exact_sensitivity(model, batch(), step=0.0)
    with pytest.raises(ValueError, match="derivative is 'backward'; expected"):
        exact_sensitivity(model, batch(), derivative="backward")
    with pytest.raises(ValueError, match=r"parameters are torch.bfloat16, too coarse .* derivative='forward'"):
        exact_sensitivity(tiny(dtype=torch.bfloat16), batch(), derivative="difference")
    adapted = get_peft_model(tiny(dtype=torch.bfloat16), LoraConfig(target_modules=["q_proj"]))  # float32 adapters
    with pytest.raises(ValueError, match=r"parameters are torch\.bfloat16"):
        exact_sensitivity(adapted, batch(), derivative="difference")
    with pytest.raises(ValueError, match="estimate_error is about the step"):
        exact_sensitivity(model, batch(), derivative="forward", estimate_error=True)
    with pytest.raises(ValueError, match="the names it was given; these differ: more"):
        exact_sensitivity(model, batch(), metric=lambda g: g | {"more": ids})
    with pytest.raises(ValueError, match="is not finite"):
        exact_sensitivity(model, batch(), metric=lambda g: {name: part / 0 for name, part in g.items()})
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode forbids"):
        exact_sensitivity(model, batch())
    zero = tiny().requires_grad_(False)
    zero.model.layers[0].mlp.up_proj.requires_grad_(True).weight.data.zero_()
    with pytest.raises(ValueError, match="all trainable parameters are 0"):
        exact_sensitivity(zero, batch(), derivative="difference")
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        exact_sensitivity(model.requires_grad_(False), batch())


def test_a_process_without_tokens_adds_zeros_of_the_type_that_the_others_add():
    """16-bit parameters: gradients are summed in float32."""
    model, added = tiny(dtype=torch.bfloat16), []

    def reduce(value, how):
        added.append(value.dtype)
        return value + 1

    accelerator = SimpleNamespace(num_processes=2, unwrap_model=lambda model: model, reduce=reduce)
    ids, none = torch.zeros(2, 3, dtype=torch.long), Tokens.pack(torch.zeros(2, 3, dtype=torch.bool), torch.ones(2))
    inputs = {f"{part}_{what}": ids for part in ("prompt", "completion") for what in ("ids", "mask")}
    assert exact_sensitivity_of(accelerator, model, inputs, none, temperature=1.0).shape == (0,)
    assert set(added[1:]) == {torch.float32}
    assert len(added) == 1 + len(list(model.parameters()))
