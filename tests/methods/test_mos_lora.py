import pytest
import torch
from methods.small import batch, copies, scatter_trained, set_tensors, stack, train

import lorry


def test_identity_mixer_is_lora():
    x, models = batch(), [stack(), stack()]
    mixed = lorry.attach(models[0], lorry.MoSLoRA(rank=3, mixer="identity"))
    lora = lorry.attach(models[1], lorry.LoRA(rank=3))
    scatter_trained(lora)
    set_tensors(mixed, copies(lora))
    assert torch.allclose(models[0](x), models[1](x), atol=1e-6)


@pytest.mark.parametrize("mixer", ["kaiming", "orthogonal", "identity"])
def test_identity_of_the_model_at_start_and_learning(mixer):
    x, model = batch(), stack()
    before = model(x)
    adapter = lorry.attach(model, lorry.MoSLoRA(rank=3, mixer=mixer))
    assert torch.equal(model(x), before)
    assert adapter.count() == lorry.plan(stack(), lorry.LoRA(rank=3)).trained + 4 * 9
    train(model, adapter, 1)
    model(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in adapter.parameters())


def test_orthogonal_start():
    mixer = lorry.attach(stack(), lorry.MoSLoRA(rank=5)).entries["layers.0.up"].tensors()["mixer"]
    assert torch.allclose(mixer @ mixer.T, torch.eye(5), atol=1e-5)


def test_delta_and_merge():
    x, model = batch(), stack()
    adapter = scatter_trained(lorry.attach(model, lorry.MoSLoRA(rank=3, alpha=6.0)))
    for entry in adapter.entries.values():
        t = entry.tensors()
        assert torch.allclose(entry.delta(), 2 * t["B"] @ t["mixer"] @ t["A"], atol=1e-5)
    output = model(x)
    adapter.fuse()
    assert torch.allclose(model(x), output, atol=1e-5)
