"""A frozen adapter ready for decoding, against the definition in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.kernels.lowrank import reference
from lorry.kernels.ready import ReadyLinear
from lorry.kernels.segments import LowRankPair, Segment


def draw(generator, *shape):
    return torch.randn(shape, generator=generator).bfloat16().double()


def definition(x, weight, bias, a, b, scale, gain):
    """The layer in float64."""
    x, weight, bias, a, b, gain = (None if t is None else t.double() for t in (x, weight, bias, a, b, gain))
    rows = reference(x.reshape(-1, x.shape[-1]), weight, bias, None, [Segment(None, scale)], [LowRankPair(a, b, gain)])
    return rows.view(*x.shape[:-1], len(weight))


@settings(deadline=None, max_examples=80, derandomize=True)
@given(
    outer=st.sampled_from([(), (1,), (1, 1), (3, 1), (2, 5)]),
    width=st.integers(1, 70),
    out=st.integers(1, 70),
    rank=st.integers(1, 6),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    wide=st.booleans(),
    bias=st.booleans(),
    gain=st.booleans(),
    seed=st.integers(0, 2**30),
)
def test_equals_the_definition(outer, width, out, rank, dtype, wide, bias, gain, seed):
    generator = torch.Generator().manual_seed(seed)
    kind = torch.promote_types(dtype, torch.float32) if wide else dtype
    x, weight = draw(generator, *outer, width).to(dtype), draw(generator, out, width).to(dtype)
    a, b = draw(generator, rank, width).to(kind), draw(generator, out, rank).to(kind)
    shift = draw(generator, out).to(dtype) if bias else None
    factor = draw(generator, out).to(kind) if gain else None
    ready = ReadyLinear(weight, shift, a, b, 0.75, factor)
    assert ready.serves(x) and ready.fresh(weight, shift, a, b)
    found, wanted = ready(x), definition(x, weight, shift, a, b, 0.75, factor)
    assert found.dtype == dtype and found.shape == wanted.shape
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert (found.double() - wanted).norm() <= tolerance * (wanted.norm() + wanted.numel() ** 0.5)


def parts(gain=False):
    generator = torch.Generator().manual_seed(0)
    x, weight, a, b, factor = (draw(generator, *s).float() for s in ((1, 1, 8), (6, 8), (2, 8), (6, 2), (6,)))
    return x, weight, a, b, factor if gain else None


def test_changes_in_place_are_seen_where_nothing_was_worked_out():
    x, weight, a, b, _ = parts()
    ready = ReadyLinear(weight, None, a, b, 2.0)
    for tensor in (weight, a, b):
        tensor.mul_(-1.5)
        assert ready.fresh(weight, None, a, b)
        torch.testing.assert_close(
            ready(x).double(), definition(x, weight, None, a, b, 2.0, None), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("changed", range(4))
def test_a_gain_is_fresh_until_something_it_came_from_changes(changed):
    _, weight, a, b, gain = parts(gain=True)
    magnitude = gain.clone()
    ready = ReadyLinear(weight, None, a, b, 2.0, gain, (magnitude,))
    now = [weight, a, b, magnitude]

    def fresh():
        weight, a, b, magnitude = now
        return ready.fresh(weight, None, a, b, magnitude)

    assert fresh() and not ready.fresh(weight, None, a, b) and not ready.fresh(weight, gain, a, b, magnitude)
    before, now[changed] = now[changed], now[changed].clone()
    assert not fresh()
    now[changed] = before
    assert fresh()
    now[changed].add_(1)
    assert not fresh()


def test_what_was_worked_out_from_tensors_that_count_no_changes_is_never_fresh():
    with torch.inference_mode():
        x, weight, a, b, gain = parts(gain=True)
        plain, gained = ReadyLinear(weight, None, a, b, 2.0), ReadyLinear(weight, None, a, b, 2.0, gain)
        assert plain.fresh(weight, None, a, b) and not gained.fresh(weight, None, a, b)
        torch.testing.assert_close(
            gained(x).double(), definition(x, weight, None, a, b, 2.0, gain), atol=1e-5, rtol=1e-5
        )


def test_what_it_does_not_serve():
    x, weight, a, b, _ = parts()
    ready = ReadyLinear(weight, None, a, b, 2.0)
    assert ready.serves(x.expand(16, 1, 8)) and not ready.serves(x.expand(17, 1, 8))
    assert not ready.serves(x.bfloat16()) and not ready.serves(x.to("meta"))
    assert not ReadyLinear(weight, None, a.bfloat16(), b.bfloat16(), 2.0).serves(x)
    assert not ReadyLinear(weight, None, a, b.double(), 2.0).serves(x)
