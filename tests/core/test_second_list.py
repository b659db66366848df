"""Results that were silently wrong on models as people have them: each as a promise, against plain PyTorch."""

import copy
import io

import pytest
import torch
from core.tiny import llama, off_zero, tokens

import lorry

TARGETS = {"mixlora": "mlp", "full": ["model.norm"]}
ALL = sorted(lorry.methods())


def targets_of(slug):
    return TARGETS.get(slug, "attention")


def trained(slug, **more):
    model = llama(**more)
    return model, off_zero(lorry.attach(model, slug, targets=targets_of(slug)))


# -- whole models, written and read by torch


@pytest.mark.parametrize("slug", ALL)
def test_a_model_is_written_and_read_by_torch(slug):
    """In training and frozen; what is read can be trained, saved and detached."""
    for training in (True, False):
        model, adapter = trained(slug)
        adapter.train(training)
        before = model(tokens()).logits.detach()
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        read = torch.load(file, weights_only=False)
        assert torch.equal(read(tokens()).logits.detach(), before)
        again = lorry.adapters(read)["default"]
        assert {n: s.shape for n, _, s in again.named_tensors()} == {n: s.shape for n, _, s in adapter.named_tensors()}
        again.train()
        read(tokens()).logits.sum().backward()
        assert any(p.grad is not None and p.grad.any() for p in again.parameters())
        again.detach()
        assert type(read.model.layers[0].mlp.up_proj) is torch.nn.Linear
        assert torch.equal(model(tokens()).logits.detach(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("slug", ALL)
def test_a_cast_model_computes_trains_saves_and_merges(slug, dtype, tmp_path):
    model, adapter = trained(slug)
    expected = model(tokens()).logits.detach()
    model.to(dtype)
    found = model(tokens()).logits
    assert found.dtype == dtype
    rough = 0.1 if dtype == torch.bfloat16 else 1e-4
    constant = adapter.method.merging != "never"  # routes are choices: in half precision some tokens take others
    if dtype == torch.float64 or constant:
        torch.testing.assert_close(found.float(), expected, atol=rough, rtol=rough)
    found.float().sum().backward()
    adapter.save(tmp_path / "a")
    other = llama().to(dtype)
    lorry.load(other, tmp_path / "a")
    # what is loaded computes in float32 what was cast here (DoRA's norms, VeRA's pair)
    if dtype == torch.float64 or constant:
        torch.testing.assert_close(other(tokens()).logits, model(tokens()).logits, atol=rough, rtol=rough)
    if constant:
        adapter.train(False)
        unmerged = model(tokens()).logits.detach()
        adapter.merge()
        rough = 0.1 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(model(tokens()).logits.detach(), unmerged, atol=rough, rtol=rough)


def test_a_tensor_that_keeps_its_type_keeps_its_values():
    """Uni-LoRA's one vector moves in very small steps."""
    model, adapter = trained("uni-lora")
    before = dict(adapter.named_parameters())["shared.theta"].detach().clone()
    model.to(torch.bfloat16)
    after = dict(adapter.named_parameters())["shared.theta"]
    assert torch.equal(after.detach(), before) and after.requires_grad
    model.float()
    assert torch.equal(dict(adapter.named_parameters())["shared.theta"].detach(), before)


def test_a_copied_adapter_says_that_it_cannot_start_anew():
    model, adapter = trained("vera")
    spec = next(s for _, _, s in lorry.adapters(copy.deepcopy(model))["default"].named_tensors())
    with pytest.raises(lorry.AdapterError, match=r"attach a fresh one"):
        spec.init(torch.zeros(spec.shape), torch.Generator())
