"""Products with a few changed positions against their dense definitions."""

import pytest
import torch
import torch.nn.functional as F

from lorry.kernels.sparse import changed_linear, scatter


def parts(dtype=torch.float64, rows=7, columns=5, count=9):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    index = torch.randperm(rows * columns, generator=generator)[:count].sort().values
    return draw(2, 3, columns), draw(rows, columns), draw(rows), draw(count), index


@pytest.mark.parametrize("biased", [True, False])
def test_changed_linear_is_the_dense_sum(biased):
    x, weight, bias, values, index = parts()
    x.requires_grad_(), values.requires_grad_()
    own = bias if biased else None
    dense = F.linear(x, weight + scatter(values, index, weight.numel()).view_as(weight), own)
    found = changed_linear(x, weight, own, values, index)
    assert torch.allclose(found, dense, atol=1e-12)
    upstream = torch.randn_like(dense)
    expected = torch.autograd.grad(dense, (x, values), upstream)
    for one, other in zip(torch.autograd.grad(found, (x, values), upstream), expected, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_gradients_of_changed_linear():
    x, weight, bias, values, index = parts()
    x.requires_grad_(), values.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, v: changed_linear(a, weight, bias, v, index), (x, values))


def test_values_of_another_type_keep_theirs():
    x, weight, bias, values, index = parts(torch.float32)
    values = values.double().requires_grad_()
    changed_linear(x, weight, bias, values, index).sum().backward()
    assert values.grad.dtype == torch.float64
