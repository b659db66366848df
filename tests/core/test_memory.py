"""What is kept for the backward pass, dtypes, autocast."""

import pytest
import torch
from core.tiny import gradients, llama, off_zero, tokens

import lorry


def kept_by(run):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = run()
    return result, kept


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bfloat16_base_keeps_no_float32_copy_of_activations(dtype, dropout):
    model = llama(dtype=torch.bfloat16).train()
    adapter = off_zero(lorry.attach(model, lorry.LoRA(rank=3, dropout=dropout), dtype=dtype))
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(4, 9, 64, dtype=torch.bfloat16, requires_grad=True)
    y, kept = kept_by(lambda: layer(x))
    assert y.dtype == torch.bfloat16
    own = {t.data_ptr() for _, t, _ in adapter.named_tensors()}
    floats = [t for t in kept if t.dtype == torch.float32 and t.data_ptr() not in own]
    assert not floats
    large = [t for t in kept if t.numel() == x.numel()]
    assert [t.data_ptr() for t in large] == [x.data_ptr()], "x is kept once, and no mask of its size"
    y.float().square().sum().backward()
    assert x.grad.dtype == torch.bfloat16 and {g.dtype for g in gradients_of(adapter, "up_proj")} == {dtype}


def gradients_of(adapter, name):
    return [p.grad for n, p in adapter.named_parameters() if f"layers.0.mlp.{name}" in n]


@pytest.mark.parametrize(
    "method", [lorry.LoRA(rank=3), lorry.DoRA(rank=3), lorry.PiSSA(rank=3)], ids=lambda m: m.info.slug
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bfloat16_model_stays_bfloat16_and_is_near_the_float32_one(method, dtype):
    results = {}
    for base in (torch.float32, torch.bfloat16):
        model = llama(dtype=base)
        adapter = off_zero(lorry.attach(model, method, dtype=dtype), std=0.03)
        out = model(tokens()).logits
        assert out.dtype == base
        out.float().square().mean().backward()
        assert {g.dtype for g in gradients(adapter).values()} == {dtype}
        results[base] = out.detach().float()
    error = (results[torch.bfloat16] - results[torch.float32]).norm() / results[torch.float32].norm()
    assert error < 0.05


@pytest.mark.parametrize("method", [lorry.LoRA(rank=3, dropout=0.1), lorry.DoRA(rank=3)], ids=lambda m: m.info.slug)
def test_autocast_of_a_float32_model(method):
    model = llama().train()
    adapter = off_zero(lorry.attach(model, method), std=0.1)
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(4, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        model(tokens()).logits.float().square().mean().backward()
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and {g.dtype for g in gradients(adapter).values()} == {torch.float32}
    model.eval()
    with torch.no_grad():
        wanted = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(layer(x).float(), wanted, atol=0.05, rtol=0.05)


def test_casting_the_model_takes_a_trained_adapter_along():
    model = llama()
    adapter = off_zero(lorry.attach(model, lorry.LoRA(rank=2)))
    before = adapter.parameters()
    model.to(torch.bfloat16)
    assert {p.dtype for p in adapter.parameters()} == {torch.bfloat16}
    assert all(a is b for a, b in zip(before, adapter.parameters(), strict=True)), "optimizers keep their parameters"
    model(tokens()).logits.float().sum().backward()
    assert gradients(adapter)


def test_a_frozen_adapter_keeps_nothing_of_its_own():
    model = llama(1)
    off_zero(lorry.attach(model, lorry.LoRA(rank=2))).train(False)
    layer = model.model.layers[0].mlp.up_proj
    _, kept = kept_by(lambda: layer(torch.randn(4, 64)))
    assert not kept
    x = torch.randn(4, 64, requires_grad=True)
    y, kept = kept_by(lambda: layer(x))
    (found,) = torch.autograd.grad(y.sum(), x)
    entry = lorry.adapters(model)["default"].entries["model.layers.0.mlp.up_proj"]
    torch.testing.assert_close(found, torch.ones(4, 96) @ (layer.weight + entry.delta()), atol=1e-5, rtol=1e-4)
