"""One update of all rows, in the node of its own, against the definition in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.kernels.lowrank import low_rank_linear, reference
from lorry.kernels.segments import LowRankPair, Segment
from lorry.kernels.whole import column_dots, is_whole

#: Relative error of a product of a few dozen terms in each type, with room for its inputs' rounding.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}


def draw(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def close(found, wanted, dtype, what):
    """Whether the difference is small beside the size of the whole tensor: single entries may cancel."""
    size = wanted.norm() + wanted.numel() ** 0.5
    assert (found.double() - wanted).norm() <= TOLERANCES[dtype] * size, what


def run(function, dtype, x, weight, bias, segment, leaves, probe):
    """Output and gradients of a layer for the same values in another type; the factors stay in float32 or better."""
    kept = torch.promote_types(dtype, torch.float32)
    own = [x.to(dtype).requires_grad_(), *(t.to(kept).requires_grad_() for t in leaves)]
    a, b, *gain = own[1:]
    factors = LowRankPair(a, b, gain[0] if gain else None)
    bias = None if bias is None else bias.to(dtype)
    out = function(own[0], weight.to(dtype), bias, None, [segment], [factors])
    return out, torch.autograd.grad(out, own, probe.to(dtype))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    outer=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    width=st.integers(1, 70),
    out=st.integers(1, 70),
    rank=st.integers(1, 9),
    dtype=st.sampled_from(list(TOLERANCES)),
    p=st.sampled_from([0.0, 0.3, 1.0]),
    bias=st.booleans(),
    gain=st.booleans(),
    turned=st.booleans(),
    seed=st.integers(0, 2**40),
)
def test_equals_the_definition_in_float64(outer, width, out, rank, dtype, p, bias, gain, turned, seed):
    generator = torch.Generator().manual_seed(seed)
    x = draw(generator, *outer, width)
    if turned and len(outer) > 1:
        x = x.transpose(0, 1)  # rows that do not lie one after another
    # values that every type holds, so that only the arithmetic differs
    x, weight, probe = (t.bfloat16().double() for t in (x, draw(generator, out, width), draw(generator, *outer, out)))
    probe = probe.view(*x.shape[:-1], out)
    leaves = [draw(generator, rank, width), draw(generator, out, rank)]
    leaves += [draw(generator, out)] if gain else []
    leaves = [t.bfloat16().double() for t in leaves]
    shift = draw(generator, out).bfloat16().double() if bias else None
    segment = Segment(None, 0.5, p, seed)
    assert is_whole(x, weight, [segment])
    found, grads = run(low_rank_linear, dtype, x, weight, shift, segment, leaves, probe)
    wanted, wanted_grads = run(reference, torch.float64, x, weight, shift, segment, leaves, probe)
    assert found.dtype == dtype and found.shape == wanted.shape
    close(found, wanted, dtype, "output")
    for name, mine, exact in zip(("x", "A", "B", "gain"), grads, wanted_grads, strict=False):
        assert mine.shape == exact.shape
        close(mine, exact, dtype, name)


@pytest.mark.parametrize("trained", range(4))
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_only_what_needs_a_gradient_gets_one(trained, p):
    generator = torch.Generator().manual_seed(0)
    tensors = [draw(generator, *shape) for shape in ((3, 5), (2, 5), (4, 2), (4,))]
    weight = draw(generator, 4, 5)

    def gradients(function, wanted):
        own = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        x, a, b, gain = own
        function(x, weight, None, None, [Segment(None, 2.0, p, 3)], [LowRankPair(a, b, gain)]).square().sum().backward()
        return [t.grad for t in own]

    alone, together = gradients(low_rank_linear, {trained}), gradients(reference, {0, 1, 2, 3})
    assert [g is not None for g in alone] == [i == trained for i in range(4)]
    torch.testing.assert_close(alone[trained], together[trained])


def test_gradients_of_the_factors_lie_like_the_factors():
    """Those that do not are copied once more when they are accumulated."""
    x, weight = torch.randn(6, 5), torch.randn(4, 5)
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(shape).requires_grad_() for shape in ((2, 5), (4, 2)))
        out = low_rank_linear(x.to(dtype), weight.to(dtype), None, None, [Segment(None, 1.0)], [LowRankPair(a, b)])
        grads = torch.autograd.grad(out.sum(), (a, b))
        assert all(g.is_contiguous() and g.dtype == torch.float32 for g in grads)


def test_without_an_update_the_output_is_that_of_the_layer_bit_for_bit():
    x, weight, bias = torch.randn(3, 7, 32), torch.randn(48, 32), torch.randn(48)
    a, b = torch.randn(4, 32, requires_grad=True), torch.zeros(48, 4, requires_grad=True)
    out = low_rank_linear(x, weight, bias, None, [Segment(None, 2.0, 0.1, 5)], [LowRankPair(a, b)])
    assert torch.equal(out, F.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (5, 1), (1, 5), (33, 70)], ids=str)
def test_column_dots(dtype, shape):
    generator = torch.Generator().manual_seed(1)
    left, right = (draw(generator, *shape).to(dtype) for _ in range(2))
    exact = (left.double() * right.double()).sum(0)
    for one, other in ((left, right), (left.t().contiguous().t(), right)):
        torch.testing.assert_close(column_dots(one, other).double(), exact, atol=0.05, rtol=0.05)
    if shape[0]:
        # products of half precision are exact in float32, and so are the sums to its precision
        torch.testing.assert_close(column_dots(left, right).double(), exact, atol=1e-5, rtol=1e-5)
