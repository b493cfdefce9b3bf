"""The numerics of every engine, through every way into it, against 80-bit floats and float64."""

import functools
import importlib.util
import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpmath import mp
from oracle import ABSOLUTE, RELATIVE, Exact, assert_accurate, assert_gradient

from entropy_polarity.kernels import chunked, cpu, linear_token_loss, linear_token_stats, public, token_stats
from entropy_polarity.kernels.dispatch import engine_named
from entropy_polarity.kernels.engine import Tile
from entropy_polarity.kernels.reference import reference_token_stats
from entropy_polarity.kernels.state import Head, empty_state, finish, merge
from entropy_polarity.tokens import TokenStats

# NumPy, in Triton's interpreter, warns of what these rows are made for.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
nan, inf = math.nan, math.inf
CUDA = torch.cuda.is_available()
# Where these tests put a block's or a tile's end: rows of 37 columns then have two whole blocks and a part of one.
BLOCK = 16
WIDTH = 37


class Runs(NamedTuple):
    """An engine and where it runs: Triton's kernels on CPU tensors by its interpreter (tests/conftest.py)."""

    name: str
    device: str = "cpu"
    in_torch: bool = False  # chunked, as it runs where there is no NumPy


HAS_TRITON = importlib.util.find_spec("triton") is not None
ENGINES = [
    pytest.param(Runs("chunked"), id="chunked"),
    pytest.param(Runs("chunked", "cuda" if CUDA else "cpu", in_torch=True), id="chunked-torch"),
    pytest.param(
        Runs("triton", "cuda" if CUDA else "cpu"),
        id="triton",
        marks=pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"),
    ),
]
IN_TORCH = chunked.Chunked()


def engine_of(run: Runs):
    return IN_TORCH if run.in_torch else engine_named(run.name, run.device)


on_every_engine = pytest.mark.parametrize("run", ENGINES)


@pytest.fixture(autouse=True)
def _in_torch(request, monkeypatch):
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if "run" in parameters and parameters["run"].in_torch:
        monkeypatch.setattr(public, "engine_for", lambda *given: IN_TORCH)


