"""Figures measured in the common bases of a site agree with those of the whole factors."""

from dataclasses import replace

import pytest
import torch

from lorry.merging.factors import Factors, bases, gram_norm, overlap, spans
from lorry.merging.inputs import SiteInput
from lorry.merging.registry import merge_method_named


def site(out=24, inner=20, ranks=(3, 5), seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factors = tuple(Factors(draw(r, inner), draw(out, r)) for r in ranks)
    return SiteInput("site", (out, inner), ("a", "b"), factors, (0.7, -0.4), {})


@pytest.mark.parametrize("method", ["svd", "cat", "linear", "task-arithmetic"])
def test_error_and_norm_are_the_same_inside_and_outside(method):
    given = site()
    result = merge_method_named(method).function(given)
    assert result.inside is not None
    left, right = result.inside
    assert torch.allclose(given.joint.qb @ left, result.b, atol=1e-12)
    assert torch.allclose(right @ given.joint.qa.mT, result.a, atol=1e-12)
    outside = replace(result, inside=None)
    weights = list(given.weights)
    assert given.joint.distance(result, weights) == pytest.approx(given.joint.distance(outside, weights), abs=1e-11)
    assert float((left @ right).norm()) == pytest.approx(gram_norm(outside), rel=1e-12)
    dense = sum(w * f.dense() for w, f in zip(weights, given.factors, strict=True))
    assert given.joint.distance(result, weights) == pytest.approx(float((result.dense() - dense).norm()), abs=1e-11)


def test_spans_are_those_of_the_update_even_where_a_factor_has_not_full_rank():
    full, other = site().factors
    thin = Factors(torch.cat([full.a[:2], full.a[:1]]), full.b)
    for part in (full, other, thin):
        (out, read), (expected_out, expected_read) = spans([part])[0], bases(part)
        assert out.shape == expected_out.shape and read.shape == expected_read.shape
        assert overlap(out, expected_out) == pytest.approx(1, abs=1e-12)
        assert overlap(read, expected_read) == pytest.approx(1, abs=1e-12)
