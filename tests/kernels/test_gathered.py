"""Batched products of many short segments against the definition in float64."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.kernels.gathered import add_stacked, stack, worth_stacking
from lorry.kernels.lowrank import reference
from lorry.kernels.segments import LowRankPair, Segment


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 3), min_size=4, max_size=8),
    ranks=st.lists(st.integers(1, 4), min_size=8, max_size=8),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    shuffled=st.booleans(),
    weighted=st.booleans(),
    inner=st.sampled_from([(), (1,), (2,)]),
    seed=st.integers(0, 2**30),
)
def test_equals_the_definition(sizes, ranks, dtype, shuffled, weighted, inner, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).bfloat16().double()

    rows = sum(sizes)
    order = torch.randperm(rows, generator=generator) if shuffled else torch.arange(rows)
    segments, factors, start = [], [], 0
    for number, (size, rank) in enumerate(zip(sizes, ranks, strict=False)):
        part = order[start : start + size] if shuffled else slice(start, start + size)
        weights = draw(size) if weighted and number % 2 else None
        segments.append(Segment(part, 0.5 + number, weights=weights))
        factors.append(LowRankPair(draw(rank, 9), draw(11, rank)))
        start += size
    x, weight = draw(rows, *inner, 9), draw(11, 9)
    assert worth_stacking(x, segments, factors)
    wanted = reference(x, weight, None, None, segments, factors)
    own = [LowRankPair(f.a.to(dtype), f.b.to(dtype)) for f in factors]
    stacked = stack(x, segments, own, dtype)
    assert stacked.serves(x)
    out = add_stacked(F.linear(x, weight).to(dtype), x.to(dtype), stacked)
    assert out.dtype == dtype
    # rounding of the base's output and of the sum
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert (out.double() - wanted).norm() <= tolerance * (1 + wanted.norm())
