import pytest
import torch
from methods.small import batch, peft_model, scatter_trained, set_tensors, stack, train
from torch import nn

import lorry
from lorry.methods.lokr import cut


def values_of(layer, entry, path):
    """Tensors of a peft layer under our names: C is its w1, D its w2, _b and _a its factors a and b."""
    found = {}
    for ours, theirs in (("C", "lokr_w1"), ("D", "lokr_w2")):
        pairs = (
            [(ours, theirs)]
            if ours in entry.tensors()
            else [(f"{ours}_b", f"{theirs}_a"), (f"{ours}_a", f"{theirs}_b")]
        )
        for mine, peer in pairs:
            tensor = getattr(layer, peer)["default"].detach()
            found[f"{path}.{mine}"] = tensor.reshape(entry.tensors()[mine].shape)
    return found


def test_identity_at_start_and_every_tensor_learns():
    x, model = batch(), stack()
    before = model(x)
    adapter = lorry.attach(model, lorry.LoKr(rank=1))
    assert torch.equal(model(x), before)
    train(model, adapter, 1)
    model(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in adapter.parameters())


@pytest.mark.parametrize(
    ("width", "factor", "expected"),
    [
        (256, -1, (16, 16)),
        (128, -1, (8, 16)),
        (127, -1, (1, 127)),
        (128, 4, (4, 32)),
        (96, 7, (6, 16)),
        (6, -1, (2, 3)),
    ],
)
def test_cut(width, factor, expected):
    assert cut(width, factor) == expected


def test_delta_is_the_kronecker_product():
    adapter = scatter_trained(lorry.attach(stack(), lorry.LoKr(rank=1, alpha=3.0)))
    for entry in adapter.entries.values():
        t = entry.tensors()
        assert torch.allclose(entry.delta(), 3 * torch.kron(t["C"], t["D_b"] @ t["D_a"]), atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"rank": 1}, {"rank": 8}, {"rank": 1, "decompose_both": True}, {"rank": 2, "factor": 2}]
)
def test_same_as_peft_and_as_merged(options):
    from peft import LoKrConfig

    x, model = batch(), stack()
    theirs = {"decompose_" + k if k == "factor" else k: v for k, v in options.items() if k != "rank"}
    peer = peft_model(stack(), LoKrConfig(r=options["rank"], alpha=4, target_modules=["up", "down"], **theirs))
    adapter = lorry.attach(model, lorry.LoKr(alpha=4.0, **options))
    for path, entry in adapter.entries.items():
        set_tensors(adapter, values_of(peer.base_model.model.get_submodule(path), entry, path))
    output = model(x)
    assert torch.allclose(output, peer(x), atol=1e-5)
    adapter.fuse()
    assert torch.allclose(model(x), output, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 8])
def test_convolution_same_as_peft(rank):
    from peft import LoKrConfig

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 6, 3, padding=1)).eval()

    x, model = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0)), make()
    peer = peft_model(make(), LoKrConfig(r=rank, alpha=2, target_modules=["0"]))
    adapter = lorry.attach(model, lorry.LoKr(rank=rank, alpha=2.0), targets=["0"])
    set_tensors(adapter, values_of(peer.base_model.model[0], adapter.entries["0"], "0"))
    assert torch.allclose(model(x), peer(x), atol=1e-5)


def test_bad_factor():
    with pytest.raises(lorry.OptionError, match="found 0"):
        lorry.LoKr(factor=0)
