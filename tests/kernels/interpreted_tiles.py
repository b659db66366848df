"""The tiled kernels against the definition. Run by `test_tiles.py` in a process with Triton's interpreter, which is
chosen when Triton is imported.
"""

import os

import pytest
import torch
from core.tiny import off_zero
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lorry
from lorry.kernels.lowrank import low_rank_linear, reference
from lorry.kernels.segments import LowRankPair, Segment
from lorry.kernels.tiled import tiled_linear
from lorry.kernels.tiles import tile_table

CPU = torch.device("cpu")
EXACT = {"atol": 1e-10, "rtol": 1e-10}


def drawer(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def tiled(height=16):
    """The kernels with tiles of a height, as a function like `reference`."""

    def run(x, weight, bias, y, segments, factors):
        table = tile_table(len(x), x[0].numel() // x.shape[-1], segments, x.device, height)
        return tiled_linear(x, weight, bias, table, segments, factors)

    return run


def outcome(form, x, weight, bias, segments, factors, grad, frozen=()):
    """Output and gradients, None for what is frozen (0 for x, 1 and 2 for the first A and B, and so on)."""
    leaves = [t.detach().clone() for t in (x, *(t for pair in factors for t in pair))]
    for number, leaf in enumerate(leaves):
        leaf.requires_grad_(number not in frozen)
    pairs = [LowRankPair(a, b) for a, b in zip(leaves[1::2], leaves[2::2], strict=True)]
    out = form(leaves[0], weight, bias, None, segments, pairs)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def agree(found, wanted, **tolerance):
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, **tolerance)


RAGGED = [
    Segment(torch.tensor([4, 0]), 0.5, 0.1, 11),
    Segment(slice(1, 3), 2.0, 0.0, 12),
    Segment(torch.tensor([5]), 1.5, 0.3, (7 << 32) + 5, torch.tensor([-3.0])),
]


def ragged(dtype=torch.float64, ranks=(3, 20, 1), rows=7, positions=9, width=40, out=52):
    """Rows 3 and 6 have no adapter; no size divides a tile."""
    draw = drawer(0, dtype)
    factors = [(draw(rank, width), draw(out, rank)) for rank in ranks]
    return draw(rows, positions, width), draw(out, width), draw(out), RAGGED, factors, draw(rows, positions, out)


@settings(deadline=None, max_examples=10, derandomize=True)
@given(
    positions=st.integers(1, 12),
    width=st.integers(1, 50),
    out=st.integers(1, 50),
    ranks=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    drops=st.lists(st.sampled_from([0.0, 0.1]), min_size=3, max_size=3),
    bias=st.booleans(),
    frozen=st.sets(st.integers(0, 2)),
    cuts=st.lists(st.integers(0, 6), min_size=4, max_size=4),
    indices=st.booleans(),
)
def test_random_shapes_equal_the_definition_in_float64(
    positions, width, out, ranks, drops, bias, frozen, cuts, indices
):
    draw, cuts = drawer(1), sorted(cuts)
    order, segments = torch.randperm(6, generator=torch.Generator().manual_seed(2)), []
    for number, first, last in zip(range(len(ranks)), cuts, cuts[1:], strict=False):
        rows = order[first:last] if indices else slice(first, last)
        segments.append(Segment(rows, 0.5 - number, drops[number], 17 + number))
    x, weight = draw(6, positions, width), draw(out, width)
    factors = [(draw(rank, width), draw(out, rank)) for rank in ranks]
    case = (x, weight, draw(out) if bias else None, segments, factors, draw(6, positions, out))
    frozen = frozen if len(ranks) > 1 or not {1, 2} <= frozen else {0, 1}
    agree(outcome(tiled(), *case, frozen), outcome(reference, *case, frozen), **EXACT)


@pytest.mark.parametrize("height", [16, 64])
@pytest.mark.parametrize("frozen", [(), (0,), (0, 1, 3, 5), (0, 2, 4, 6)], ids=["all", "x", "x and A", "x and B"])
def test_ragged_segments_equal_the_definition(height, frozen):
    agree(outcome(tiled(height), *ragged(), frozen), outcome(reference, *ragged(), frozen), **EXACT)


@pytest.mark.parametrize("rank", [33, 70])
def test_ranks_beyond_a_block(rank):
    case = ragged(ranks=(rank, 2, 32), positions=3, width=17, out=20)
    agree(outcome(tiled(), *case), outcome(reference, *case), **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor_dtype", [torch.float32, None])
def test_half_precision_is_as_close_to_the_exact_result_as_the_definition(dtype, factor_dtype):
    x, weight, bias, segments, factors, grad = ragged(dtype)
    factors = [tuple(t.to(factor_dtype or dtype) for t in pair) for pair in factors]
    doubled = [tuple(t.double() for t in pair) for pair in factors]
    exact = outcome(reference, x.double(), weight.double(), bias.double(), segments, doubled, grad.double())
    plain = outcome(reference, x, weight, bias, segments, factors, grad)
    found = outcome(tiled(), x, weight, bias, segments, factors, grad)
    for one, other, wanted in zip(found, plain, exact, strict=True):
        assert one.dtype == other.dtype
        error, allowed = (one.double() - wanted).norm(), (other.double() - wanted).norm()
        # the interpreter cuts the low bits of a float32 off where a GPU rounds to bfloat16
        assert error <= 2 * allowed + 1e-3 * wanted.norm()


def test_gradients_are_those_of_finite_differences():
    x, weight, bias, segments, factors, _ = ragged(ranks=(2, 3, 1), positions=1, width=5, out=4)
    leaves = [t.requires_grad_() for t in (x, *(t for pair in factors for t in pair))]

    def run(x, *flat):
        pairs = [LowRankPair(a, b) for a, b in zip(flat[::2], flat[1::2], strict=True)]
        return tiled(16)(x, weight, bias, None, segments, pairs)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_a_packed_run_equals_separate_runs():
    """Segments of one packed sequence, a rank, scale and dropout of its own each (a row is a token)."""
    draw = drawer(3)
    bounds, ranks = [0, 23, 40, 72], (2, 4, 8)
    segments = [
        Segment(slice(first, last), 2.0 / rank, p, rank)
        for first, last, rank, p in zip(bounds, bounds[1:], ranks, (0.0, 0.1, 0.2), strict=False)
    ]
    x, weight, grad = draw(80, 24), draw(30, 24), draw(80, 30)
    factors = [(draw(rank, 24), draw(30, rank)) for rank in ranks]
    out, dx, *grads = outcome(tiled(), x, weight, None, segments, factors, grad)
    for number, (segment, pair) in enumerate(zip(segments, factors, strict=True)):
        part = segment.rows
        alone = Segment(None, segment.scale, segment.p, segment.seed)
        wanted = outcome(tiled(), x[part], weight, None, [alone], [pair], grad[part])
        agree([out[part], dx[part], *grads[2 * number : 2 * number + 2]], wanted, **EXACT)
    bare = slice(72, 80)
    agree([out[bare], dx[bare]], [x[bare] @ weight.t(), grad[bare] @ weight], **EXACT)


def test_the_order_of_the_segments_changes_nothing():
    x, weight, bias, segments, factors, grad = ragged()
    out, dx, *grads = outcome(tiled(), x, weight, bias, segments, factors, grad)
    order = [2, 0, 1]
    moved = [[part[i] for i in order] for part in (segments, factors)]
    other, other_dx, *others = outcome(tiled(), x, weight, bias, *moved, grad)
    assert torch.equal(out, other)
    agree([dx, *(grads[2 * i + j] for i in order for j in (0, 1))], [other_dx, *others], **EXACT)


def test_deterministic_algorithms_add_nothing_up_by_chance():
    case, before = ragged(), torch.are_deterministic_algorithms_enabled()
    wanted = outcome(tiled(), *case)
    torch.use_deterministic_algorithms(True)
    try:
        found = outcome(tiled(), *case)
    finally:
        torch.use_deterministic_algorithms(before)
    agree(found, wanted, **EXACT)


def test_kept_are_the_input_and_unpadded_rank_units():
    x, weight, bias, segments, factors, _ = ragged(torch.bfloat16)
    pairs = [LowRankPair(a.requires_grad_(), b.requires_grad_()) for a, b in factors]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        tiled()(x, weight, bias, None, segments, pairs)
    known = {t.data_ptr() for t in (x, weight, *(t for pair in factors for t in pair))}
    rest = [t for t in kept if t.data_ptr() not in known]
    assert [t.numel() for t in rest] == [9 * (2 * 3 + 2 * 20 + 1 * 1)] and rest[0].dtype == torch.bfloat16


def test_the_operation_takes_this_path_where_tiles_are_filled():
    draw = drawer(5, torch.float32)
    weight, pair = draw(8, 8), LowRankPair(draw(2, 8).requires_grad_(), draw(8, 2))
    plans = {}

    def node(rows, segments):
        out = low_rank_linear(draw(rows, 8), weight, None, None, segments, [pair] * len(segments), plans)
        return type(out.grad_fn).__name__

    assert node(60, [Segment(None, 1.0)]) == "_TiledLinearBackward"
    assert node(128, [Segment(slice(0, 64), 1.0)]) == "_TiledLinearBackward"
    assert node(20, [Segment(None, 1.0)]) == "_WholeLinearBackward"
    assert node(128, [Segment(slice(0, 8), 1.0), Segment(slice(8, 16), 1.0)]) == "_LowRankLinearBackward"
    assert node(128, [Segment(None, 1.0), Segment(None, 2.0)]) == "_LowRankLinearBackward", "rows in two segments"
    assert [len(kept[0].token) for key, kept in plans.items() if key[0] == "tiles"] == [60, 128]


def test_a_model_trains_the_same_as_on_the_processor(monkeypatch):
    """Two jobs with dropout in one batch: the same masks, so the same gradients, whichever kernels run."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 16, bias=False)), torch.randn(4, 32, 24)
    for number, name in enumerate("ab"):
        method = {"method": "lora", "rank": 2 + number, "dropout": 0.2}
        off_zero(lorry.attach(model, method, targets="all-linear", name=name, seed=number), number)
    parameters = [p for name in "ab" for p in lorry.adapters(model)[name].parameters()]

    def step():
        with lorry.rows(model, ["a", "a", "b", "b"], seeds={"a": 3, "b": 4}):
            model.train()
            out = model(x)
        nodes = {type(out.grad_fn).__name__, type(out.grad_fn.next_functions[0][0].next_functions[0][0]).__name__}
        return nodes, [out.detach(), *torch.autograd.grad(out.square().mean(), parameters)]

    nodes, found = step()
    assert nodes == {"_TiledLinearBackward"}
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "0")
    nodes, wanted = step()
    assert "_TiledLinearBackward" not in nodes
    agree(found, wanted, atol=1e-6, rtol=1e-4)
