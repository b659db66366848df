import torch
from methods.small import batch, copies, scatter_trained, stack, train

import lorry


def test_starts_at_the_principal_part_and_trains_the_core_alone():
    x, model = batch(), stack()
    before = model(x)
    adapter = lorry.attach(model, lorry.LoRAXS(rank=4))
    assert torch.equal(model(x), before)
    assert adapter.count() == 4 * 16
    start = copies(adapter)
    u, s, vt = torch.linalg.svd(model.layers[0]["up"].weight)
    best = u[:, :4] * s[:4] @ vt[:4]
    assert torch.allclose(start["layers.0.up.B"] @ start["layers.0.up.A"], best, atol=1e-5)
    losses = train(model, adapter, 20)
    assert losses[-1] < losses[0]
    for name, value in copies(adapter).items():
        assert torch.equal(value, start[name]) == (not name.endswith("core"))


def test_random_core_of_the_paper():
    core = lorry.attach(stack(), lorry.LoRAXS(rank=8, core_std=1e-5)).entries["layers.0.up"].tensors()["core"]
    assert 0.5e-5 < core.std() < 2e-5


def test_merge():
    x, model = batch(), stack()
    adapter = scatter_trained(lorry.attach(model, lorry.LoRAXS(rank=4)))
    output = model(x)
    adapter.fuse()
    assert torch.allclose(model(x), output, atol=1e-5)
