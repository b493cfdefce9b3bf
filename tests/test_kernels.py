"""The fast statistics against their definitions: values, gradients, memory, and what they refuse."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpmath import mp
from torch.profiler import ProfilerActivity, profile

from entropy_polarity.kernels import chunked, linear_token_stats, token_stats
from entropy_polarity.kernels.reference import reference_token_stats
from entropy_polarity.tokens import TokenStats

nan, inf = math.nan, math.inf
V = 151_936
# Of a tile, in bytes: small enough that several add to the same gradients.
TILE = 4 * 12 * 2000
LOGITS = st.lists(st.floats(-8, 8), min_size=1, max_size=9)
STATISTICS = [name for name in TokenStats._fields if name != "sensitivity"]


class Definition:
    """One state in 80-bit floats: its statistics, the natural scale of T, and the gradient of log p_a.

    1 - p_a and T are summed over the other tokens: at a gap of 30 nats and temperature 0.7, 1 - p_a is 1e-19,
    the last bit of these floats. That T = C - S_a is the same number is checked in 200 digits below.
    """

    def __init__(self, logits: torch.Tensor, token: int, temperature: float) -> None:
        z = np.asarray(logits.numpy(), dtype=np.longdouble) / np.longdouble(temperature)
        d = z - z.max()
        log_s = np.log1p(np.exp(np.delete(d, d.argmax())).sum())
        p = np.exp(d - log_s)
        distance = d - (p * d).sum()  # log p_v + H
        others = np.arange(len(p)) != token
        not_p = p[others].sum()
        self.logp, self.entropy = d[token] - log_s, log_s - (p * d).sum()
        self.sum_p2, self.sum_p2_logp = (p**2).sum(), (p**2 * (d - log_s)).sum()
        self.sampled, self.correction = p[token] * distance[token], (p**2 * distance).sum()
        self.sensitivity = (p**2 * distance)[others].sum() - p[token] * not_p * distance[token]
        self.scale = (p**2 * abs(distance))[others].sum() + p[token] * not_p * abs(distance[token])
        self.gradient = np.where(others, -p, not_p) / np.longdouble(temperature)


def assert_accurate(stats: TokenStats, logits: torch.Tensor, tokens: torch.Tensor, temperature=1.0) -> None:
    for row, token in enumerate(tokens.tolist()):
        state = Definition(logits[row], token, temperature)
        for name in STATISTICS:
            assert abs(getattr(stats, name)[row].item() - getattr(state, name)) <= 1e-5, (row, name)
        error = abs(stats.sensitivity[row].item() - state.sensitivity)
        assert error <= 1e-5 * state.scale, (row, float(error / state.scale))


def second_best(logits: torch.Tensor) -> torch.Tensor:
    return logits.topk(2).indices[:, 1]


@pytest.fixture(scope="module")
def large() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows over a real vocabulary: spread out, confident by 12 and by 30 nats; each sampled in three ways."""
    torch.manual_seed(0)
    states = torch.stack([torch.randn(V) * 3, torch.randn(V), torch.randn(V)])
    for state, gap in zip(states[1:], (12, 30), strict=True):
        state[torch.randint(V, ())] = state.max() + gap
    logits = states.repeat(3, 1)
    tokens = torch.cat([states.argmax(-1), second_best(states), torch.randint(V, (3,))])
    return logits, tokens


