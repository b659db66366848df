import torch
from methods.small import batch, copies, stack, train

import lorry


def test_only_b_is_trained():
    model = stack()
    adapter = lorry.attach(model, lorry.LoRAFA(rank=4))
    assert adapter.count() == 4 * 2 * (24 + 16)
    before = copies(adapter)
    losses = train(model, adapter, 20)
    assert losses[-1] < losses[0]
    for name, value in copies(adapter).items():
        assert torch.equal(value, before[name]) == name.endswith(".A")


def test_is_lora_with_a_held():
    models = stack(), stack()
    held = lorry.attach(models[0], lorry.LoRAFA(rank=4, alpha=8.0))
    lora = lorry.attach(models[1], lorry.LoRA(rank=4, alpha=8.0))
    assert all(torch.equal(v, copies(held)[k]) for k, v in copies(lora).items())
    for model in models:
        model(batch()).square().sum().backward()
    for path in held.entries:
        pair = [a.entries[path].tensors()["B"].grad for a in (held, lora)]
        assert torch.equal(*pair)


def test_preset():
    assert lorry.method_from("ffa-lora") == lorry.LoRAFA()
