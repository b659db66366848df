import pytest
import torch
from methods.small import batch, peft_model, scatter_trained, set_tensors, stack, train
from torch import nn

import lorry

NAMES = {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"}


def test_identity_at_start_and_every_tensor_learns():
    x, model = batch(), stack()
    before = model(x)
    adapter = lorry.attach(model, lorry.LoHa(rank=3))
    assert torch.equal(model(x), before)
    train(model, adapter, 1)
    model(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in adapter.parameters())


def test_count():
    assert lorry.plan(stack(), lorry.LoHa(rank=3)).trained == 2 * lorry.plan(stack(), lorry.LoRA(rank=3)).trained


def test_rank_is_the_square():
    adapter = scatter_trained(lorry.attach(stack(), lorry.LoHa(rank=3)))
    assert {int(torch.linalg.matrix_rank(d)) for _, d in adapter.deltas()} == {9}


@pytest.mark.parametrize("rank", [2, 8])
def test_thin_form_and_dense_form_agree_with_the_merged_weight(rank):
    x, model = batch(), stack()
    adapter = scatter_trained(lorry.attach(model, lorry.LoHa(rank=rank, alpha=3.0)))
    output = model(x)
    adapter.fuse()
    assert torch.allclose(model(x), output, atol=1e-5)


@pytest.mark.parametrize("rank", [2, 8])
def test_same_as_peft(rank):
    from peft import LoHaConfig

    x, model = batch(), stack()
    peer = peft_model(stack(), LoHaConfig(r=rank, alpha=5, target_modules=["up", "down"]))
    adapter = lorry.attach(model, lorry.LoHa(rank=rank, alpha=5.0))
    for path in adapter.entries:
        layer = peer.base_model.model.get_submodule(path)
        set_tensors(adapter, {f"{path}.{n}": getattr(layer, p)["default"].detach() for n, p in NAMES.items()})
    assert torch.allclose(model(x), peer(x), atol=1e-5)


def test_convolution_same_as_peft():
    from peft import LoHaConfig

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 6, 3, padding=1)).eval()

    x, model = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0)), make()
    peer = peft_model(make(), LoHaConfig(r=2, alpha=2, target_modules=["0"]))
    adapter = lorry.attach(model, lorry.LoHa(rank=2), targets=["0"])
    layer = peer.base_model.model[0]
    set_tensors(adapter, {f"0.{n}": getattr(layer, p)["default"].detach() for n, p in NAMES.items()})
    assert torch.allclose(model(x), peer(x), atol=1e-5)
