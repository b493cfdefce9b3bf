"""What the public functions of the kernels promise: gradients, products, memory, engines, and what they refuse.

Their numerics are in tests/test_engines.py.
"""

import importlib.util
import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from entropy_polarity.kernels import choose, cpu, linear_token_loss, linear_token_stats, token_stats
from entropy_polarity.kernels.reference import reference_token_stats
from entropy_polarity.tokens import TokenStats

nan, inf = math.nan, math.inf
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MODES = ["recompute", "frozen", "callback"]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def minus_logp(stats: TokenStats, rows: slice) -> torch.Tensor:
    return -stats.logp.sum()


def backward_through_the_head(mode: str, hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, **settings):
    """One step of -Σ log p_a, in one of the three ways back; the gradients are left on the tensors."""
    hidden.requires_grad_()
    weight.requires_grad_(mode != "frozen")
    if mode == "callback":
        total, stats = linear_token_loss(hidden, weight, tokens, minus_logp, **settings)
    else:
        stats = linear_token_stats(hidden, weight, tokens, **settings)
        total = minus_logp(stats, slice(None))
    total.backward()
    return stats


def test_linear_statistics_are_those_of_the_logits_it_never_holds():
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(9, 5).double(), torch.randn(11, 5).double(), torch.randn(11).double()
    tokens = torch.randint(11, (9,))
    for b in (None, bias):
        logits = hidden @ weight.T + (0 if b is None else b)
        stats = linear_token_stats(hidden, weight, tokens, bias=b, temperature=0.7)
        for ours, theirs in zip(stats, reference_token_stats(logits, tokens, 0.7), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (-2.0, 0.0, 0.5)])
def test_the_gradient_is_weighed_by_what_the_loss_makes_of_each_logp(weights):
    # p = (3/4, 1/4): e_a - p = (1/4, -1/4) for the first token, (-3/4, 3/4) for the second.
    logits = torch.tensor([[math.log(3), 0.0]] * 3, requires_grad=True)
    (token_stats(logits, torch.tensor([0, 1, 1])).logp * torch.tensor(weights)).sum().backward()
    expected = torch.tensor([[0.25, -0.25], [-0.75, 0.75], [-0.75, 0.75]]) * torch.tensor(weights)[:, None]
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_a_frozen_part_of_the_head_gets_no_gradient_and_changes_no_other(frozen):
    torch.manual_seed(0)
    whole = {"hidden": torch.randn(5, 3), "weight": torch.randn(7, 3), "bias": torch.randn(7)}
    tokens = torch.randint(7, (5,))
    grads = []
    for part in (None, frozen):
        inputs = {name: x.clone().requires_grad_(name != part) for name, x in whole.items()}
        linear_token_stats(**inputs, tokens=tokens).logp.sum().backward()
        grads.append({name: x.grad for name, x in inputs.items()})
    assert grads[1].pop(frozen) is None
    assert all(grad.equal(grads[0][name]) for name, grad in grads[1].items())


