"""The fused operation against its definition, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.kernels.even import shares_evenly
from lorry.kernels.lowrank import low_rank_linear, reference
from lorry.kernels.segments import LowRankPair, Segment

ROWS = 6
LAYOUTS = {
    "one adapter, all rows": [(None, 0.5, 3)],
    "two adapters, all rows, unequal ranks": [(None, 0.5, 3), (None, -1.5, 1)],
    "slices": [(slice(0, 2), 1.0, 2), (slice(2, 5), 2.0, 4)],
    "overlapping slices": [(slice(0, 4), 1.0, 2), (slice(1, 5), 2.0, 4)],
    "indices": [(torch.tensor([4, 0, 2]), 0.7, 2), (torch.tensor([1, 3]), 1.0, 3)],
    "weights for each row of a slice": [(slice(1, 4), torch.tensor([1.0, -0.5, 0.25]), 2)],
    "weights for each row of indices": [(torch.tensor([3, 0]), torch.tensor([1.0, 0.5]), 2)],
    "weights for all rows": [(None, torch.tensor([1.0, 0.5, 0.0, -1.0, 2.0, 1.0]), 3)],
    "rows without an adapter": [(slice(1, 2), 1.0, 2)],
    "no adapter": [],
}
#: Segments that share the batch evenly, which are multiplied together.
EVEN = {
    "even slices, one scale": [(slice(0, 3), 0.5, 2), (slice(3, 6), 0.5, 2)],
    "even slices, two scales": [(slice(0, 3), 0.5, 2), (slice(3, 6), 2.0, 2)],
    "even slices, weights for each row": [
        (slice(0, 2), torch.tensor([1.0, -0.5]), 3),
        (slice(2, 4), 2.0, 3),
        (slice(4, 6), torch.tensor([0.0, 3.0]), 3),
    ],
}
LAYOUTS |= EVEN
#: Segments whose rows, base and update together, are scaled by output channel.
GAINS = {
    "a gain on all rows": [(None, 0.5, 3, "gain")],
    "a gain on a slice": [(slice(0, 2), 1.0, 2, "gain"), (slice(2, 5), 2.0, 4)],
    "two gains, slices": [(slice(0, 2), 1.0, 2, "gain"), (slice(3, 5), 2.0, 4, "gain")],
    "gains on indices": [(torch.tensor([4, 0, 2]), 0.7, 2, "gain"), (torch.tensor([1]), 1.0, 3, "gain")],
}


def make(layout, *, dtype=torch.float64, inner=(3,), width=6, out=4, p=0.0, bias=True, seed=0, factor_dtype=None):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, kind=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(kind).requires_grad_()

    segments, factors = [], []
    for number, (rows, scale, rank, *gain) in enumerate(layout):
        own = isinstance(scale, torch.Tensor)
        segments.append(Segment(rows, 1.5 if own else scale, p, 17 + number, scale if own else None))
        kind = factor_dtype or dtype
        factors.append(
            LowRankPair(
                draw(rank, width, kind=kind),
                draw(out, rank, kind=kind),
                draw(out, kind=kind) if gain else None,
            )
        )
    x = draw(ROWS, *inner, width)
    weight = draw(out, width).detach()
    return x, weight, draw(out).detach() if bias else None, segments, factors


def leaves_of(factors):
    return [t for f in factors for t in (f.a, f.b, f.gain) if t is not None]


def with_leaves(factors, leaves):
    """The same factors made of other tensors."""
    left = iter(leaves)
    return [LowRankPair(next(left), next(left), None if f.gain is None else next(left)) for f in factors]


def both(x, weight, bias, y, segments, factors):
    """Outputs and gradients of the operation and of its definition for the same inputs."""
    results = []
    for function in (low_rank_linear, reference):
        leaves = [t.detach().clone().requires_grad_() for t in (x, *leaves_of(factors))]
        given_y = None if y is None else y.detach().clone().requires_grad_()
        out = function(leaves[0], weight, bias, given_y, segments, with_leaves(factors, leaves[1:]))
        probe = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(out.dtype)
        inputs = leaves if given_y is None else [*leaves, given_y]
        grads = torch.autograd.grad(out, inputs, probe, allow_unused=True)
        filled = [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, grads, strict=True)]
        results.append((out.detach(), filled))
    return results


def agree(results, **tolerance):
    (out, grads), (expected, expected_grads) = results
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, **tolerance)
    for found, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(found, wanted, **tolerance)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("given_y", [False, True], ids=["dense", "y given"])
def test_equals_its_definition_in_float64(layout, p, given_y):
    x, weight, bias, segments, factors = make(layout, p=p)
    if given_y:
        agree(both(x, None, None, F.linear(x, weight, bias), segments, factors))
    else:
        agree(both(x, weight, bias, None, segments, factors))


@pytest.mark.parametrize("layout", GAINS.values(), ids=GAINS)
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
def test_gains_equal_their_definition_in_float64(layout, p, bias):
    x, weight, b, segments, factors = make(layout, p=p, bias=bias)
    agree(both(x, weight, b, None, segments, factors))


@pytest.mark.parametrize("layout", [*LAYOUTS.values(), *GAINS.values()], ids=[*LAYOUTS, *GAINS])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients_are_those_of_finite_differences(layout, p):
    x, weight, bias, segments, factors = make(layout, inner=(2,), width=4, out=3, p=p)
    leaves = leaves_of(factors)

    def run(y, x, *leaves):
        base = (weight, bias) if y is None else (None, None)
        return low_rank_linear(x, *base, y, segments, with_leaves(factors, leaves))

    assert torch.autograd.gradcheck(lambda x, *f: run(None, x, *f), (x, *leaves))
    if all(f.gain is None for f in factors):
        y = torch.randn(ROWS, 2, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(run, (y, x, *leaves))


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    inner=st.lists(st.integers(1, 4), max_size=2),
    width=st.integers(1, 17),
    out=st.integers(1, 17),
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    bias=st.booleans(),
    p=st.sampled_from([0.0, 0.25]),
    data=st.data(),
)
def test_random_shapes_and_rows_in_float32(inner, width, out, ranks, bias, p, data):
    layout = []
    for rank in ranks:
        rows = data.draw(st.lists(st.integers(0, ROWS - 1), min_size=1, unique=True))
        kind = data.draw(st.sampled_from(["all", "slice", "indices"]))
        chosen = {"all": None, "slice": slice(min(rows), max(rows) + 1), "indices": torch.tensor(rows)}[kind]
        count = {"all": ROWS, "slice": max(rows) + 1 - min(rows), "indices": len(rows)}[kind]
        scale = data.draw(st.sampled_from([1.0, -0.5])) if data.draw(st.booleans()) else torch.linspace(0.1, 2, count)
        layout.append((chosen, scale, rank))
    x, weight, b, segments, factors = make(
        layout, dtype=torch.float32, inner=tuple(inner), width=width, out=out, p=p, bias=bias
    )
    agree(both(x, weight, b, None, segments, factors), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_bfloat16_is_as_close_to_the_exact_result_as_its_definition(layout, factor_dtype):
    x, weight, bias, segments, factors = make(layout, dtype=torch.bfloat16, width=32, out=16, factor_dtype=factor_dtype)
    doubled = with_leaves(factors, [t.double() for t in leaves_of(factors)])
    exact = both(x.double(), weight.double(), bias.double(), None, segments, doubled)[1]
    (out, grads), (plain, plain_grads) = both(x, weight, bias, None, segments, factors)
    assert out.dtype == torch.bfloat16
    assert [g.dtype for g in grads] == [torch.bfloat16, *[factor_dtype] * 2 * len(factors)]
    for found, other, wanted in zip([out, *grads], [plain, *plain_grads], [exact[0], *exact[1]], strict=True):
        error, allowed = (found.double() - wanted).norm(), (other.double() - wanted).norm()
        assert error <= 2 * allowed + 1e-2 * wanted.norm()


def test_x_of_another_dtype_than_the_output_gets_its_gradient_in_its_own():
    x, weight, _, segments, factors = make(LAYOUTS["slices"], dtype=torch.float32)
    y = F.linear(x, weight).to(torch.bfloat16)
    results = both(x, None, None, y, segments, factors)
    assert results[0][0].dtype == torch.bfloat16 and results[0][1][0].dtype == torch.float32
    agree(results, atol=0.15, rtol=0.05)


def test_y_that_is_given_is_left_as_it_is_and_no_rows_is_no_change():
    x, weight, bias, segments, factors = make(LAYOUTS["slices"])
    y = F.linear(x, weight, bias).detach()
    kept = y.clone()
    low_rank_linear(x, None, None, y, segments, factors)
    assert torch.equal(y, kept)
    assert torch.equal(low_rank_linear(x, weight, bias, None, [], []), F.linear(x, weight, bias))


def test_factors_that_need_no_gradient_get_none_and_x_neither():
    x, weight, bias, segments, factors = make(LAYOUTS["slices"])
    *fixed, last = leaves_of(factors)
    mixed = with_leaves(factors, [*(t.detach() for t in fixed), last])
    low_rank_linear(x.detach(), weight, bias, None, segments, mixed).sum().backward()
    assert last.grad is not None and x.grad is None and all(t.grad is None for t in fixed)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_keeps_x_once_and_no_mask(p):
    """Kept for the backward pass: x, the weight, the factors and the rank units; no copy of x, dropped or cast."""
    x, weight, bias, segments, factors = make(
        LAYOUTS["two adapters, all rows, unequal ranks"], dtype=torch.bfloat16, width=64, out=48, p=p,
        factor_dtype=torch.float32,
    )  # fmt: skip
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        low_rank_linear(x, weight, bias, None, segments, factors)
    wide = [t for t in kept if t.shape[-1] == 64 and t.numel() == x.numel()]
    assert [t.data_ptr() for t in wide] == [x.data_ptr()]
    known = {t.data_ptr() for t in (x, weight, *leaves_of(factors))}
    rest = [t for t in kept if t.data_ptr() not in known]
    assert sum(t.numel() for t in rest) == (3 + 1) * ROWS * 3 and all(t.dtype == torch.bfloat16 for t in rest)


def test_one_node_for_all_segments():
    x, weight, bias, segments, factors = make(LAYOUTS["slices"])
    out = low_rank_linear(x, weight, bias, None, segments, factors)
    parents = {type(f).__name__ for f, _ in out.grad_fn.next_functions if f is not None}
    assert parents == {"AccumulateGrad"}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_only_segments_that_share_the_batch_evenly_are_multiplied_together(layout):
    x, weight, bias, segments, factors = make(layout)
    assert shares_evenly(x, segments, factors) == (layout in EVEN.values())


def test_a_second_derivative_is_refused_and_not_wrong():
    x, weight, bias, segments, factors = make(LAYOUTS["slices"])
    out = low_rank_linear(x, weight, bias, None, segments, factors)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
