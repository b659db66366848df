"""Sums over the experts of a token."""

import torch

from lorry.methods.parts.mixtures import Pairs, _WeightedSum


def test_the_weighted_sum_over_pairs_is_that_of_dense_products_with_its_gradients():
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(5, 3, generator=generator) > 0.4
    pairs = Pairs.of(mask)
    values, share = (
        torch.randn(len(pairs.token), n, generator=generator, dtype=torch.float64).requires_grad_() for n in (4, 1)
    )
    dense = torch.zeros(5, 3, 4, dtype=torch.float64)
    dense[pairs.token, pairs.expert] = (values * share).detach()
    torch.testing.assert_close(_WeightedSum.apply(values, share, pairs.token, 5), dense.sum(1))
    assert torch.autograd.gradcheck(lambda v, s: _WeightedSum.apply(v, s, pairs.token, 5), (values, share))