def peak_memory(function) -> int:
    """The most bytes that were allocated at one time while `function` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    del result
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


# What may grow with the rows: 7 columns of results and 2 of the normaliser, 4 bytes each, and some slack for
# the check of the ids and the backward's columns. A row of logits would be 4 x 4096 = 16,384 bytes.
BYTES_A_ROW = 100


def test_the_memory_beside_the_logits_does_not_grow_with_the_rows():
    logits, tokens = torch.randn(4096, 4096), torch.randint(4096, (4096,))
    peaks = [peak_memory(lambda n=n: token_stats(logits[:n], tokens[:n])) for n in (512, 4096)]
    assert peaks[0] > 4 * cpu.PIECE_ELEMENTS  # the measurement sees the chunk
    assert peaks[1] - peaks[0] <= BYTES_A_ROW * (4096 - 512)
    assert peaks[1] <= 16 * 2**20  # the budget of the design


def test_the_memory_beside_the_logits_does_not_grow_for_the_usual_slice_of_the_last_position():
    # model(...).logits[:, :-1] is no view of shape (N, V); making it one would copy every row of logits.
    logits, tokens = torch.randn(4, 513, 2048), torch.randint(2048, (4, 513))
    whole = peak_memory(lambda: token_stats(logits, tokens))
    sliced = peak_memory(lambda: token_stats(logits[:, :-1], tokens[:, 1:]))
    assert sliced - whole <= BYTES_A_ROW * 4 * 513


@pytest.mark.parametrize("mode", MODES)
def test_the_memory_of_the_head_does_not_grow_with_the_rows_forward_and_backward(mode):
    weight, tokens = torch.randn(4096, 8), torch.randint(4096, (4096,))
    sizes = {"chunk_bytes": 2**20} if mode == "callback" else {"tile_bytes": 2**20}

    def step(rows: int) -> None:
        backward_through_the_head(mode, torch.randn(rows, 8), weight, tokens[:rows], **sizes)
        weight.grad = None

    step(64)
    peaks = [peak_memory(lambda n=n: step(n)) for n in (512, 4096)]
    assert peaks[0] > 2**20  # the measurement sees the tile
    # The hidden states, their gradient, and its sum: 8 float32 numbers a row each.
    assert peaks[1] - peaks[0] <= (BYTES_A_ROW + 4 * 8 * 4) * (4096 - 512)


class Products(TorchDispatchMode):
    """Counts matrix products, in units of N V D multiplications: tiles of one product are one together."""

    MADE_BY = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.bmm)

    def __init__(self, unit: int) -> None:
        super().__init__()
        self.unit, self.multiplications = unit, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in self.MADE_BY:
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            self.multiplications += a.numel() * b.shape[-1]
        return function(*args, **(kwargs or {}))

    @property
    def count(self) -> float:
        return self.multiplications / self.unit


@pytest.mark.parametrize("bytes_", [None, 4 * 7 * 5])
@pytest.mark.parametrize(("mode", "expected"), [("recompute", 4), ("frozen", 2), ("callback", 3)])
def test_each_way_back_makes_the_products_it_is_named_for(mode, expected, bytes_):
    hidden, weight, tokens = torch.randn(23, 6), torch.randn(11, 6), torch.randint(11, (23,))
    with Products(23 * 11 * 6) as products:
        sizes = {"chunk_bytes": bytes_} if mode == "callback" else {"tile_bytes": bytes_}
        backward_through_the_head(mode, hidden, weight, tokens, **sizes)
    assert products.count == expected
    assert (weight.grad is None) == (mode == "frozen")


def test_a_frozen_head_makes_no_product_in_the_backward_and_keeps_no_logits():
    hidden, weight, tokens = torch.randn(23, 6, requires_grad=True), torch.randn(11, 6), torch.randint(11, (23,))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        stats = linear_token_stats(hidden, weight, tokens)
    with Products(23 * 11 * 6) as products:
        stats.logp.sum().backward()
    assert products.count == 0
    assert saved == [hidden.shape]


def test_a_frozen_head_whose_entropy_is_in_the_loss_is_recomputed():
    hidden, weight, tokens = torch.randn(23, 6, requires_grad=True), torch.randn(11, 6), torch.randint(11, (23,))
    with Products(23 * 11 * 6) as products:
        linear_token_stats(hidden, weight, tokens, entropy_grad=True).entropy.sum().backward()
    assert products.count == 3  # logits, logits again, hidden states
    with Products(23 * 11 * 6) as products, torch.no_grad():
        linear_token_stats(hidden, weight, tokens, entropy_grad=True)
    assert products.count == 1


def test_a_loss_by_chunks_without_autograd_makes_one_product():
    hidden, weight = torch.randn(23, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    with Products(23 * 11 * 6) as products, torch.no_grad():
        linear_token_loss(hidden, weight, torch.randint(11, (23,)), minus_logp)
    assert products.count == 1


@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_only_logp_and_on_demand_the_entropy_carry_a_gradient(entropy_grad, frozen):
    hidden, weight, tokens = torch.randn(3, 5, requires_grad=True), torch.randn(4, 5), torch.tensor([0, 1, 2])
    weight.requires_grad_(not frozen)
    expected = ["logp", "entropy"] if entropy_grad else ["logp"]
    for stats in (
        token_stats(hidden, tokens, entropy_grad=entropy_grad),
        linear_token_stats(hidden, weight, tokens, entropy_grad=entropy_grad),
        linear_token_stats(hidden, weight, tokens, entropy_grad=entropy_grad, mask=tokens > 0),
    ):
        assert [field for field in TokenStats._fields if getattr(stats, field).requires_grad] == expected
    with torch.no_grad():
        assert not any(field.requires_grad for field in linear_token_stats(hidden, weight, tokens))


def test_a_loss_by_chunks_sees_every_row_once_and_in_order():
    torch.manual_seed(0)
    hidden, weight, tokens = torch.randn(7, 3), torch.randn(5, 3), torch.randint(5, (7,))
    seen = []

    def loss(stats, rows):
        seen.append((rows.start, rows.stop))
        assert [field for field in TokenStats._fields if getattr(stats, field).requires_grad] == ["logp", "entropy"]
        return stats.logp.sum() + 3 * (stats.entropy * stats.sensitivity).sum()

    total, stats = linear_token_loss(hidden.requires_grad_(), weight, tokens, loss, chunk_bytes=3 * 4 * 5)
    assert seen == [(0, 3), (3, 6), (6, 7)]
    assert not any(field.requires_grad for field in stats)
    expected = linear_token_stats(hidden.detach(), weight, tokens)
    for field, ours, theirs in zip(TokenStats._fields, stats, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7, msg=field)
    torch.testing.assert_close(
        total.detach(),
        loss(
            expected._replace(logp=expected.logp.requires_grad_(), entropy=expected.entropy.requires_grad_()),
            slice(0, 7),
        ).detach(),
    )


def test_a_loss_by_chunks_goes_backward_once_and_says_so():
    hidden, weight = torch.randn(2, 3, requires_grad=True), torch.randn(5, 3)
    total, _ = linear_token_loss(hidden, weight, torch.tensor([0, 1]), minus_logp)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_token_loss: its gradients were used by an earlier backward"):
        total.backward()


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (lambda stats, rows: -stats.logp, r"the loss of rows 0:2 has shape \(2,\); expected one number"),
        (lambda stats, rows: stats.sensitivity.sum(), r"has shape \(\) and no gradient; expected one number"),
    ],
)
def test_a_loss_by_chunks_must_be_one_number_with_a_gradient(loss, told):
    with pytest.raises(ValueError, match=told):
        linear_token_loss(torch.randn(2, 3, requires_grad=True), torch.randn(5, 3), torch.tensor([0, 1]), loss)


def test_a_sampled_token_at_minus_infinity_has_the_correction_as_its_sensitivity():
    # p = (1/2, 1/2, 0): log p_v + H = 0 for both, C = 0; p = (2/3, 1/3, 0) has C > 0.
    logits = torch.tensor([[0.0, 0.0, -inf], [math.log(2), 0.0, -inf]], requires_grad=True)
    stats = token_stats(logits, torch.tensor([2, 2]))
    assert stats.logp.tolist() == [-inf, -inf]
    assert stats.sampled.tolist() == [0, 0]
    assert stats.sensitivity[0] == 0
    # H = log 3 - 2/3 log 2;  C = 4/9 (log 2 - log 3 + H) + 1/9 (-log 3 + H) = 4/27 log 2 - 2/27 log 2
    assert stats.sensitivity[1].item() == pytest.approx(2 / 27 * math.log(2), rel=1e-6)
    assert stats.sensitivity.equal(stats.correction)
    (gradient,) = torch.autograd.grad(stats.logp.sum(), logits)
    torch.testing.assert_close(gradient, torch.tensor([[-1 / 2, -1 / 2, 1], [-2 / 3, -1 / 3, 1]]))


ROWS = torch.zeros(2, 3)
IDS = torch.zeros(2, dtype=torch.long)


def row_1_is(*values: float) -> torch.Tensor:
    return torch.stack([ROWS[0], torch.tensor(values)])


@pytest.mark.parametrize(
    ("logits", "tokens", "temperature", "told"),
    [
        (row_1_is(0, nan, 0), IDS, 1.0, r"1 of 2 rows hold NaN or \+inf .* index \(1,\)"),
        (row_1_is(0, inf, 0), IDS, 1.0, r"1 of 2 rows .* index \(1,\)"),
        (row_1_is(-inf, -inf, -inf), IDS, 1.0, r"all -inf, the first at index \(1,\)"),
        (row_1_is(nan, 0, 0).expand(4, 2, 3), IDS.expand(4, 2), 1.0, r"4 of 8 rows .* index \(0, 1\)"),
        (ROWS, IDS[:1], 1.0, r"\(2,\) states but token ids of shape \(1,\)"),
        (ROWS, IDS[None], 1.0, r"\(2,\) states but token ids of shape \(1, 2\)"),
        (ROWS, torch.tensor([0, -1]), 1.0, r"token id -1 at index \(1,\) is outside the vocabulary \[0, 3\)"),
        (ROWS, torch.tensor([0, 3]), 1.0, r"token id 3 at index \(1,\)"),
        (ROWS[None], torch.tensor([[0, -100]]), 1.0, r"token id -100 at index \(0, 1\)"),
        (ROWS, IDS.float(), 1.0, "token ids are torch.float32; expected an integer type"),
        (ROWS, IDS.bool(), 1.0, "token ids are torch.bool"),
        (ROWS, IDS, 0, "temperature is 0; expected a positive number"),
        (ROWS, IDS, -1, "temperature is -1"),
        (ROWS, IDS, nan, "temperature is nan"),
        (ROWS, IDS, inf, "temperature is inf"),
        (ROWS[:, :0], IDS, 1.0, "the vocabulary is empty"),
        (ROWS.long(), IDS, 1.0, r"logits are torch.int64 of shape \(2, 3\); expected floats"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_token_stats_says_what_is_wrong_and_where(logits, tokens, temperature, told):
    with pytest.raises(ValueError, match=told) as error:
        token_stats(logits, tokens, temperature=temperature)
    assert str(error.value).startswith("token_stats: ")


@pytest.mark.usefixtures("untyped")
def test_a_single_number_is_no_state():
    with pytest.raises(ValueError, match="token_stats"):
        token_stats(torch.tensor(1.0), torch.tensor(0))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"hidden": torch.zeros(2, 4)}, r"hidden has shape \(2, 4\) and weight \(5, 3\); .* the same D"),
        ({"hidden": torch.zeros(1, 2, 3)}, r"hidden has shape \(1, 2, 3\)"),
        ({"weight": torch.zeros(3)}, r"weight \(3,\)"),
        ({"bias": torch.zeros(3)}, r"bias has shape \(3,\); expected \(5,\)"),
        ({"bias": torch.zeros(5, 1)}, r"bias has shape \(5, 1\)"),
        ({"weight": torch.zeros(0, 3)}, "the vocabulary is empty"),
        ({"tokens": torch.tensor([0])}, r"\(2,\) states but token ids of shape \(1,\)"),
        (
            {"tokens": torch.tensor([-1, 0])},
            r"token id -1 at index \(0,\) is outside the vocabulary \[0, 5\)",
        ),
        ({"tokens": torch.tensor([0, 5])}, r"token id 5 at index \(1,\)"),
        ({"tokens": torch.tensor([0.0, 1.0])}, "token ids are torch.float32"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": nan}, "temperature is nan"),
        ({"hidden": torch.tensor([[0, 0, 0], [0, nan, 0]])}, r"1 of 2 rows .* index \(1,\)"),
        ({"bias": torch.tensor([0, 0, inf, 0, 0])}, r"2 of 2 rows .* index \(0,\)"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_linear_token_stats_says_what_is_wrong_and_where(changed, told):
    arguments = {"hidden": torch.zeros(2, 3), "weight": torch.zeros(5, 3), "tokens": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=told) as error:
        linear_token_stats(**arguments | changed)
    assert str(error.value).startswith("linear_token_stats: ")


def by_logits(**settings):
    return token_stats(torch.zeros(2, 5), **settings)


def by_head(**settings):
    return linear_token_stats(torch.zeros(2, 3), torch.zeros(5, 3), **settings)


def by_loss(**settings):
    return linear_token_loss(torch.zeros(2, 3), torch.zeros(5, 3), loss=minus_logp, **settings)


@pytest.mark.parametrize(
    ("functions", "settings", "told"),
    [
        ("LH", {"mask": torch.ones(2)}, r"the mask is torch.float32 of shape \(2,\); expected torch.bool"),
        ("LH", {"mask": torch.ones(3) == 1}, r"the mask is torch.bool of shape \(3,\); .* of shape \(2,\)"),
        ("LH", {"mask": torch.tensor([True, False]), "tokens": torch.tensor([5, 0])}, r"token id 5 at index \(0,\)"),
        ("LHC", {"vocab_size": 0}, "vocab_size is 0; expected 1 to 5"),
        ("LHC", {"vocab_size": 6}, "vocab_size is 6; expected 1 to 5"),
        ("LHC", {"vocab_size": -1}, "vocab_size is -1"),
        ("LHC", {"vocab_size": 4, "tokens": torch.tensor([0, 4])}, r"token id 4 .* the vocabulary \[0, 4\)"),
        ("C", {"tokens": torch.tensor([0, -100])}, r"token id -100 at index \(1,\)"),
        ("HC", {"softcap": 0.0}, "softcap is 0.0; expected a positive number"),
        ("HC", {"softcap": inf}, "softcap is inf"),
        ("HC", {"logit_scale": -1.0}, "logit_scale is -1.0; expected a positive number"),
        ("HC", {"logit_scale": nan}, "logit_scale is nan"),
        ("LHC", {"vocab_size": 4.0}, "vocab_size is 4.0; expected 1 to 5"),
        ("LHC", {"temperature": 1e-39}, r"temperature is 1e-39; float32 takes 1.2e-38 to 8.5e\+37"),
        ("LHC", {"temperature": 1e39}, r"temperature is 1e\+39; float32 takes"),
        ("LHC", {"temperature": True}, "temperature is True; expected a positive number"),
        ("LHC", {"temperature": "1"}, "temperature is 1; expected a positive number"),
        ("LHC", {"temperature": 1e-39, "check": False}, "temperature is 1e-39"),
        ("HC", {"softcap": 1e39}, r"softcap is 1e\+39; float32 takes"),
        ("HC", {"logit_scale": 1e20, "temperature": 1e-20}, r"logit_scale / temperature is 1e\+40; float32 takes"),
        ("HC", {"softcap": 1e-20, "logit_scale": 1e20}, r"logit_scale / softcap is 1e\+40; float32 takes"),
        ("HC", {"softcap": 1e20, "temperature": 1e-20}, r"softcap / temperature is 1e\+40; float32 takes"),
        ("H", {"tile_bytes": -1}, "tile_bytes is -1; expected a positive whole number of bytes, or None"),
        ("H", {"tile_bytes": 0}, "tile_bytes is 0"),
        ("H", {"tile_bytes": 1e6}, "tile_bytes is 1000000.0"),
        ("C", {"chunk_bytes": -1}, "chunk_bytes is -1; expected a positive whole number of bytes, or None"),
        ("C", {"chunk_bytes": nan}, "chunk_bytes is nan"),
        ("LHC", {"tokens": torch.tensor([0, 5], dtype=torch.uint16)}, r"token id 5 at index \(1,\)"),
        ("LHC", {"tokens": torch.tensor([0, -3], dtype=torch.int8)}, r"token id -3 at index \(1,\)"),
        ("LHC", {"tokens": torch.tensor([0j, 1j])}, "token ids are torch.complex64; expected an integer type"),
        ("HC", {"bias": torch.zeros(5).long()}, "bias is torch.int64; expected floats of 16, 32 or 64 bits"),
        ("LHC", {"implementation": "cuda"}, "implementation='cuda': unknown; expected auto, chunked, triton"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_settings_that_cannot_be_are_refused_by_every_function_that_has_them(functions, settings, told):
    for letter in functions:
        function = {"L": by_logits, "H": by_head, "C": by_loss}[letter]
        with pytest.raises(ValueError, match=told):
            function(**{"tokens": torch.tensor([0, 1])} | settings)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "uint16", "uint32", "uint64"])
def test_ids_of_every_integer_type_are_those_of_long(dtype):
    """300 columns: in 8 bits 300 itself is 44."""
    torch.manual_seed(0)
    logits, weight = torch.randn(3, 300), torch.eye(300)
    ids, mask = torch.tensor([100, 45, 7]), torch.tensor([True, True, False])
    short = ids.to(getattr(torch, dtype))
    expected = token_stats(logits, ids)
    _, by_chunks = linear_token_loss(logits, weight, short, minus_logp)
    for found in (token_stats(logits, short), linear_token_stats(logits, weight, short), by_chunks):
        assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
    assert token_stats(logits, short, mask=mask).logp.tolist() == [*expected.logp[:2].tolist(), 0]


@pytest.mark.parametrize("temperature", [1.2e-38, 1e-30, 1e30, 8e37])
def test_the_farthest_temperatures_give_the_argmax_and_the_uniform_policy(temperature):
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    stats = token_stats(logits, torch.tensor([1, 0]), temperature=temperature)
    if temperature < 1:  # all mass on the second token: log p of the first is -2 / temperature, beyond float32 or not
        assert stats.logp.tolist() == [0, pytest.approx(max(-2 / temperature, -inf))]
        assert stats.entropy.tolist() == stats.sensitivity.tolist() == [0, 0]
    else:
        assert stats.logp.tolist() == stats.entropy.neg().tolist() == pytest.approx([-math.log(3)] * 2)
        assert stats.sensitivity.abs().max() < 1e-29


def test_float64_logits_take_temperatures_that_float32_does_not():
    # z = (2, 0): p = (0.8808, 0.1192)
    logits = torch.tensor([[2e-50, 0.0]], dtype=torch.float64)
    stats = token_stats(logits, torch.tensor([0]), temperature=1e-50)
    assert stats.logp.item() == pytest.approx(-math.log1p(math.exp(-2)), rel=1e-12)


# Which engine serves


@pytest.mark.parametrize(
    ("device", "dtype", "variable", "argument", "expected"),
    [
        (CPU, torch.float32, None, None, "chunked"),
        (CPU, torch.bfloat16, None, None, "chunked"),
        (CPU, torch.float32, "triton", "chunked", "chunked"),
        (CPU, torch.float32, "triton", "auto", "chunked"),
        (CPU, torch.float32, "auto", None, "chunked"),
        (CPU, torch.float32, "", None, "chunked"),
        pytest.param(CUDA, torch.bfloat16, None, None, "triton", marks=needs_triton),
        (CUDA, torch.float32, "chunked", None, "chunked"),
        (CUDA, torch.float64, None, None, "chunked"),
        pytest.param(CPU, torch.float32, "triton", None, "triton", marks=needs_triton),
        pytest.param(CPU, torch.bfloat16, None, "triton", "triton", marks=needs_triton),
    ],
)
def test_the_engine_is_the_forced_one_or_what_suits_the_tensors(
    monkeypatch, device, dtype, variable, argument, expected
):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("PAPO_KERNEL", raising=False)
    if variable is not None:
        monkeypatch.setenv("PAPO_KERNEL", variable)
    choice = choose(device, dtype, argument)
    assert choice.name == expected
    assert choice.why


def test_without_triton_cuda_tensors_are_served_by_torch_and_the_reason_is_told(monkeypatch):
    monkeypatch.delenv("PAPO_KERNEL", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose(CUDA, torch.bfloat16) == ("chunked", "triton is not installed (pip install triton)")
    with pytest.raises(
        ValueError, match=r"implementation='triton' cannot serve these tensors: triton is not installed"
    ):
        choose(CUDA, torch.bfloat16, "triton")


@pytest.mark.parametrize(
    ("dtype", "told"),
    [
        (torch.float32, "PAPO_KERNEL=triton cannot serve these tensors: the tensors are on cpu"),
        (torch.float64, "PAPO_KERNEL=triton cannot serve these tensors: .* float64 needs chunked"),
    ],
)
@needs_triton
def test_an_engine_that_cannot_serve_the_tensors_is_refused_with_the_reason(monkeypatch, dtype, told):
    monkeypatch.setenv("PAPO_KERNEL", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    hidden, weight, tokens = torch.zeros(2, 3, dtype=dtype), torch.zeros(5, 3, dtype=dtype), torch.tensor([0, 1])
    for call in (
        lambda: token_stats(hidden, tokens),
        lambda: linear_token_stats(hidden, weight, tokens),
        lambda: linear_token_loss(hidden, weight, tokens, minus_logp),
    ):
        with pytest.raises(ValueError, match=told):
            call()


def test_an_unknown_engine_in_the_environment_is_told_with_the_name_of_the_variable(monkeypatch):
    monkeypatch.setenv("PAPO_KERNEL", "Triton")
    with pytest.raises(ValueError, match="PAPO_KERNEL=Triton: unknown; expected auto, chunked, triton"):
        token_stats(torch.zeros(1, 3), torch.tensor([0]))


@needs_triton
def test_an_interpreter_that_is_turned_off_does_not_serve_cpu_tensors(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1 runs the kernels there"):
        choose(CPU, torch.float32, "triton")


@needs_triton
def test_the_engine_of_the_environment_does_all_the_work(monkeypatch):
    from entropy_polarity.kernels.triton import Triton

    calls = []

    def spy(owner: type, name: str) -> None:
        method = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: calls.append(name) or method(*args, **kwargs))

    for name in ("statistics", "fold", "gradient"):
        spy(Triton, name)
        monkeypatch.setattr(cpu.Cpu, name, None)  # not callable: nobody falls back to it
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setenv("PAPO_KERNEL", "triton")
    hidden, weight, tokens = torch.randn(2, 3).to(device), torch.randn(5, 3).to(device), torch.tensor([0, 1]).to(device)
    logits = hidden.clone().requires_grad_()
    token_stats(logits, tokens).logp.sum().backward()
    assert calls == ["statistics", "gradient"]
    for mode, expected in {
        "recompute": ["fold", "gradient"],
        "frozen": ["fold", "gradient"],
        "callback": ["statistics", "gradient"],
    }.items():
        calls.clear()
        backward_through_the_head(mode, hidden.clone(), weight.clone(), tokens)
        assert calls == expected, mode


# Types and shapes


def test_head_statistics_under_autocast_are_those_of_the_models_own_product():
    torch.manual_seed(0)
    hidden, weight, tokens = torch.randn(6, 4), torch.randn(9, 4), torch.randint(9, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        logits = torch.nn.functional.linear(hidden, weight)
        stats = linear_token_stats(hidden, weight, tokens)
    for ours, theirs in zip(stats, token_stats(logits, tokens), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_state_may_have_any_leading_dimensions():
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 3, 4, 7), torch.randint(7, (2, 3, 4))
    stats, single = token_stats(logits, tokens), token_stats(logits[1, 2, 3], tokens[1, 2, 3])
    expected = reference_token_stats(logits, tokens)
    for name in TokenStats._fields:
        value = getattr(stats, name)
        torch.testing.assert_close(value.double(), getattr(expected, name), rtol=1e-5, atol=1e-6, msg=name)
        torch.testing.assert_close(value[1, 2, 3], getattr(single, name), rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_head_of_another_type_follows_the_hidden_states(dtypes):
    """Like TRL's head: the product is made in the type of the hidden states, whatever the weight's is."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 8).to(dtypes[0]), torch.randn(11, 8).to(dtypes[1])
    tokens = torch.randint(11, (5,))
    expected = reference_token_stats((hidden @ weight.to(dtypes[0]).t()).double(), tokens)
    got = linear_token_stats(hidden, weight, tokens)
    torch.testing.assert_close(got.entropy.double(), expected.entropy, rtol=1e-5, atol=1e-5)


def test_gradients_under_autocast_are_those_of_the_forward():
    """The backward recomputes the logits in the autocast type: the gradient is that of the rounded product."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 16, requires_grad=True), torch.randn(13, 16, requires_grad=True)
    tokens = torch.randint(13, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        linear_token_stats(hidden, weight, tokens).logp.sum().backward()
    logits = hidden.detach().bfloat16() @ weight.detach().bfloat16().t()
    p = logits.double().softmax(-1)
    grad_logits = torch.nn.functional.one_hot(tokens, 13) - p
    expected = grad_logits @ weight.detach().bfloat16().double()
    assert (hidden.grad.double() - expected).abs().max() < 0.02 * expected.abs().max()
    assert (hidden.grad.double().sum(0) - expected.sum(0)).abs().max() < 0.02 * expected.sum(0).abs().max() + 1e-2