def set_blocks(monkeypatch, size: int) -> None:
    """Blocks and tiles of so many columns: what happens between blocks happens in short rows, too."""
    for name, value in {"PIECE_ELEMENTS": 2 * size, "PIECE_WIDTH": size, "DOT": size // 2, "SERIAL": size}.items():
        monkeypatch.setattr(cpu, name, value)
    for name, value in {"CHUNK_ELEMENTS": 2 * size, "PRODUCT_ROWS": 3}.items():
        monkeypatch.setattr(chunked, name, value)
    if HAS_TRITON:
        from entropy_polarity.kernels import triton

        for name, value in {"BLOCK": size, "GRADIENT_BLOCK": size, "PRODUCT_ROWS": 3}.items():
            monkeypatch.setattr(triton, name, value)


@pytest.fixture
def small_blocks(monkeypatch):
    set_blocks(monkeypatch, BLOCK)


SMALL_TILES = 3 * BLOCK * 4  # `tile_bytes` for tiles of three rows, if set_blocks was called, by 16 float32 columns
small = pytest.mark.usefixtures("small_blocks")


# Rows


def put(z: torch.Tensor, at: int, value: float) -> torch.Tensor:
    z = z.clone()
    z[at] = value
    return z


def finite_rows(V: int) -> dict[str, tuple[torch.Tensor, int]]:
    """name -> logits (V,) and sampled token: rows whose products with 0 are 0."""
    torch.manual_seed(V)
    first, middle, last = 0, V // 2, V - 1
    rows = {f"random, scale {scale}": (torch.randn(V) * scale, middle) for scale in (0.1, 1, 10, 100)}
    for gap in (8, 15, 30, 60, 85, 100, 1e3, 1e4):
        z = torch.randn(V)
        top = int(torch.randint(V, ()))
        z = put(z, top, z.max() + gap)
        rows[f"gap {gap}, top sampled"] = z, top
        rows[f"gap {gap}, another sampled"] = z, (top + 1) % V
        rows[f"gap {gap}, second best sampled"] = z, int(put(z, top, -inf).argmax())
    rows["uniform"] = torch.zeros(V), middle
    for offset in (1e3, 1e5, -200):
        rows[f"offset {offset}"] = torch.randn(V) + offset, last
    z = torch.randn(V)
    top = float(z.max()) + 1
    rows["tie of the ends, one sampled"] = put(put(z, first, top), last, top), last
    rows["tie of the ends, none sampled"] = put(put(z, first, top), last, top), middle
    rows["tie of neighbours"] = put(put(z, middle, top), min(middle + 1, last), top), middle
    rows["tie of many"] = z.round(), int(z.round().argmax())
    rows["two tie far above"] = put(put(z, first, top + 40), last, top + 40), first
    steps = torch.arange(V, dtype=torch.float32)
    rows["ascending"] = steps, last
    rows["ascending, the first sampled"] = steps / 4, first
    rows["ascending steeply"] = steps * 10, max(last - 1, 0)
    rows["descending"] = -steps, last
    rows["bfloat16"] = (torch.randn(V) * 4).bfloat16().float(), middle
    rows["float16"] = (torch.randn(V) * 4).half().float(), first
    return rows


def rows_with_infinities(V: int) -> dict[str, tuple[torch.Tensor, int]]:
    torch.manual_seed(V)
    first, middle, last = 0, V // 2, V - 1
    nothing, z = torch.full((V,), -inf), torch.randn(V)
    rows = {
        "one token left, sampled": (put(nothing, middle, 3.0), middle),
        "one token left, another sampled": (put(nothing, first, 3.0), last),
        "the last token left": (put(nothing, last, -2.0), last),
        "the farthest numbers": (put(put(z, first, -1e38), last, 1e38), last),
        "the farthest numbers, the lower sampled": (put(put(z, first, -1e38), last, 1e38), first),
    }
    for end in (middle + 1, last):
        head, tail = z.clone(), z.clone()
        head[:end] = tail[V - end :] = -inf
        rows[f"{end} masked at the head"] = head, last
        rows[f"{end} masked at the tail"] = tail, first
        rows[f"{end} masked at the head, one of them sampled"] = head, first
        rows[f"{end} masked at the tail, one of them sampled"] = tail, last
    rows["every other masked"] = put(z, slice(None, None, 2), -inf) if V > 1 else z, min(1, last)
    rows["the sampled one masked"] = put(z, middle, -inf), middle
    rows["the sampled one masked under a gap"] = put(put(z, first, 30.0), last, -inf), last
    return {name: (z, token) for name, (z, token) in rows.items() if (z > -inf).any()}


def stacked(rows: dict[str, tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    logits, tokens = zip(*rows.values(), strict=True)
    return torch.stack(logits), torch.tensor(tokens), list(rows)


# Ways


class Result(NamedTuple):
    stats: TokenStats
    logits_grad: torch.Tensor | None = None
    hidden_grad: torch.Tensor | None = None  # for hidden states eye(N), so that the weight is logits.T

    def tensors(self) -> list[torch.Tensor]:
        return [x.detach() for x in (*self.stats, self.logits_grad, self.hidden_grad) if x is not None]


def by_logits(run, logits, tokens, on_logp, on_entropy, temperature=1.0) -> Result:
    z = logits.to(run.device, copy=True).requires_grad_()
    stats = token_stats(
        z, tokens.to(run.device), temperature=temperature, entropy_grad=True, implementation=run.name, check=False
    )
    (stats.logp * on_logp.to(z.device) + stats.entropy * on_entropy.to(z.device)).sum().backward()
    return Result(stats, z.grad)


def by_tiles(run, logits, tokens, on_logp, on_entropy, temperature=1.0, width=BLOCK + 3) -> Result:
    """`Engine.fold`, tile by tile: how the linear functions call it, for rows that no product can make."""
    z, tokens, kernel, head = logits.to(run.device), tokens.to(run.device), engine_of(run), Head(temperature)
    state, _ = empty_state(len(z), torch.float32, z.device)
    stats = torch.full((len(TokenStats._fields), len(z)), 7.0, device=z.device)
    for start in range(0, z.shape[1], width):
        tile = Tile(z[:, start : start + width].clone(), tokens, head, start)
        kernel.fold(tile, state, stats if start + width >= z.shape[1] else None, keep=False)
    return Result(TokenStats(*stats))


def _identity(run: Runs, logits: torch.Tensor, frozen: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and a head whose product is exactly `logits`: eye(N), and so dL/dweight = (dL/dlogits).T.

    Both are filled up with zeros to a width of 16: on some processors MKL's products of fewer columns add thousands of
    terms in one float32, and lose four digits of it. No model is as narrow.
    """
    count = len(logits)
    room = max(0, 16 - count)
    hidden = torch.nn.functional.pad(torch.eye(count, device=run.device), (0, room)).requires_grad_()
    weight = torch.nn.functional.pad(logits.to(run.device).t(), (0, room)).contiguous()
    return hidden, weight.requires_grad_(not frozen)


def by_recompute(run, logits, tokens, on_logp, on_entropy, temperature=1.0, tile_bytes=SMALL_TILES, **head) -> Result:
    hidden, weight = _identity(run, logits)
    stats = linear_token_stats(
        hidden,
        weight,
        tokens.to(run.device),
        temperature=temperature,
        entropy_grad=True,
        tile_bytes=tile_bytes,
        implementation=run.name,
        check=False,
        **head,
    )
    (stats.logp * on_logp.to(hidden) + stats.entropy * on_entropy.to(hidden)).sum().backward()
    return Result(stats, weight.grad.t()[: len(logits)], hidden.grad[:, : len(logits)])


def by_callback(run, logits, tokens, on_logp, on_entropy, temperature=1.0, **head) -> Result:
    hidden, weight = _identity(run, logits)
    g, h = on_logp.to(hidden), on_entropy.to(hidden)
    total, stats = linear_token_loss(
        hidden,
        weight,
        tokens.to(run.device),
        lambda stats, rows: (stats.logp * g[rows] + stats.entropy * h[rows]).sum() / 2,
        temperature=temperature,
        chunk_bytes=7 * 4 * len(weight),  # seven rows
        implementation=run.name,
        check=False,
        **head,
    )
    (total * 2).backward()
    return Result(stats, weight.grad.t()[: len(logits)], hidden.grad[:, : len(logits)])


def by_frozen(run, logits, tokens, on_logp, on_entropy, temperature=1.0, tile_bytes=SMALL_TILES, **head) -> Result:
    """The entropy has no gradient here: `on_entropy` must be 0."""
    hidden, weight = _identity(run, logits, frozen=True)
    stats = linear_token_stats(
        hidden,
        weight,
        tokens.to(run.device),
        temperature=temperature,
        tile_bytes=tile_bytes,
        implementation=run.name,
        check=False,
        **head,
    )
    (stats.logp * on_logp.to(hidden)).sum().backward()
    return Result(stats, hidden_grad=hidden.grad[:, : len(logits)])


THROUGH_A_HEAD = [by_recompute, by_callback, by_frozen]
EVERY_WAY = [by_logits, by_tiles, *THROUGH_A_HEAD]


def weights_of(way, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the loss makes of each logp and each entropy: both signs, and rows that use one of them only."""
    torch.manual_seed(1)
    on_logp, on_entropy = torch.randn(2, rows)
    on_logp[2::5] = 0
    on_entropy[1::3] = 0
    return (on_logp, torch.zeros(rows)) if getattr(way, "func", way) is by_frozen else (on_logp, on_entropy)


def assert_right(way, run, rows, temperature=1.0, nat=False, **head) -> None:
    """Statistics and all the gradients of one way; `nat` as in Exact."""
    logits, tokens, names = stacked(rows)
    weights = weights_of(way, len(logits))
    result = way(run, logits, tokens, *weights, temperature, **head)
    exact = Exact(logits, tokens, temperature, nat=nat, **head)
    assert_accurate(result.stats, exact, names)
    gradient, scale = exact.gradient(*weights)
    if result.logits_grad is not None:
        assert_gradient(result.logits_grad, gradient, scale, names)
    if result.hidden_grad is not None:
        z = logits.double().numpy()
        assert_gradient(result.hidden_grad, gradient @ z.T, scale @ abs(z).T, names)


# Values


@on_every_engine
@pytest.mark.parametrize("V", [1, WIDTH, 3 * BLOCK])
@small
def test_statistics_and_gradients_of_every_kind_of_row_are_right(run, V):
    assert_right(by_logits, run, finite_rows(V) | rows_with_infinities(V))


@on_every_engine
@pytest.mark.parametrize("way", THROUGH_A_HEAD)
@small
def test_statistics_and_gradients_through_a_head_are_right(run, way):
    assert_right(way, run, finite_rows(WIDTH))


@on_every_engine
@pytest.mark.parametrize("width", [1, BLOCK + 3])
@small
def test_statistics_folded_from_tiles_are_right(run, width):
    rows = rows_with_infinities(WIDTH if width > 1 else 5)
    assert_right(functools.partial(by_tiles, width=width), run, rows)


@on_every_engine
@pytest.mark.parametrize("way", [by_logits, by_recompute, by_frozen])
@small
def test_statistics_and_gradients_are_those_of_the_tempered_logits(run, way):
    assert_right(way, run, dict(itertools.islice(finite_rows(WIDTH).items(), 3, 19, 2)), temperature=0.7)


@on_every_engine
def test_half_the_temperature_is_twice_the_logits_to_the_last_bit(run):
    torch.manual_seed(0)
    logits, tokens, weights = torch.randn(3, WIDTH) * 4, torch.randint(WIDTH, (3,)), torch.randn(2, 3)
    half = by_logits(run, logits, tokens, *weights, temperature=0.5)
    twice = by_logits(run, logits * 2, tokens, *weights)
    assert all(a.equal(b) for a, b in zip(half.stats, twice.stats, strict=True))
    torch.testing.assert_close(half.logits_grad, twice.logits_grad * 2, rtol=1e-6, atol=0)


@on_every_engine
@pytest.mark.parametrize(
    ("way", "V"),
    [
        pytest.param(by_logits, 151_936, id="by_logits"),
        pytest.param(by_callback, 20_000, id="by_callback"),
        pytest.param(functools.partial(by_frozen, tile_bytes=2**18), 20_000, id="by_frozen"),
    ],
)
def test_rows_of_a_real_vocabulary_are_right_with_the_blocks_of_every_day(run, way, V):
    """Spread out, confident by 12 and by 30 nats; the mode, the second best and the last token sampled."""
    torch.manual_seed(0)
    states = [torch.randn(V) * 3, torch.randn(V), torch.randn(V)]
    for state, gap in zip(states[1:], (12, 30), strict=True):
        state[torch.randint(V, ())] = state.max() + gap
    rows = {
        f"state {i}, token {token}": (state, token)
        for i, state in enumerate(states)
        for token in (*state.topk(2).indices.tolist(), V - 1)
    }
    assert_right(way, run, rows)


@on_every_engine
@pytest.mark.parametrize("block", [4, 64])
def test_block_and_tile_sizes_change_nothing_but_rounding(run, monkeypatch, block):
    set_blocks(monkeypatch, block)
    some = dict(itertools.islice((finite_rows(WIDTH) | rows_with_infinities(WIDTH)).items(), 2, None, 8))
    finite = {name: (z, token) for name, (z, token) in some.items() if z.isfinite().all()}
    assert_right(by_logits, run, some)
    for way in (by_recompute, by_frozen):
        for columns in (block, WIDTH):
            assert_right(functools.partial(way, tile_bytes=4 * len(finite) * columns), run, finite)


@given(
    st.lists(st.floats(-80, 0, width=32), min_size=1, max_size=8),
    st.integers(0, 8),
    st.sampled_from([0.25, 1.0, 4.0]),
)
@on_every_engine
def test_the_sensitivity_is_accurate_however_confident_the_state(run, below_mode, token, temperature):
    """In 200 digits, by the definition T = C - S, which needs them: exp(-320) is 1e-139."""
    logits, token = torch.tensor([[*below_mode, 0.0]]), token % (len(below_mode) + 1)
    mp.dps = 200
    e = [mp.exp(mp.mpf(z) / mp.mpf(temperature)) for z in logits[0].tolist()]
    p = [x / sum(e) for x in e]
    distance = [mp.log(x) - sum(y * mp.log(y) for y in p) for x in p]  # log p_v + H = d_v - d̄
    T = sum(x**2 * far for x, far in zip(p, distance, strict=True)) - p[token] * distance[token]
    scale = p[token] * (1 - p[token]) * abs(distance[token]) + sum(
        x**2 * abs(far) for v, (x, far) in enumerate(zip(p, distance, strict=True)) if v != token
    )
    stats = token_stats(
        logits.to(run.device), torch.tensor([token]).to(run.device), temperature=temperature, implementation=run.name
    )
    assert abs(stats.sensitivity.item() - T) <= RELATIVE * scale + ABSOLUTE


@given(
    st.lists(st.one_of(st.floats(-8, 8), st.just(-inf)), min_size=1, max_size=9).filter(lambda z: max(z) > -inf),
    st.data(),
    st.sampled_from([0.5, 1.0, 2.0]),
)
@pytest.mark.parametrize("run", [x for x in ENGINES if x.values[0].name == "chunked"])
def test_float64_statistics_and_gradients_are_those_of_the_reference(run, z, data, temperature):
    tokens = torch.tensor([data.draw(st.integers(0, len(z) - 1))])
    ours = torch.tensor([z], dtype=torch.float64, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    stats = token_stats(ours, tokens, temperature=temperature, implementation=run.name)
    reference = reference_token_stats(theirs, tokens, temperature)
    for field, a, b in zip(TokenStats._fields, stats, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13, msg=field)
    stats.logp.sum().backward()
    reference.logp.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-13)


@on_every_engine
@pytest.mark.parametrize("way", [by_logits, by_tiles, by_frozen])
@small
def test_the_sensitivity_has_mean_zero_under_the_policy(run, way):
    torch.manual_seed(0)
    V = BLOCK + 1
    states = torch.stack([torch.randn(V) * 2, put(torch.randn(V), 3, 12.0)])
    tokens = torch.arange(V).repeat(2)
    result = way(run, states.repeat_interleave(V, 0), tokens, *weights_of(way, 2 * V))
    p, T = states.double().softmax(-1), result.stats.sensitivity.detach().cpu().double().view(2, V)
    assert ((p * T).sum(-1).abs() <= 1e-6 * (p * T.abs()).sum(-1)).all()


@on_every_engine
@pytest.mark.parametrize("offset", [1e5, -200.0])
@small
def test_a_shift_of_all_logits_changes_nothing_at_all(run, offset):
    torch.manual_seed(0)
    logits = torch.randint(-1000, 1000, (4, WIDTH)) / 2**7  # the shifted ones are exact in float32
    tokens = torch.tensor([0, 20, WIDTH - 1, 3])
    for way in (by_logits, by_tiles, by_recompute):
        results = [way(run, z, tokens, torch.ones(4), torch.ones(4)) for z in (logits, logits + offset)]
        for here, there in zip(results[0].stats, results[1].stats, strict=True):
            assert here.equal(there)
        if results[0].logits_grad is not None:
            assert results[0].logits_grad.equal(results[1].logits_grad)


@on_every_engine
@pytest.mark.parametrize("way", EVERY_WAY)
@small
def test_two_runs_are_equal_to_the_last_bit_and_so_are_rows_in_another_order(run, way):
    torch.manual_seed(0)
    logits, tokens, order = torch.randn(7, WIDTH) * 3, torch.randint(WIDTH, (7,)), torch.randperm(7)
    weights = weights_of(way, 7)
    first, second = (way(run, logits, tokens, *weights) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first.tensors(), second.tensors(), strict=True))
    other = way(run, logits[order], tokens[order], *(w[order] for w in weights))
    assert all(a[order].equal(b) for a, b in zip(first.stats, other.stats, strict=True))
    if first.logits_grad is not None:
        assert first.logits_grad[order].equal(other.logits_grad)


@small
def test_how_many_threads_share_the_tiles_changes_nothing_beyond_rounding(monkeypatch):
    """Among several not a bit; one thread alone has another exponential function."""
    torch.manual_seed(0)
    logits, tokens, weights = torch.randn(50, WIDTH), torch.randint(WIDTH, (50,)), torch.randn(2, 50)
    results = []
    for threads in (1, 2, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append([way(Runs("chunked"), logits, tokens, *weights).tensors() for way in (by_logits, by_recompute)])
    for one, two, four in zip(*map(itertools.chain.from_iterable, results), strict=True):
        assert two.equal(four)
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@on_every_engine
@pytest.mark.parametrize("tile_bytes", [1, 1000, 2**20, 2**26])
def test_a_tile_is_no_larger_than_asked_for(run, tile_bytes):
    for rows, columns, itemsize in itertools.product((1, 37, 8192, 10**5), (1, 50, 151_936), (2, 4)):
        height, width = engine_of(run).product_tile(rows, columns, itemsize, tile_bytes)
        assert 1 <= height <= rows
        assert 1 <= width <= max(columns, 2048)
        assert height * width * itemsize <= max(tile_bytes, itemsize)


# Broken rows


@on_every_engine
@pytest.mark.parametrize("way", [by_logits, functools.partial(by_tiles, width=BLOCK)], ids=["by_logits", "by_tiles"])
@small
def test_broken_rows_are_nan_in_every_field_and_leave_the_others_alone(run, way):
    torch.manual_seed(0)
    clean = torch.randn(9, WIDTH)
    broken = {
        **{f"nan at {at}": put(clean[0], at, nan) for at in (0, 20, WIDTH - 1)},
        **{f"inf at {at}": put(clean[0], at, inf) for at in (0, 20, WIDTH - 1)},
        "nan after the maximum": put(put(clean[0], 0, 50.0), 20, nan),
        "nan before the maximum": put(put(clean[0], 3, nan), WIDTH - 1, 50.0),
        "nan in the maximum's lane": put(put(clean[0], 4, nan), 4 + BLOCK, 50.0),
        "all nan": torch.full((WIDTH,), nan),
        "all inf": torch.full((WIDTH,), inf),
        "all -inf": torch.full((WIDTH,), -inf),
        "nan among -inf": put(torch.full((WIDTH,), -inf), 20, nan),
        "nan and inf": put(put(clean[0], 5, nan), 20, inf),
        "inf and -inf": put(put(clean[0], 5, -inf), 20, inf),
    }
    tokens = torch.tensor([20, *[0, 20, WIDTH - 1] * 5, 7])  # the broken number itself, and others
    logits = torch.stack([clean[1], *broken.values(), clean[2]])
    weights = torch.ones(2, len(logits))
    result = way(run, logits, tokens, *weights)
    alone = way(run, clean[[1, 2]], tokens[[0, -1]], *weights[:, :2])
    for field, value, expected in zip(TokenStats._fields, result.stats, alone.stats, strict=True):
        assert [name for name, x in zip(broken, value[1:-1].tolist(), strict=True) if not math.isnan(x)] == [], field
        assert value[[0, -1]].equal(expected), field
    if result.logits_grad is not None:
        assert result.logits_grad[[0, -1]].equal(alone.logits_grad)


@on_every_engine
@pytest.mark.parametrize("mode", ["recompute", "frozen", "callback"])
@small
def test_broken_hidden_states_are_nan_alone_and_so_are_their_gradients(run, mode):
    torch.manual_seed(0)
    hidden, weight, tokens = torch.randn(5, 4), torch.randn(WIDTH, 4), torch.randint(WIDTH, (5,))
    hidden[1, 2], hidden[3, 0] = nan, inf
    stats, gradients = through_the_head(run, mode, hidden, weight, tokens, weights_of(by_frozen, 5), check=False)
    clean = [0, 2, 4]
    alone, expected = through_the_head(
        run, mode, hidden[clean], weight, tokens[clean], [w[clean] for w in weights_of(by_frozen, 5)]
    )
    for value, other in zip(stats, alone, strict=True):
        assert value.isnan().tolist() == [False, True, False, True, False]
        torch.testing.assert_close(value[clean], other, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradients["hidden"][clean], expected["hidden"], rtol=1e-5, atol=1e-6)


# Heads


def through_the_head(run, mode, hidden, weight, tokens, weights, bias=None, **settings: Any):
    """Statistics, and gradients of Σ `weights[0]` log p_a + `weights[1]` H by the names of what they belong to."""
    trained = ["hidden"] if mode.startswith("frozen") else ["hidden", "weight", "bias"]
    given = {"hidden": hidden, "weight": weight, "bias": bias}
    given = {name: x.to(run.device, copy=True) for name, x in given.items() if x is not None}
    leaves = {name: x.requires_grad_() for name, x in given.items() if name in trained}
    g, h = (w.to(run.device) for w in weights)
    settings = {"implementation": run.name, **settings}
    tokens = tokens.to(run.device)
    if mode == "callback":
        weight = given.pop("weight")
        total, stats = linear_token_loss(
            given.pop("hidden"),
            weight,
            tokens,
            lambda stats, rows: (g[rows] * stats.logp + h[rows] * stats.entropy).sum(),
            chunk_bytes=3 * weight.element_size() * len(weight),
            **given,
            **settings,
        )
    else:
        entropy_grad = mode != "frozen"
        tiles = 3 * BLOCK * given["hidden"].element_size()
        stats = linear_token_stats(tokens=tokens, entropy_grad=entropy_grad, tile_bytes=tiles, **given, **settings)
        total = (g * stats.logp + (h * stats.entropy if entropy_grad else 0)).sum()
    total.backward()
    return TokenStats(*(x.detach() for x in stats)), {name: x.grad for name, x in leaves.items()}


def by_autograd(hidden, weight, tokens, weights, bias=None, temperature=1.0, softcap=None, logit_scale=1.0):
    """The same in float64, by torch's own operations."""
    leaves = {"hidden": hidden, "weight": weight, "bias": torch.zeros(len(weight)) if bias is None else bias}
    leaves = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    z = logit_scale * (leaves["hidden"] @ leaves["weight"].T + leaves["bias"])
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logp = torch.log_softmax(z / temperature, -1)
    sampled = logp.gather(-1, tokens[:, None])[:, 0]
    entropy = torch.special.entr(logp.exp()).sum(-1)
    (weights[0].double() * sampled + weights[1].double() * entropy).sum().backward()
    return reference_token_stats(z.detach(), tokens, temperature), {name: x.grad for name, x in leaves.items()}


HEADS = {
    "plain": {},
    "scaled": {"bias": True, "logit_scale": 0.25, "temperature": 0.7},
    "capped": {"softcap": 3.0, "temperature": 1.3},
    "all": {"bias": True, "softcap": 5.0, "logit_scale": 2.0, "temperature": 0.7},
}


@on_every_engine
@pytest.mark.parametrize("mode", ["recompute", "frozen", "frozen, but for the entropy", "callback"])
@pytest.mark.parametrize("head", HEADS)
@small
def test_head_statistics_and_gradients_are_those_of_autograd_in_float64(run, mode, head):
    torch.manual_seed(0)
    settings = dict(HEADS[head])
    hidden, weight, tokens = torch.randn(7, 4) * 2, torch.randn(WIDTH, 4), torch.randint(WIDTH, (7,))
    bias = torch.randn(WIDTH) if settings.pop("bias", False) else None
    weights = weights_of(by_frozen if mode == "frozen" else by_logits, 7)
    stats, gradients = through_the_head(run, mode, hidden, weight, tokens, weights, bias, **settings)
    reference, expected = by_autograd(hidden, weight, tokens, weights, bias, **settings)
    for field, ours, theirs in zip(TokenStats._fields, stats, reference, strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-5, atol=1e-6, msg=field)
    for name, gradient in gradients.items():
        error = (gradient.cpu() - expected[name]).abs().max()
        assert error <= 2e-6 * expected[name].abs().max(), name


@on_every_engine
@small
def test_a_loss_by_chunks_has_the_gradients_of_the_recomputed_head(run):
    torch.manual_seed(0)
    hidden, weight, tokens = torch.randn(9, 4), torch.randn(WIDTH, 4), torch.randint(WIDTH, (9,))
    weights, bias = weights_of(by_logits, 9), torch.randn(WIDTH)
    results = [
        through_the_head(run, mode, hidden, weight, tokens, weights, bias, softcap=4.0)
        for mode in ("recompute", "callback")
    ]
    for ours, theirs in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-5, atol=1e-5, msg=name)


def wide(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("masked", [False, True])
@small
def test_the_numerical_derivative_confirms_the_gradients_of_the_logits(masked):
    torch.manual_seed(0)
    logits, tokens = wide(3, BLOCK + 3), torch.tensor([2, 9, BLOCK])
    mask = torch.tensor([True, False, True]) if masked else None
    vocab_size = BLOCK + 1 if masked else None

    def statistics(z):
        stats = token_stats(z, tokens, temperature=0.7, mask=mask, vocab_size=vocab_size, entropy_grad=True)
        return stats.logp, stats.entropy

    assert torch.autograd.gradcheck(statistics, logits, fast_mode=True)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("mode", ["recompute", "frozen"])
@small
def test_the_numerical_derivative_confirms_the_gradients_of_the_head(mode, head):
    torch.manual_seed(0)
    settings, trained = dict(HEADS[head]), mode == "recompute"
    inputs = [wide(3, 2), wide(7, 2), *([wide(7)] if settings.pop("bias", False) else [])]
    tokens = torch.tensor([0, 6, 3])
    fixed = () if trained else tuple(x.detach() for x in inputs[1:])

    def statistics(hidden, *head_of):
        weight, bias = (*head_of, *fixed, None)[:2]
        stats = linear_token_stats(
            hidden, weight, tokens, bias=bias, entropy_grad=trained, tile_bytes=2 * 8 * 3, **settings
        )
        return (stats.logp, stats.entropy) if trained else stats.logp

    inputs = inputs if trained else inputs[:1]
    assert torch.autograd.gradcheck(statistics, tuple(inputs), fast_mode=True, check_undefined_grad=trained)


@pytest.mark.parametrize("head", HEADS)
@small
def test_the_numerical_derivative_confirms_the_gradients_of_a_loss_by_chunks(head):
    """By hand: gradcheck goes backward many times, and this loss once."""
    torch.manual_seed(0)
    settings = dict(HEADS[head])
    inputs = [wide(3, 2), wide(7, 2), *([wide(7)] if settings.pop("bias", False) else [])]
    tokens, (g, h) = torch.tensor([0, 6, 3]), torch.randn(2, 3).double()

    def loss(stats, rows):
        return (g[rows] * stats.logp.exp() + h[rows] * stats.logp * stats.entropy).sum()

    def total():
        hidden, weight, bias = (*inputs, None)[:3]
        return linear_token_loss(hidden, weight, tokens, loss, bias=bias, chunk_bytes=2 * 8 * 7, **settings)[0]

    total().backward()
    for x in inputs:
        start = x.detach().clone()
        for direction in torch.randn(3, *x.shape).double():
            ends = []
            for step in (1e-5, -1e-5):
                x.data = start + step * direction
                ends.append(total().item())
            x.data = start
            slope = (ends[0] - ends[1]) / 2e-5
            assert abs((x.grad * direction).sum().item() - slope) <= 1e-8 * (1 + abs(slope))


def test_a_frozen_head_takes_a_gradient_that_was_left_out():
    class Ignore(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.set_materialize_grads(False)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    hidden = torch.randn(2, 3, requires_grad=True)
    stats = linear_token_stats(hidden, torch.randn(5, 3), torch.tensor([0, 1]))
    Ignore.apply(stats.logp).sum().backward()
    assert hidden.grad is None or (hidden.grad == 0).all()


def rows_of(dtype: torch.dtype) -> dict[str, tuple[torch.Tensor, int]]:
    """Every kind of row, and those that 16-bit types and their shortcuts could get wrong, in numbers of the type."""
    rows = finite_rows(WIDTH) | rows_with_infinities(WIDTH)
    torch.manual_seed(0)
    first, middle, last = 0, WIDTH // 2, WIDTH - 1
    lowest, highest = torch.finfo(dtype).min, torch.finfo(dtype).max
    rows["all the lowest"] = torch.full((WIDTH,), lowest), first
    rows["one above the lowest"] = put(rows["all the lowest"][0], middle, 3.0), middle
    rows["the lowest and -inf"] = put(rows["all the lowest"][0], slice(5, None, 3), -inf), first
    rows["the highest and -inf"] = put(put(torch.randn(WIDTH), first, -inf), last, highest), last
    rows["far below"] = torch.linspace(-0.5, -0.25, WIDTH) * highest, last
    for offset in (-3e4, -999.0, 17.3, 255.0, 4096.0, 3e4, 1e6, -1e20, 1e20):
        z = torch.randn(WIDTH) * abs(offset) ** 0.5 + offset  # neighbours in the type lie many nats or none apart
        rows[f"offset {offset}"] = z, middle
        rows[f"offset {offset}, ascending"] = z.sort().values, last
        rows[f"offset {offset}, two tie far above"] = put(put(z, first, z.max() + 99), last, z.max() + 99), middle
    short = {name: (z.to(dtype), token) for name, (z, token) in rows.items()}
    return {name: (z, token) for name, (z, token) in short.items() if (z < inf).all() and (z > -inf).any()}


TEMPERATURES = [1.0, 0.03, 700.0]


@on_every_engine
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@small
def test_16_bit_logits_give_the_statistics_of_the_same_numbers(run, dtype, temperature):
    rows = [*rows_of(dtype).items()]
    if run.name == "triton":  # its interpreter takes its time: every row at one of the temperatures
        torch.manual_seed(0)
        rows = [rows[i] for i in torch.randperm(len(rows)).tolist()[TEMPERATURES.index(temperature) :: 3]]
    short, tokens, names = stacked(dict(rows))
    near = (short.float().gather(1, tokens[:, None])[:, 0] - short.float().amax(1)) / temperature > -1e38
    short, tokens, names = short[near], tokens[near], [n for n, kept in zip(names, near.tolist(), strict=True) if kept]
    z, ids = short.to(run.device), tokens.to(run.device)
    stats = token_stats(z, ids, temperature=temperature, implementation=run.name, check=False)
    assert all(x.dtype == torch.float32 for x in stats)
    assert_accurate(stats, Exact(short, tokens, temperature), names)


@on_every_engine
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@small
def test_16_bit_logits_give_the_gradients_of_the_same_numbers(run, dtype):
    torch.manual_seed(0)
    short = (torch.randn(4, WIDTH) * 4).to(dtype)
    tokens, weights = torch.randint(WIDTH, (4,)), torch.randn(2, 4)
    ours, theirs = (by_logits(run, z, tokens, *weights) for z in (short, short.float()))
    assert ours.logits_grad.dtype == dtype
    # One step of the type: Triton's interpreter cuts off what the others round.
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(ours.logits_grad.float(), theirs.logits_grad, rtol=step, atol=1e-7)


@on_every_engine
@small
def test_a_16_bit_head_gives_the_statistics_of_the_logits_the_model_itself_makes(run):
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 16).bfloat16().to(run.device), torch.randn(40, 16).bfloat16().to(run.device)
    weight.requires_grad_()
    tokens = torch.randint(40, (40,)).to(run.device)
    logits = torch.nn.functional.linear(hidden, weight).detach().float().requires_grad_()
    ours = linear_token_stats(hidden, weight, tokens, tile_bytes=1024, implementation=run.name)
    theirs = token_stats(logits, tokens, implementation="chunked")
    for field, a, b in zip(TokenStats._fields, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=field)
    ours.logp.sum().backward()
    theirs.logp.sum().backward()
    # Many tiles, one rounding: within a bfloat16 step of the exact sum; summed in bfloat16 it would drift.
    torch.testing.assert_close(weight.grad.float(), logits.grad.T @ hidden.float(), rtol=2**-8, atol=1e-5)


@on_every_engine
@pytest.mark.parametrize("mode", ["recompute", "frozen", "callback"])
@small
def test_float32_logits_of_a_16_bit_head_are_not_rounded(run, mode):
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 16).bfloat16(), torch.randn(WIDTH, 16).bfloat16()
    tokens, weights = torch.randint(WIDTH, (7,)), weights_of(by_frozen, 7)
    stats, gradients = through_the_head(run, mode, hidden, weight, tokens, weights, logits_dtype=torch.float32)
    reference, expected = by_autograd(hidden.float(), weight.float(), tokens, weights)
    for field, ours, theirs in zip(TokenStats._fields, stats, reference, strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-5, atol=1e-6, msg=field)
    for name, gradient in gradients.items():
        error = (gradient.cpu().double() - expected[name]).abs()
        assert (error <= 2**-8 * expected[name].abs() + 1e-6).all(), name


@on_every_engine
@small
def test_a_frozen_head_in_float32_gives_16_bit_hidden_states_the_gradient_of_the_trained_one(run):
    torch.manual_seed(0)
    hidden, weight, tokens = torch.randn(7, 16).bfloat16(), torch.randn(WIDTH, 16), torch.randint(WIDTH, (7,))
    gradients = []
    for trained in (False, True):
        h = hidden.float().to(run.device).requires_grad_()
        w = weight.to(run.device, copy=True).requires_grad_(trained)
        with torch.autocast(run.device, torch.bfloat16):
            stats = linear_token_stats(h, w, tokens.to(run.device), implementation=run.name)
        stats.logp.sum().backward()
        gradients.append(h.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@on_every_engine
@pytest.mark.parametrize("tile_bytes", [None, 4 * BLOCK])
@small
def test_a_soft_cap_makes_a_bias_of_minus_infinity_its_lowest_logit(run, tile_bytes):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(2, 4), torch.randn(WIDTH, 4), torch.zeros(WIDTH)
    bias[20] = -inf
    tokens = torch.tensor([20, 3])
    inputs = (x.to(run.device) for x in (hidden, weight, tokens))
    stats = linear_token_stats(
        *inputs, bias=bias.to(run.device), softcap=3.0, tile_bytes=tile_bytes, implementation=run.name
    )
    expected = reference_token_stats(3 * torch.tanh((hidden @ weight.T + bias) / 3), tokens)
    for ours, theirs in zip(stats, expected, strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-5, atol=1e-6)


@on_every_engine
@pytest.mark.parametrize("mode", ["recompute", "frozen", "callback"])
@small
def test_a_bias_of_minus_infinity_takes_tokens_out_of_a_head(run, mode):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(5, 4), torch.randn(WIDTH, 4), torch.randn(WIDTH)
    bias[: BLOCK + 4] = bias[-2:] = -inf
    tokens, weights = torch.tensor([21, 33, 25, 3, 30]), weights_of(by_frozen, 5)
    stats, gradients = through_the_head(run, mode, hidden, weight, tokens, weights, bias)
    exact = Exact(hidden.double() @ weight.double().T + bias.double(), tokens)
    for field, value in zip(TokenStats._fields, stats, strict=True):
        expected = torch.from_numpy(exact.values[field].astype("float64"))
        torch.testing.assert_close(value.cpu().double(), expected, rtol=1e-5, atol=1e-6, msg=field)
    gradient = torch.from_numpy(exact.gradient(*weights)[0].astype("float64"))
    torch.testing.assert_close(gradients["hidden"].cpu().double(), gradient @ weight.double(), rtol=1e-5, atol=1e-6)
    if mode != "frozen":
        torch.testing.assert_close(gradients["bias"].cpu().double(), gradient.sum(0), rtol=1e-5, atol=1e-6)
        assert gradients["weight"][-2:].tolist() == [[0] * 4] * 2


# Soft caps


def confident_rows(count: int, V: int) -> dict[str, tuple[torch.Tensor, int]]:
    """Rows whose mode lies 5 to 60 below an infinity that a cap brings nearer; the mode or another token is sampled."""
    torch.manual_seed(0)
    z, top = torch.randn(count, V) * 3, torch.randint(V, (count,))
    z[torch.arange(count), top] = z.amax(-1) + 5 + 55 * torch.rand(count)
    another = (top + 1 + torch.randint(V - 1, (count,))) % V
    return {f"{i}": (z[i], int(top[i] if i % 4 else another[i])) for i in range(count)}


@on_every_engine
@pytest.mark.parametrize(
    ("way", "softcap", "temperature"),
    [
        pytest.param(functools.partial(by_recompute, tile_bytes=2**16), 30.0, 1.0, id="by_recompute"),
        pytest.param(by_callback, 50.0, 0.7, id="by_callback"),
        pytest.param(functools.partial(by_frozen, tile_bytes=2**16), 5.0, 1.0, id="by_frozen"),
    ],
)
def test_confident_rows_under_a_soft_cap_keep_the_digits_of_their_tails(run, way, softcap, temperature):
    """The sampled token is the mode exactly where it is, whichever tile and whichever tanh its logit went through."""
    rows = confident_rows(*((10, WIDTH) if run.name == "triton" else (400, 200)))  # its interpreter takes its time
    assert_right(way, run, rows, temperature, softcap=softcap)


@on_every_engine
@pytest.mark.parametrize("way", [by_recompute, by_frozen])
@small
def test_every_kind_of_row_is_right_under_a_soft_cap(run, way):
    """Ties and near ties, uniform and saturated rows, gaps far beyond the cap; a bend of 1e-8 has its digits too."""
    some = slice(None, None, 3 if run.name == "triton" else 1)
    assert_right(way, run, dict([*finite_rows(WIDTH).items()][some]), softcap=30.0, nat=True)


@on_every_engine
@pytest.mark.parametrize("mode", ["recompute", "frozen", "callback"])
def test_a_capped_mode_that_is_sampled_leaves_nothing_to_move(run, mode):
    """x = 25.1 and -25.1 under a cap of 30: d = 60 tanh(25.1 / 30) = 41.096 nats, r = e^-d = 1.4197e-18.

    log p_a = -r; with p_a = 1 and d̄ = -r d: T = -r (0 - d̄) + r² (-d - d̄) = -2 d r². ∂log p_a/∂x_a = r (1 - tanh²).
    """
    mp.dps = 60
    d = 60 * mp.tanh(mp.mpf(25.1) / 30)
    r, bend = mp.exp(-d), 1 - mp.tanh(mp.mpf(25.1) / 30) ** 2
    stats, gradients = through_the_head(
        run, mode, torch.tensor([[25.1]]), torch.tensor([[1.0], [-1.0]]), torch.tensor([0]),
        torch.tensor([[1.0], [0.0]]), softcap=30.0,
    )  # fmt: skip
    assert stats.logp.item() == pytest.approx(float(-r), rel=1e-5)
    assert stats.sensitivity.item() == pytest.approx(float(-2 * d * r**2), rel=1e-5)
    assert gradients["hidden"].item() == pytest.approx(float(2 * r * bend), rel=1e-5)


@on_every_engine
@pytest.mark.parametrize("at", [(0, WIDTH - 1), (3, 4), (BLOCK - 1, BLOCK)])
@small
def test_equal_logits_stay_equal_under_a_cap_in_whatever_tiles_they_are(run, at):
    """Two modes far above all others: p = 1/2 each and d = 0 exactly, so that |T| <= e^-40."""
    torch.manual_seed(0)
    rows = 4 if run.name == "triton" else 64
    logits = torch.randn(rows, WIDTH)
    logits[:, at] = 40 * torch.rand(rows, 1) + 60
    tokens = torch.tensor(at * (rows // 2))
    for way in (by_recompute, by_callback):
        result = way(run, logits, tokens, *weights_of(way, rows), softcap=50.0)
        assert (result.stats.logp + math.log(2)).abs().max() < 1e-7
        assert result.stats.sensitivity.abs().max() < 1e-12


@pytest.mark.parametrize("mode", ["recompute", "frozen", "callback"])
@small
def test_a_capped_head_in_float64_has_the_digits_of_float64(mode):
    torch.manual_seed(0)
    hidden, weight, tokens = torch.randn(40, 4).double() * 5, torch.randn(WIDTH, 4).double(), torch.zeros(40).long()
    tokens = (hidden @ weight.T).argmax(-1)
    weights = [w.double() for w in weights_of(by_frozen, 40)]
    stats, gradients = through_the_head(Runs("chunked"), mode, hidden, weight, tokens, weights, softcap=30.0)
    exact = Exact(hidden @ weight.T, tokens, softcap=30.0)
    for field, value in zip(TokenStats._fields, stats, strict=True):
        error = abs(value.numpy() - exact.values[field])
        assert (error <= 1e-11 * exact.scales[field] + 1e-300).all(), field
    gradient, scale = exact.gradient(*weights)
    error = abs(gradients["hidden"].numpy() - gradient @ weight.numpy())
    assert (error <= 1e-11 * scale @ abs(weight.numpy())).all()


@on_every_engine
@pytest.mark.parametrize("mode", ["recompute", "callback"])
@small
def test_a_capped_head_in_bfloat16_finds_the_mode_of_its_own_logits(run, mode):
    torch.manual_seed(0)
    weight = torch.randn(WIDTH, 16).bfloat16()
    hidden = weight[: 8 if run.name == "triton" else WIDTH] * 1.5
    logits = torch.nn.functional.linear(hidden, weight)
    tokens = logits.argmax(-1)
    stats, _ = through_the_head(run, mode, hidden, weight, tokens, weights_of(by_frozen, len(tokens)), softcap=30.0)
    exact = Exact(logits, tokens, softcap=30.0)
    assert exact.values["logp"].max() > -1e-3
    assert_accurate(stats, exact)


# Masks and layouts


def assert_masked(stats: TokenStats, mask: torch.Tensor, kept: TokenStats) -> None:
    for field, value, expected in zip(TokenStats._fields, stats, kept, strict=True):
        assert value[mask].equal(expected), field
        assert (value[~mask] == 0).all(), field


@on_every_engine
@pytest.mark.parametrize("keep", ["some", "all", "none"])
@small
def test_masked_rows_give_zeros_and_no_gradient_whatever_they_hold(run, keep):
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 6, WIDTH), torch.randint(WIDTH, (2, 6))
    mask = {"some": torch.rand(2, 6) < 0.5, "all": torch.ones(2, 6) == 1, "none": torch.ones(2, 6) == 0}[keep]
    logits[~mask] = torch.tensor([nan, inf, -inf] * 2)[: 12 - int(mask.sum()), None] if keep == "some" else nan
    tokens[~mask] = -100
    logits, tokens, mask = (x.to(run.device) for x in (logits, tokens, mask))
    for view in (logits, logits[:, :-1]):  # and a view that is no matrix
        z, kept = view.detach().requires_grad_(), mask[:, : view.shape[1]]
        ids = tokens[:, : view.shape[1]]
        stats = token_stats(z, ids, mask=kept, entropy_grad=True, implementation=run.name)
        alone = view.detach()[kept].requires_grad_()
        expected = token_stats(alone, ids[kept], entropy_grad=True, implementation=run.name)
        assert_masked(stats, kept, expected)
        (gradient,) = torch.autograd.grad((stats.logp * 2 + stats.entropy).sum(), z)
        (of_kept,) = torch.autograd.grad((expected.logp * 2 + expected.entropy).sum(), alone)
        assert gradient[kept].equal(of_kept)
        assert (gradient[~kept] == 0).all()


@on_every_engine
@pytest.mark.parametrize("keep", [[0, 2, 5], []], ids=["some", "none"])
@pytest.mark.parametrize("mode", ["recompute", "frozen"])
@small
def test_masked_hidden_states_give_zeros_and_no_gradient_whatever_they_hold(run, mode, keep):
    torch.manual_seed(0)
    hidden, weight, tokens = torch.randn(6, 4), torch.randn(WIDTH, 4), torch.randint(WIDTH, (6,))
    mask = torch.zeros(6, dtype=torch.bool)
    mask[keep] = True
    hidden[1], hidden[3], tokens[~mask] = nan, inf, -100
    weights = weights_of(by_frozen, 6)
    stats, gradients = through_the_head(run, mode, hidden, weight, tokens, weights, mask=mask.to(run.device))
    alone, expected = through_the_head(run, mode, hidden[mask], weight, tokens[mask], [w[mask] for w in weights])
    assert_masked(stats, mask, alone)
    assert gradients["hidden"][mask].equal(expected["hidden"])
    assert (gradients["hidden"][~mask] == 0).all()
    if mode == "recompute":
        assert gradients["weight"].equal(expected["weight"])


@on_every_engine
@pytest.mark.parametrize("padding", [5.0, nan, inf])
@small
def test_columns_beyond_the_vocabulary_are_not_there(run, padding):
    torch.manual_seed(0)
    logits, tokens = torch.randn(4, WIDTH), torch.tensor([0, 29, 20, 7])
    logits[:, 30:] = padding
    logits = logits.to(run.device).requires_grad_()
    sliced = logits.detach()[:, :30].clone().requires_grad_()
    tokens = tokens.to(run.device)
    stats = token_stats(logits, tokens, vocab_size=30, entropy_grad=True, implementation=run.name)
    expected = token_stats(sliced, tokens, entropy_grad=True, implementation=run.name)
    assert all(a.equal(b) for a, b in zip(stats, expected, strict=True))
    (gradient,) = torch.autograd.grad((stats.logp + stats.entropy).sum(), logits)
    (of_sliced,) = torch.autograd.grad((expected.logp + expected.entropy).sum(), sliced)
    assert gradient[:, :30].equal(of_sliced)
    assert (gradient[:, 30:] == 0).all()


@on_every_engine
@pytest.mark.parametrize("mode", ["recompute", "frozen", "callback"])
@small
def test_rows_of_a_head_beyond_the_vocabulary_are_not_there(run, mode):
    torch.manual_seed(0)
    hidden, weight, bias, tokens = torch.randn(4, 4), torch.randn(WIDTH, 4), torch.randn(WIDTH), torch.randint(30, (4,))
    weight[30:], bias[30:] = nan, inf
    weights = weights_of(by_frozen if mode == "frozen" else by_logits, 4)
    stats, gradients = through_the_head(run, mode, hidden, weight, tokens, weights, bias, vocab_size=30)
    alone, expected = through_the_head(run, mode, hidden, weight[:30], tokens, weights, bias[:30])
    assert all(a.equal(b) for a, b in zip(stats, alone, strict=True))
    for name, gradient in gradients.items():
        if name == "hidden":
            assert gradient.equal(expected[name])
        else:
            assert gradient[:30].equal(expected[name])
            assert (gradient[30:] == 0).all()


def layouts(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Views of logits (2, 3, V) that no `view` makes a matrix, or whose numbers do not lie side by side."""
    return {
        "without the last position": logits[:, :-1],
        "without the first position": logits[:, 1:],
        "every other position": logits[:, ::2],
        "positions before responses": logits.transpose(0, 1),
        "vocabulary first": logits.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "a slice of the vocabulary": logits[..., 3:-2],
        "every other token": logits[..., ::2],
        "one row for all": logits[:1, :1].expand(2, 2, -1),
        "one response for all": logits[:1].expand(2, -1, -1),
        "one position for all": logits[:, :1].expand(-1, 2, -1),
        "four dimensions": logits[None, :, :-1].expand(2, -1, -1, -1),
        "one state": logits[1, 2],
        "one state, spread": logits[1, 2, ::3],
        "no states": logits[:, :0],
    }


@on_every_engine
@pytest.mark.parametrize("layout", layouts(torch.zeros(2, 3, BLOCK + 5)))
@small
def test_results_do_not_depend_on_how_the_logits_lie_in_memory(run, layout):
    torch.manual_seed(0)
    view = layouts(torch.randn(2, 3, BLOCK + 5).to(run.device))[layout]
    tokens = torch.randint(view.shape[-1], view.shape[:-1]).to(run.device)
    results = []
    for z in (view, view.contiguous()):
        z = z.detach().requires_grad_()
        stats = token_stats(z, tokens, entropy_grad=True, implementation=run.name)
        assert all(field.shape == tokens.shape for field in stats)
        results.append([*stats, *torch.autograd.grad((stats.logp + stats.entropy).sum(), z)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.equal(theirs)


@on_every_engine
@small
def test_results_do_not_depend_on_how_the_ids_lie_in_memory(run):
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 4).to(run.device) for n in (4, WIDTH))
    for tokens in (torch.randint(WIDTH, (4, 3))[:, 1], torch.tensor(2).expand(4), torch.randint(WIDTH, (8,))[::2]):
        results = []
        for ids in (tokens.to(run.device), tokens.contiguous().to(run.device)):
            direct = token_stats(hidden @ weight.T, ids, implementation=run.name)
            head = linear_token_stats(hidden, weight, ids, implementation=run.name)
            _, chunked = linear_token_loss(hidden, weight, ids, minus_logp, implementation=run.name)
            results.append([*direct, *head, *chunked])
        assert all(a.equal(b) for a, b in zip(*results, strict=True))


def minus_logp(stats, rows):
    return -stats.logp.sum()


@pytest.fixture
def no_memory_is_left_as_it_was():
    """What is not filled is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("no_memory_is_left_as_it_was")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@on_every_engine
def test_no_rows_go_through_every_head(run, dtype):
    weight = torch.randn(5, 3, dtype=dtype)
    none = torch.zeros(0, dtype=torch.long)
    for mode in ("recompute", "frozen", "callback"):
        hidden = torch.randn(0, 3, dtype=dtype)
        stats, gradients = through_the_head(run, mode, hidden, weight, none, torch.zeros(2, 0))
        assert [field.shape for field in stats] == [(0,)] * 7
        assert gradients["hidden"].shape == (0, 3)
        if mode != "frozen":
            assert gradients["weight"].tolist() == torch.zeros(5, 3).tolist()


# The algebra of states


def state_of(z: torch.Tensor, sampled: float = -inf, temperature: float = 1.0) -> torch.Tensor:
    """The state (6, 1) of logits (V,), from its definition in kernels/state.py."""
    if not len(z) or z.max() == -inf:
        return torch.tensor([[-inf, 0, 0, 0, 0, sampled]], dtype=torch.float64).t()
    mode = int(z.argmax())
    d = torch.cat([z[:mode], z[mode + 1 :]]).sub(z[mode]).div(temperature)
    e, d = d.exp(), d.masked_fill(d == -inf, 0)
    sums = [e.sum(), (e * d).sum(), e.square().sum(), (e.square() * d).sum()]
    return torch.tensor([[z[mode], *sums, sampled]], dtype=torch.float64).t()


LOGIT = st.one_of(st.integers(-2, 2).map(float), st.floats(-60, 60), st.just(-inf))


@given(
    st.lists(st.tuples(LOGIT, st.integers(0, 3)), min_size=1, max_size=10),
    st.permutations(range(4)),
    st.data(),
    st.sampled_from([0.7, 1.0]),
)
def test_states_of_disjoint_parts_merge_into_the_state_of_the_whole(columns, order, data, temperature):
    """Any split, in any order, one by one or all at once; parts may be empty or all -inf, and maxima may tie."""
    head = Head(temperature)
    z = torch.tensor([value for value, _ in columns], dtype=torch.float64)
    part_of = torch.tensor([part for _, part in columns])
    token = data.draw(st.integers(0, len(z) - 1))
    parts = torch.stack(
        [state_of(z[part_of == k], float(z[token]) if part_of[token] == k else -inf, temperature) for k in order]
    )
    whole = state_of(z, float(z[token]), temperature)
    at_once = merge(parts, head)
    one_by_one = functools.reduce(lambda a, b: merge(torch.stack([a, b]), head), parts)
    in_pairs = merge(torch.stack([merge(parts[:2], head), merge(parts[2:], head)]), head)
    for merged in (at_once, one_by_one, in_pairs):
        torch.testing.assert_close(merged, whole, rtol=1e-12, atol=1e-30)
    if z.max() > -inf:
        expected = reference_token_stats(z[None], torch.tensor([token]), temperature)
        torch.testing.assert_close(finish(at_once, head), torch.stack(expected), rtol=1e-10, atol=1e-12)
    else:
        assert finish(at_once, head).isnan().all()


@pytest.mark.parametrize("broken", [[nan, 0.0], [0.0, nan], [inf, 0.0], [0.0, inf], [inf, inf], [nan, -inf]])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_a_broken_part_makes_its_row_nan_and_no_other(broken, order):
    rows = [torch.tensor([[*values, 0.0, 1.0]], dtype=torch.float64) for values in (broken, [3.0, 3.0])]
    states = []
    for z in rows:
        parts = []
        for start, stop in ((0, 1), (1, 2), (2, 4)):
            state, _ = empty_state(1, torch.float64, z.device)
            tile = Tile(z[:, start:stop], torch.tensor([3]), Head(), start)
            engine_named("chunked", "cpu").fold(tile, state, None, keep=True)
            parts.append(state)
        states.append(torch.stack([parts[i] for i in order]))
    stats = finish(merge(torch.cat(states, -1), Head()), Head())
    assert stats.isnan().tolist() == [[True, False]] * 7


@on_every_engine
@small
def test_a_vocabulary_split_over_ranks_gives_the_statistics_of_the_whole(run):
    """Each rank folds its own vocabulary slice into a state; the states merge in the order they arrive in."""
    logits, tokens, names = stacked(
        dict(itertools.islice(finite_rows(WIDTH).items(), 0, None, 4)) | rows_with_infinities(WIDTH)
    )
    states = []
    for start, stop in ((21, WIDTH), (0, BLOCK + 4), (BLOCK + 4, 21)):
        tile = Tile(logits[:, start:stop].to(run.device, copy=True), tokens.to(run.device), Head(), start)
        state, _ = empty_state(len(logits), torch.float32, tile.logits.device)
        engine_of(run).fold(tile, state, None, keep=False)
        states.append(state)
    stats = TokenStats(*finish(merge(torch.stack(states), Head()), Head()))
    assert_accurate(stats, Exact(logits, tokens), names)
