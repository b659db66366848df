"""The checks of FlyLoRA's definition."""

import pytest
import torch
import torch.nn.functional as F
from core.tiny import gradients, llama, off_zero, same_bytes, tokens
from torch import nn

import lorry
from lorry.methods.flylora import FlyLoRA


def layer(width=48, out=40, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, out))
    return model, lorry.attach(model, FlyLoRA(**{"rank": 16, "top_k": 4, **options}), seed=1)


def inputs(rows=20, width=48):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(2))


def dense_a(adapter):
    entry = adapter.entries["0"]
    return entry.method.factors(entry.tensors(), entry.site)[0]


def test_a_is_sparse_frozen_and_made_from_the_seed():
    model, adapter = layer(density=0.25)
    a = dense_a(adapter)
    assert a.shape == (16, 48) and ((a != 0).sum(1) == 12).all()
    assert torch.equal(dense_a(layer(density=0.25)[1]), a)
    other = lorry.attach(nn.Sequential(nn.Linear(48, 40)), FlyLoRA(rank=16, top_k=4, density=0.25), seed=2)
    assert not torch.equal(dense_a(other), a)
    assert [n for n, _ in adapter.named_parameters()] == ["0.B"]
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(2):
        model(inputs()).square().mean().backward()
        optimizer.step()
    assert torch.equal(dense_a(adapter), a)
    assert adapter.count() == 40 * 16


def test_density_is_top_k_over_rank_and_values_have_their_spread():
    _, adapter = layer(width=512, rank=32, top_k=8)
    tensors = adapter.entries["0"].tensors()
    assert tensors["values"].shape == (32, 128)
    assert float(tensors["values"].std()) == pytest.approx(1 / 32, rel=0.05)
    x = inputs(200, 512)
    ratio = F.linear(x, dense_a(adapter)).square().sum(1) / x.square().sum(1)
    assert 0.9 < float(ratio.mean() / (32 * 128 / (512 * 32**2))) < 1.1


@pytest.mark.parametrize("select", ["signed", "magnitude"])
def test_selection_is_brute_force_and_the_bias_never_enters_a_value(select):
    model, adapter = layer(select=select)
    off_zero(adapter)
    tensors = adapter.entries["0"].tensors()
    tensors["bias"].uniform_(-0.05, 0.05, generator=torch.Generator().manual_seed(3))
    x, a, b = inputs(), dense_a(adapter), tensors["B"].detach()
    y = x @ a.T
    score = y + tensors["bias"]
    order = (score.abs() if select == "magnitude" else score).argsort(-1, descending=True)[:, :4]
    kept = torch.zeros_like(y).scatter(1, order, y.gather(1, order))
    without = (x @ model[0].weight.T + model[0].bias).detach()
    torch.testing.assert_close(model(x).detach(), without + 2.0 * kept @ b.T)


def test_only_columns_of_b_that_fired_move():
    model, adapter = layer()
    x = inputs(2)
    with lorry.context(model, recording=True) as context:
        model(x).sum().backward()
    fired = context.records["default", "0", "load"] > 0
    moved = gradients(adapter)["0.B"].abs().sum(0) > 0
    assert torch.equal(fired, moved) and 0 < int(fired.sum()) < 16


def test_all_units_active_is_a_lora_with_frozen_a_and_merges_exactly():
    model, adapter = layer(rank=8, top_k=8, density=0.5)
    twin = nn.Sequential(nn.Linear(48, 40))
    twin.load_state_dict(model.state_dict())
    lora = lorry.attach(twin, {"method": "lora", "rank": 8, "alpha": 16})
    plain = lora.entries["0"].tensors()
    with torch.no_grad():
        plain["A"].copy_(dense_a(adapter))
    optimizers = [torch.optim.Adam([a.entries["0"].tensors()["B"]], lr=0.01) for a in (adapter, lora)]
    x = inputs()
    for _ in range(5):
        losses = [m(x).square().mean() for m in (model, twin)]
        torch.testing.assert_close(losses[0], losses[1])
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    before, weight = model(x).detach(), model[0].weight.clone()
    adapter.fuse()
    torch.testing.assert_close(model(x).detach(), before, atol=1e-5, rtol=1e-5)
    adapter.unfuse()
    assert same_bytes(model[0].weight.detach(), weight.detach())


def test_a_dense_merge_would_differ():
    model, adapter = layer()
    off_zero(adapter)
    entry, x = adapter.entries["0"], inputs()
    a, b = entry.method.factors(entry.tensors(), entry.site)
    base = F.linear(x, model[0].weight, model[0].bias)
    assert float((base + 2.0 * x @ (b @ a).T - model(x)).detach().abs().max()) > 0.01
    with pytest.raises(lorry.AdapterError, match="cannot be fused"):
        adapter.fuse()


@pytest.mark.parametrize("through", [True, False])
def test_gradient_to_the_input(through):
    for top_k in (4, 16):
        model, adapter = layer(top_k=top_k, grad_to_input=through)
        off_zero(adapter)
        x = inputs().requires_grad_()
        model(x).sum().backward()
        alone = model[0].weight.sum(0).expand_as(x)
        assert torch.allclose(x.grad, alone, atol=1e-6) is not through
        assert gradients(adapter)["0.B"].any()


