"""SHiRA-DoRA against its formula in float64."""

import torch
from methods.small import batch, scatter_trained, stack, train

import lorry
from lorry.core.life.switch import make_switch


def formula(entry, alpha=None):
    """The change of DoRA, dense, times the mask of the largest weights."""
    own = entry.tensors()
    weight = entry.site.matrix()
    change = weight + (1.0 if alpha is None else alpha / entry.method.rank) * own["B"] @ own["A"]
    norms = torch.linalg.vector_norm(change, dim=-1, keepdim=True).detach()
    mask = torch.zeros_like(weight).flatten()
    count = max(1, round(entry.method.density * weight.numel()))
    mask[weight.abs().flatten().topk(count).indices] = 1
    return (own["magnitude"][:, None] * change / norms - weight) * mask.view_as(weight)


def attached(**options):
    model = stack().double()
    method = lorry.SHiRADoRA(**{"rank": 4, "density": 0.1, **options})
    return model, lorry.attach(model, method, dtype=torch.float64)


def test_identity_at_the_start_to_rounding():
    model, _ = attached()
    torch.testing.assert_close(model(batch().double()), stack().double()(batch().double()), atol=1e-12, rtol=1e-12)


def test_change_and_gradients_are_those_of_the_formula():
    model, adapter = attached(alpha=8.0)
    scatter_trained(adapter)
    entry = adapter.entries["layers.0.up"]
    weights = torch.randn(entry.site.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = entry.delta()
    (found * weights).sum().backward()
    mine = {n: t.grad.clone() for n, t in entry.tensors().items() if t.requires_grad}
    for tensor in adapter.parameters():
        tensor.grad = None
    expected = formula(entry, 8.0)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    (expected * weights).sum().backward()
    assert mine.keys() == {"A", "B", "magnitude"}
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, entry.tensors()[name].grad, atol=1e-12, rtol=1e-10)


def test_few_weights_change_and_many_are_trained():
    model, adapter = attached(density=0.01)
    train_x = batch(16).double()
    for _ in range(3):
        (model(train_x) - 1).square().mean().backward()
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter -= 0.5 * parameter.grad
                parameter.grad = None
    for site, delta in adapter.deltas():
        changed = int((delta != 0).sum())
        assert changed == max(1, round(0.01 * delta.numel()))
        assert adapter.count() > 4 * changed and site.path


def test_it_learns_and_switches_in_place():
    model = stack()
    adapter = lorry.attach(model, lorry.SHiRADoRA(rank=4, density=0.2))
    losses = train(model, adapter, 60)
    assert losses[-1] < 0.9 * losses[0]
    adapter.train(False)
    wanted = model(batch()).detach()
    lorry.activate(model, None)
    switch = make_switch(adapter)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    switch.on()
    torch.testing.assert_close(model(batch()).detach(), wanted, atol=1e-5, rtol=1e-4)
    switch.off()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