@pytest.fixture(scope="module")
def large_head() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A head of the same size whose products are exact in float32: small multiples of 1/8.

    The last two hidden units raise one token each: by 24 in the rows 2-3 and by 42 in the rows 4-5.
    """
    torch.manual_seed(0)
    hidden = torch.randint(-12, 13, (6, 10)) / 8
    weight = torch.randint(-12, 13, (V, 10)) / 8
    hidden[:, 8:] = torch.tensor([[0.0, 0], [0, 0], [24, 0], [24, 0], [0, 42], [0, 42]])
    weight[:, 8:] = 0
    weight[7, 8] = weight[V - 2, 9] = 1
    logits = hidden @ weight.T
    tokens = torch.where(torch.arange(6) % 2 == 0, logits.argmax(-1), second_best(logits))
    return hidden, weight, tokens


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_float32_statistics_of_a_real_vocabulary_are_accurate(large, temperature):
    logits, tokens = large
    stats = token_stats(logits, tokens, temperature=temperature)
    assert_accurate(stats, logits, tokens, temperature)


def test_float32_statistics_of_a_real_head_are_accurate(large_head):
    hidden, weight, tokens = large_head
    logits = hidden @ weight.T
    assert logits.equal((hidden.double() @ weight.T.double()).float())  # the products are exact
    assert_accurate(linear_token_stats(hidden, weight, tokens), logits, tokens)


@given(
    st.lists(st.floats(-80, 0, width=32), min_size=1, max_size=8),
    st.integers(0, 8),
    st.sampled_from([0.25, 1.0, 4.0]),
)
def test_float32_sensitivity_is_accurate_however_confident_the_state(below_mode, token, temperature):
    logits, token = torch.tensor([[*below_mode, 0.0]]), token % (len(below_mode) + 1)
    mp.dps = 200  # exp(-320) is 1e-139: the definition T = C - S needs that many digits
    e = [mp.exp(mp.mpf(z) / mp.mpf(temperature)) for z in logits[0].tolist()]
    p = [x / sum(e) for x in e]
    distance = [mp.log(x) - sum(y * mp.log(y) for y in p) for x in p]  # log p_v + H = d_v - d̄
    T = sum(x**2 * far for x, far in zip(p, distance, strict=True)) - p[token] * distance[token]
    scale = p[token] * (1 - p[token]) * abs(distance[token]) + sum(
        x**2 * abs(far) for v, (x, far) in enumerate(zip(p, distance, strict=True)) if v != token
    )
    stats = token_stats(logits, torch.tensor([token]), temperature=temperature)
    # 1e-44: below the smallest float32, where T itself cannot be held.
    assert abs(stats.sensitivity.item() - T) <= 1e-5 * scale + 1e-44


@given(
    st.lists(st.floats(-8, 8), min_size=1, max_size=9),
    st.data(),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.booleans(),
)
def test_float64_statistics_and_gradient_are_those_of_the_reference(z, data, temperature, mask_one):
    if mask_one:
        z[0] = -inf if len(z) > 1 else z[0]
    tokens = torch.tensor([data.draw(st.integers(0, len(z) - 1))])
    ours = torch.tensor([z], dtype=torch.float64, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    stats = token_stats(ours, tokens, temperature=temperature)
    reference = reference_token_stats(theirs, tokens, temperature)
    for name in TokenStats._fields:
        torch.testing.assert_close(getattr(stats, name), getattr(reference, name), rtol=1e-11, atol=1e-13, msg=name)
    stats.logp.sum().backward()
    reference.logp.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-13)


def test_linear_statistics_are_those_of_the_logits_it_never_holds():
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(9, 5).double(), torch.randn(11, 5).double(), torch.randn(11).double()
    tokens = torch.randint(11, (9,))
    for b in (None, bias):
        logits = hidden @ weight.T + (0 if b is None else b)
        stats = linear_token_stats(hidden, weight, tokens, bias=b, temperature=0.7)
        for ours, theirs in zip(stats, reference_token_stats(logits, tokens, 0.7), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_float32_gradient_of_a_real_vocabulary_is_accurate(large, temperature):
    logits, tokens = large[0].clone().requires_grad_(), large[1]
    token_stats(logits, tokens, temperature=temperature).logp.sum().backward()
    for row, token in enumerate(tokens.tolist()):
        expected = Definition(large[0][row], token, temperature).gradient
        error = abs(logits.grad[row].numpy() - expected).max()
        assert error <= 1e-6 / temperature, row  # the largest of all rows is near 1 / temperature
        # A confident row that sampled its mode has a gradient of 1 - p_a: that too is right, to the digits
        # that float32 has at a distance of 49 (2^-19 = 2e-6, and as much again for the division).
        assert error <= 5e-6 * abs(expected).max(), row


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (-2.0, 0.0, 0.5)])
def test_the_gradient_is_weighed_by_what_the_loss_makes_of_each_logp(weights):
    # p = (3/4, 1/4): e_a - p = (1/4, -1/4) for the first token, (-3/4, 3/4) for the second.
    logits = torch.tensor([[math.log(3), 0.0]] * 3, requires_grad=True)
    (token_stats(logits, torch.tensor([0, 1, 1])).logp * torch.tensor(weights)).sum().backward()
    expected = torch.tensor([[0.25, -0.25], [-0.75, 0.75], [-0.75, 0.75]]) * torch.tensor(weights)[:, None]
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-7)


def test_float32_gradients_of_the_head_are_accurate():
    torch.manual_seed(0)
    shapes = {"hidden": (50, 16), "weight": (2000, 16), "bias": (2000,)}
    inputs = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}
    doubles = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    tokens, weights = torch.randint(2000, (50,)), torch.randn(50)
    stats = linear_token_stats(
        inputs["hidden"], inputs["weight"], tokens, bias=inputs["bias"], temperature=0.7, tile_bytes=TILE
    )
    (stats.logp * weights).sum().backward()
    logits = doubles["hidden"] @ doubles["weight"].T + doubles["bias"]
    (reference_token_stats(logits, tokens, 0.7).logp * weights).sum().backward()
    for name, x in inputs.items():
        expected = doubles[name].grad
        assert (x.grad - expected).abs().max() <= 1e-6 * expected.abs().max(), name


def test_the_numerical_derivative_confirms_the_gradient_of_the_logits():
    torch.manual_seed(0)
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(6, (4,))
    assert torch.autograd.gradcheck(lambda z: token_stats(z, tokens, temperature=0.7).logp, logits)


@pytest.mark.parametrize("with_bias", [True, False])
def test_the_numerical_derivative_confirms_the_gradients_of_the_head(with_bias):
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 3), (6, 3), (6,))]
    tokens = torch.randint(6, (4,))

    def logp(hidden, weight, bias=None):
        return linear_token_stats(hidden, weight, tokens, bias=bias, temperature=0.7).logp

    assert torch.autograd.gradcheck(logp, tuple(inputs if with_bias else inputs[:2]))


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


def test_statistics_carry_no_gradient():
    logits = torch.randn(3, 5, requires_grad=True)
    stats = token_stats(logits, torch.tensor([0, 1, 2]))
    assert [name for name in TokenStats._fields if getattr(stats, name).requires_grad] == ["logp"]
    head = linear_token_stats(logits, torch.randn(4, 5), torch.tensor([0, 1, 2]))
    assert [name for name in TokenStats._fields if getattr(head, name).requires_grad] == ["logp"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_give_the_float32_statistics_of_the_same_numbers(dtype):
    torch.manual_seed(0)
    short = (torch.randn(6, 500) * 4).to(dtype).requires_grad_()
    full = short.detach().float().requires_grad_()
    tokens = torch.randint(500, (6,))
    ours, theirs = token_stats(short, tokens, temperature=0.8), token_stats(full, tokens, temperature=0.8)
    for name in TokenStats._fields:
        assert getattr(ours, name).dtype == torch.float32
        assert getattr(ours, name).equal(getattr(theirs, name)), name
    ours.logp.sum().backward()
    theirs.logp.sum().backward()
    assert short.grad.equal(full.grad.to(dtype))


def test_a_16_bit_head_gives_the_statistics_of_the_logits_the_model_itself_makes():
    torch.manual_seed(0)
    hidden, weight = torch.randn(512, 16).bfloat16(), torch.randn(300, 16).bfloat16()
    weight.requires_grad_()
    tokens = torch.randint(300, (512,))
    logits = torch.nn.functional.linear(hidden, weight).detach().float().requires_grad_()
    ours, theirs = linear_token_stats(hidden, weight, tokens, tile_bytes=600), token_stats(logits, tokens)
    for name in TokenStats._fields:
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-6, msg=name)
    ours.logp.sum().backward()
    theirs.logp.sum().backward()
    # Many tiles, one rounding: within a bfloat16 step of the exact sum; summed in bfloat16 it would drift.
    torch.testing.assert_close(weight.grad.float(), logits.grad.T @ hidden.float(), rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("elements", [1, 37, 64, 10**9])
def test_results_do_not_depend_on_the_chunk_size(monkeypatch, elements):
    torch.manual_seed(0)
    hidden, weight = torch.randn(23, 8, requires_grad=True), torch.randn(32, 8, requires_grad=True)
    logits = torch.randn(23, 32, requires_grad=True)
    tokens = torch.randint(32, (23,))

    def results():
        direct = token_stats(logits, tokens)
        head = linear_token_stats(hidden, weight, tokens, tile_bytes=tile_bytes)
        gradients = torch.autograd.grad((direct.logp + head.logp).sum(), (logits, hidden, weight))
        return [*direct, *head, *gradients]

    tile_bytes = None
    before = results()
    monkeypatch.setattr(chunked, "TILE_ELEMENTS", elements)
    monkeypatch.setattr(chunked, "TILE_COLUMNS", max(1, elements // 3))
    tile_bytes = elements * 4
    for new, old in zip(results(), before, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-5, atol=2e-6)


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
    assert peaks[0] > 4 * chunked.TILE_ELEMENTS  # the measurement sees the chunk
    assert peaks[1] - peaks[0] <= BYTES_A_ROW * (4096 - 512)
    assert peaks[1] <= 16 * 2**20  # the budget of the design


def test_the_memory_beside_the_logits_does_not_grow_for_the_usual_slice_of_the_last_position():
    # model(...).logits[:, :-1] is no view of shape (N, V); making it one would copy every row of logits.
    logits, tokens = torch.randn(4, 513, 2048), torch.randint(2048, (4, 513))
    whole = peak_memory(lambda: token_stats(logits, tokens))
    sliced = peak_memory(lambda: token_stats(logits[:, :-1], tokens[:, 1:]))
    assert sliced - whole <= BYTES_A_ROW * 4 * 513


def test_the_memory_of_the_head_does_not_grow_with_the_rows_forward_and_backward():
    hidden, weight = torch.randn(4096, 8, requires_grad=True), torch.randn(4096, 8, requires_grad=True)
    tokens = torch.randint(4096, (4096,))

    def step(rows: int) -> None:
        linear_token_stats(hidden[:rows], weight, tokens[:rows], tile_bytes=2**20).logp.sum().backward()

    peaks = [peak_memory(lambda n=n: step(n)) for n in (512, 4096)]
    assert peaks[0] > 4 * 2**18
    # The gradients of `hidden` and of its slice are 8 float32 numbers a row each.
    assert peaks[1] - peaks[0] <= (BYTES_A_ROW + 2 * 8 * 4) * (4096 - 512)


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


def test_a_masked_vocabulary_gives_finite_statistics_and_no_gradient_to_what_is_masked():
    torch.manual_seed(0)
    logits = torch.randn(5, 50)
    logits[:, 20:] = -inf
    logits[4, 1:] = -inf  # one token left
    logits.requires_grad_()
    stats = token_stats(logits, torch.tensor([0, 1, 2, 3, 0]))
    assert all(field.isfinite().all() for field in stats)
    assert [stats.entropy[4].item(), stats.sensitivity[4].item(), stats.logp[4].item()] == [0, 0, 0]
    stats.logp.sum().backward()
    assert (logits.grad[:, 20:] == 0).all()
    assert (logits.grad[4] == 0).all()


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


@pytest.mark.parametrize("broken", [(nan, 0.0, 1.0), (-inf, -inf, -inf), (inf, 0.0, 1.0)])
@pytest.mark.parametrize("token", [0, 1])
def test_unchecked_broken_rows_are_nan_in_every_field_and_leave_the_others_alone(broken, token):
    logits = torch.tensor([[0.3, -1.0, 0.0], broken, [1.0, 2.0, 3.0]])
    tokens = torch.tensor([0, token, 1])
    stats = token_stats(logits, tokens, check=False)
    clean = token_stats(logits[[0, 2]], tokens[[0, 2]])
    for name in TokenStats._fields:
        assert getattr(stats, name).isnan().tolist() == [False, True, False], name
        assert getattr(stats, name)[[0, 2]].equal(getattr(clean, name)), name


def test_unchecked_broken_hidden_states_are_nan_alone():
    hidden, weight = torch.tensor([[1.0, 2.0], [nan, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    stats = linear_token_stats(hidden, weight, torch.tensor([0, 1]), check=False)
    assert all(field.isnan().tolist() == [False, True] for field in stats)


@pytest.mark.parametrize("bias", [None, torch.linspace(-2, 2, 9)])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (None, 0.25), (3.0, 1.0), (3.0, 0.25)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_head_statistics_follow_softcap_and_logit_scale(bias, softcap, scale, dtype):
    torch.manual_seed(0)
    hidden, weight, tokens = torch.randn(6, 4) * 3, torch.randn(9, 4), torch.randint(9, (6,))
    logits = scale * (hidden.double() @ weight.double().T + (0 if bias is None else bias.double()))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    stats = linear_token_stats(
        hidden.to(dtype),
        weight.to(dtype),
        tokens,
        bias=None if bias is None else bias.to(dtype),
        temperature=0.7,
        softcap=softcap,
        logit_scale=scale,
    )
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    for ours, theirs in zip(stats, reference_token_stats(logits, tokens, 0.7), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


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


def test_a_transposed_view_of_logits_gives_the_same_statistics():
    torch.manual_seed(0)
    logits, tokens = torch.randn(3, 2, 7), torch.randint(7, (2, 3))
    view = logits.transpose(0, 1)
    for ours, theirs in zip(token_stats(view, tokens), token_stats(view.contiguous(), tokens), strict=True):
        assert ours.equal(theirs)


def test_no_states_give_empty_statistics_and_zero_gradients():
    empty = torch.zeros(2, 0, dtype=torch.long)
    assert [field.shape for field in token_stats(torch.randn(2, 0, 5), empty)] == [(2, 0)] * 7
    weight = torch.randn(5, 3, requires_grad=True)
    linear_token_stats(torch.randn(0, 3), weight, empty[0]).logp.sum().backward()
    assert weight.grad.tolist() == torch.zeros(5, 3).tolist()


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