def test_the_bias_moves_after_a_step_in_training_only():
    model, adapter = layer(rate=0.01)
    entry, x = adapter.entries["0"], inputs()
    bias = entry.tensors()["bias"]
    model.train()
    with lorry.context(model) as context:
        model(x)
    assert not bias.any()
    count = context.records["default", "0", "counts"]
    assert float(count.sum()) == 20 * 4
    entry.method.after_step(entry.tensors(), entry.site, {"counts": count})
    torch.testing.assert_close(bias, 0.01 * torch.sign(count.mean() - count))
    entry.method.after_step(entry.tensors(), entry.site, {})
    model.eval()
    with lorry.context(model) as context:
        model(x)
    assert not context.records and bias.dtype is torch.float32


@pytest.mark.parametrize(("select", "balances"), [("signed", True), ("magnitude", False)])
def test_balancing_evens_signed_selection_only(select, balances):
    """A bias cannot balance magnitudes: it raises some and lowers others of the same unit."""
    model, adapter = layer(rate=0.002, select=select)
    entry, x = adapter.entries["0"], inputs(256) + 0.3
    model.train()

    def load():
        with lorry.context(model) as context:
            model(x)
        return context.records["default", "0", "counts"]

    before = load()
    for _ in range(300):
        entry.method.after_step(entry.tensors(), entry.site, {"counts": load()})
    after = load()
    assert (float(after.std() / after.mean()) < 0.3 * float(before.std() / before.mean())) is balances


def test_independent_projections_interfere_less_with_width():
    def overlap(width):
        a, b = (dense_a(lorry.attach(nn.Sequential(nn.Linear(width, 8)), FlyLoRA(), seed=s)) for s in (1, 2))
        return float((a @ b.T).norm() / (a @ a.T).norm())

    assert 0.2 > overlap(1024) > overlap(4096) and overlap(256) < 0.4


def test_bias_stays_in_float32_and_indices_whole_in_every_cast():
    model = llama(dtype=torch.bfloat16)
    adapter = lorry.attach(model, FlyLoRA(rank=8, top_k=2), dtype=torch.bfloat16)
    model.train()
    model(tokens()).logits.sum().backward()
    tensors = next(iter(adapter.entries.values())).tensors()
    assert tensors["bias"].dtype is torch.float32 and tensors["positions"].dtype is torch.int32
    assert tensors["values"].dtype is torch.bfloat16


def test_convolutions_and_embeddings():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten())
    adapter = off_zero(lorry.attach(model, FlyLoRA(rank=6, top_k=2), targets="all"))
    x = torch.randn(2, 3, 5, 5)
    tensors = adapter.entries["0"].tensors()
    patches = F.unfold(x, 3).transpose(1, 2)
    y = patches @ adapter.entries["0"].method.factors(tensors, adapter.entries["0"].site)[0].T
    order = y.argsort(-1, descending=True)[..., :2]
    z = torch.zeros_like(y).scatter(-1, order, y.gather(-1, order))
    expected = F.conv2d(x, model[0].weight, model[0].bias) + 2 * (z @ tensors["B"].T).transpose(1, 2).unflatten(
        2, (3, 3)
    )
    torch.testing.assert_close(model(x), expected.flatten(1), atol=1e-5, rtol=1e-5)
    table = nn.Sequential(nn.Embedding(20, 12))
    off_zero(lorry.attach(table, FlyLoRA(rank=6, top_k=2), targets="all"))
    assert table(torch.tensor([[1, 2]])).shape == (1, 2, 12)


def test_groups_of_a_convolution_choose_for_themselves():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(6, 4, 3, groups=2))
    adapter = off_zero(lorry.attach(model, FlyLoRA(rank=4, top_k=2, density=0.5), targets="all"))
    entry, x = adapter.entries["0"], torch.randn(2, 6, 7)
    a, b = entry.method.factors(entry.tensors(), entry.site)
    expected = model[0]._conv_forward(x, model[0].weight, model[0].bias)
    for group in range(2):
        units = F.conv1d(x[:, 3 * group : 3 * group + 3], a.view(4, 3, 3)).movedim(1, -1)
        order = units.argsort(-1, descending=True)[..., :2]
        kept = torch.zeros_like(units).scatter(-1, order, units.gather(-1, order))
        part = slice(2 * group, 2 * group + 2)
        expected[:, part] = expected[:, part] + 2 * (kept @ b[part].T).movedim(-1, 1)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    # all units active: through the factors and dense is the same
    whole = FlyLoRA(rank=4, top_k=4, density=0.5)
    other = off_zero(lorry.attach(nn.Sequential(nn.Conv1d(6, 4, 3, groups=2)), whole, targets="all"))
    site, tensors = other.entries["0"].site, other.entries["0"].tensors()
    a, b = whole.factors(tensors, site)
    factored = site.kind.up(site, site.kind.down(site, x, a), b)
    torch.testing.assert_close(factored, site.kind.dense(site, x, b @ a), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"rank": 8, "top_k": 9}, {"density": 0.0}, {"density": 1.5}, {"select": "largest"}, {"rate": -1.0}],
)
def test_bad_options(options):
    with pytest.raises(lorry.OptionError, match=str(next(reversed(options.values())))):
        FlyLoRA(**options)
