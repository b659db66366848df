"""Fusing with the original weights given up, and in parts, against dense sums in float64."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import lorry
from lorry.core.life.switch import make_switch


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 700), nn.ReLU(), nn.Linear(700, 24, bias=False)).to(dtype)


def attached(base, method=None, name="default", std=0.05, **options):
    adapter = lorry.attach(base, method or lorry.LoRA(rank=3), name=name, **options)
    generator = torch.Generator().manual_seed(len(name))
    for parameter in adapter.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return adapter


def sums(adapter):
    """The fused weights as matrices (out, in), in float64."""
    return {site.path: site.matrix().double() + delta.double() for site, delta in adapter.deltas()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("safe", [True, False])
def test_weights_are_the_sum_rounded_once(dtype, keep, safe):
    base = model(dtype)
    adapter = attached(base)
    wanted = sums(adapter)
    receipt = adapter.fuse(safe=safe, keep=keep)
    assert receipt.sites == 2 and adapter.fused
    for path, exact in wanted.items():
        found = base.get_submodule(path).weight
        assert found.dtype == dtype
        # a sum in float32 that lies between two values may be rounded to either
        steps = (found.double() - exact).abs() / (exact.abs() * torch.finfo(dtype).eps + 1e-7)
        assert steps.max() <= (0.51 if dtype.itemsize < 4 else 4)
    if safe and dtype.itemsize < 4:
        difference = max((base.get_submodule(p).weight.double() - e).abs().max() for p, e in wanted.items())
        assert receipt.max_error == pytest.approx(float(difference), rel=1e-3)


def test_without_the_originals_the_weights_stay_where_they_are_and_there_is_no_way_back():
    base = model()
    adapter = attached(base)
    x = torch.randn(5, 48)
    with torch.no_grad():
        wanted = base(x)
        places = [p.data_ptr() for p in (base[0].weight, base[2].weight)]
        parameters = [base[0].weight, base[2].weight]
        adapter.fuse(keep=False)
        assert [p.data_ptr() for p in (base[0].weight, base[2].weight)] == places
        assert base[0].weight is parameters[0] and base[2].weight is parameters[1]
        torch.testing.assert_close(base(x), wanted)
    with pytest.raises(lorry.AdapterError, match="keep=False.*load the base again"):
        adapter.unfuse()
    with pytest.raises(lorry.AdapterError, match="fused already"):
        adapter.fuse()


def test_one_kept_under_one_that_is_not():
    base = model()
    first, second = attached(base, name="first"), attached(base, name="second", activate=False)
    first.fuse()
    second.fuse(keep=False)
    with pytest.raises(lorry.AdapterError, match="'second' was fused after 'first'"):
        first.unfuse()


def test_more_than_a_product_of_factors_and_tied_weights_are_exchanged():
    base = model()
    adapter = attached(base, lorry.DoRA(rank=3))
    wanted = sums(adapter)
    adapter.fuse(keep=False)
    for path, exact in wanted.items():
        torch.testing.assert_close(base.get_submodule(path).weight.double(), exact, atol=1e-5, rtol=1e-5)

    tied = nn.ModuleDict({"embedding": nn.Embedding(40, 16), "head": nn.Linear(16, 40, bias=False)})
    tied["head"].weight = tied["embedding"].weight
    before = tied["embedding"].weight.clone()
    adapter = attached(tied, targets=["head"])
    (exact,) = sums(adapter).values()
    adapter.fuse(keep=False)
    assert torch.equal(tied["embedding"].weight, before), "the other module keeps its values"
    torch.testing.assert_close(tied["head"].weight.double(), exact)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("value", [float("nan"), 1e30, 2e5])
def test_what_is_not_finite_is_refused_before_anything_is_changed(keep, value):
    base = model(torch.float16)
    adapter = attached(base)
    before = [p.detach().clone() for p in (base[0].weight, base[2].weight)]
    tensors = adapter.entries["2"].tensors()
    tensors["B"].data[-1, 0], tensors["A"].data[0, -1] = value, 1.0
    with pytest.raises(lorry.AdapterError, match="not finite|leaves the range of torch.float16"):
        adapter.fuse(keep=keep)
    assert not adapter.fused
    after = (base[0].weight, base[2].weight)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_weights_that_lie_the_other_way_round():
    from transformers.pytorch_utils import Conv1D

    base = nn.Sequential(Conv1D(20, 30))
    for keep in (True, False):
        adapter = attached(base, name=f"keep {keep}".replace(" ", "-"))
        ((path, exact),) = sums(adapter).items()
        adapter.fuse(keep=keep)
        assert base[0].weight.is_contiguous() and path == "0"
        torch.testing.assert_close(base[0].weight.t().double(), exact, atol=1e-5, rtol=1e-5)
        if keep:
            adapter.detach()


@pytest.mark.parametrize("keep", [True, False])
def test_a_weight_that_is_worked_out_from_others_is_not_merged_into(keep):
    torch.manual_seed(0)
    base, x = nn.Sequential(weight_norm(nn.Linear(6, 5)), nn.Linear(5, 4)), torch.randn(3, 6)
    adapter = attached(base)
    before, own = base(x), base[1].weight.clone()
    with pytest.raises(lorry.AdapterError, match="'0' is worked out from other parameters.*remove_parametrizations"):
        adapter.fuse(keep=keep)
    assert torch.equal(base(x), before) and torch.equal(base[1].weight, own)
    adapter.detach()
    parametrize.remove_parametrizations(base[0], "weight")
    adapter = attached(base)
    before = base(x)
    adapter.fuse(keep=keep)
    torch.testing.assert_close(base(x), before)


def test_nothing_is_switched_into_a_weight_that_is_worked_out_from_others():
    base = nn.Sequential(weight_norm(nn.Linear(6, 5)))
    adapter = attached(base, {"method": "shira", "rank": 1})
    with pytest.raises(lorry.AdapterError, match="worked out from other parameters"):
        make_switch(adapter)
