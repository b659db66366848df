"""Products with a thin factor against the plain ones."""

import pytest
import torch
import torch.nn.functional as F

from lorry.kernels.thin import thin_linear


def operands(outer, out, inner, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((*outer, inner), (out, inner))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("outer", [(5,), (2, 3), (0,), ()], ids=str)
@pytest.mark.parametrize("out, inner", [(2, 7), (7, 2), (4, 4), (1, 6)])
def test_equals_the_plain_product_to_the_second_derivative(outer, out, inner):
    x, weight = operands(outer, out, inner)
    torch.testing.assert_close(thin_linear(x, weight), F.linear(x, weight))
    assert thin_linear(x, weight).is_contiguous()
    if x.numel():
        assert torch.autograd.gradcheck(thin_linear, (x, weight))
        assert torch.autograd.gradgradcheck(thin_linear, (x, weight))


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(frozen):
    pair = operands((3,), 2, 6)
    pair[frozen].requires_grad_(False)
    thin_linear(*pair).sum().backward()
    assert pair[frozen].grad is None and pair[1 - frozen].grad is not None


def test_transposed_inputs_and_autocast():
    x, weight = operands((6, 4), 2, 8, torch.float32)
    turned = x.detach().transpose(0, 1)
    torch.testing.assert_close(thin_linear(turned, weight), F.linear(turned, weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert thin_linear(x, weight).dtype == torch.bfloat16
