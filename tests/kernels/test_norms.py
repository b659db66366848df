"""The norms that DoRA divides by, from the factors, against the dense sum in float64."""

import pytest
import torch

import lorry
from lorry.core.method.families import norms_of_sum


def attached(dtype, size):
    """A site with an update of `size` times the norm of its weight, and the norms of their sum in float64."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 80)).to(dtype)
    entry = lorry.attach(model, {"method": "dora", "rank": 8}).entries["0"]
    tensors, weight = entry.tensors(), model[0].weight.double()
    tensors["B"].data.normal_()
    update = (tensors["B"] @ tensors["A"]).detach().double()
    scale = size * float(weight.norm() / update.norm())
    return entry.site, tensors["A"], tensors["B"], scale, (weight + scale * update).norm(dim=1)


@pytest.mark.parametrize("size", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norms_of_frozen_factors_are_exact(dtype, size):
    site, a, b, scale, exact = attached(dtype, size)
    torch.testing.assert_close(norms_of_sum(site, a.detach(), b.detach(), scale).double(), exact, atol=0, rtol=2e-6)


@pytest.mark.parametrize("size", [0.1, 1.0, 3.0])
def test_norms_in_training_err_far_less_than_rounding_them_to_the_weight_s_type(size):
    site, a, b, scale, exact = attached(torch.bfloat16, size)
    found = norms_of_sum(site, a, b, scale)
    assert found.dtype == torch.float32
    error, rounding = ((t.double() / exact - 1).norm() for t in (found, exact.bfloat16()))
    assert error < rounding / 8


def test_nothing_given_is_changed():
    site, a, b, scale, _ = attached(torch.float32, 1.0)
    before = [t.detach().clone() for t in (a, b, site.stored)]
    first = norms_of_sum(site, a, b, scale)
    assert torch.equal(first, norms_of_sum(site, a, b, scale))
    assert all(torch.equal(t, kept) for t, kept in zip((a, b, site.stored), before, strict=True))
