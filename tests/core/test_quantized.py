"""Adapters on quantised bases: bitsandbytes in 8 and 4 bit and torchao, on the CPU."""

import subprocess
import sys

import pytest
import torch
from core.tiny import gradients, llama, off_zero, same_bytes, tokens
from torch import nn

import lorry
from lorry.core.errors import SiteError
from lorry.core.sites.storage import storage_of

KINDS = [
    "bnb-8",
    "bnb-nf4",
    "bnb-nf4-double",
    "bnb-fp4",
    "bnb-fp4-double",
    "ao-int8",
    "ao-int8-dynamic",
    "ao-float8",
    "ao-intx4",
]


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n}


def quantized(kind, dtype=torch.float32):
    model = llama(1, dtype=dtype)
    package, _, rest = kind.partition("-")
    if package == "ao":
        pytest.importorskip("torchao")
        import torchao.quantization as ao
        from torchao.quantization.granularity import PerGroup

        config = {
            "int8": ao.Int8WeightOnlyConfig,
            "int8-dynamic": ao.Int8DynamicActivationInt8WeightConfig,
            "float8": ao.Float8WeightOnlyConfig,
            "intx4": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
        }[rest]()
        ao.quantize_(model.model, config)
        return model
    bnb = pytest.importorskip("bitsandbytes")
    for path, module in linears(model).items():
        shape = (module.in_features, module.out_features)
        if rest == "8":
            new = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
        else:
            new = bnb.nn.Linear4bit(*shape, bias=False, quant_type=rest[:3], compress_statistics="double" in rest)
            new.weight = bnb.nn.Params4bit(
                module.weight.data, quant_type=rest[:3], compress_statistics="double" in rest, module=new
            )
        model.set_submodule(path, new.to("cpu"))
    return model.eval()


def payload(weight):
    """The bytes of a quantised weight, whatever its class."""
    if hasattr(weight, "qdata"):
        return [weight.qdata.clone(), weight.scale.clone()]
    found = [weight.data.clone()]
    state = getattr(weight, "quant_state", None)
    return found if state is None else [*found, state.absmax.clone()]


@pytest.mark.parametrize("kind", KINDS)
def test_forward_backward_on_a_quantised_base(kind):
    model, ids = quantized(kind), tokens()
    base = model(ids).logits
    adapter = lorry.attach(model, lorry.LoRA(rank=4))
    assert torch.equal(model(ids).logits, base), "the identity at the start"
    off_zero(adapter)
    model(ids).logits.square().mean().backward()
    assert all(g.abs().sum() > 0 for g in gradients(adapter).values())
    # the same update computed from the layer's own output
    linear, entry = (
        linears(model)["model.layers.0.mlp.up_proj"],
        adapter.entries["model.layers.0.mlp.up_proj"],
    )
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    with_adapter = linear(x)
    lorry.activate(model, None)
    torch.testing.assert_close(with_adapter, linear(x) + x @ entry.delta().T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_measures_its_error_and_unmerge_restores_every_byte(kind, dtype):
    if kind == "ao-int8-dynamic" and dtype == torch.bfloat16:
        pytest.skip("the same storage as in float32")
    model, ids = quantized(kind, dtype), tokens()
    adapter = off_zero(lorry.attach(model, lorry.LoRA(rank=4)))
    with torch.no_grad():
        expected = model(ids).logits
        before = {p: payload(e.site.stored) for p, e in adapter.entries.items()}
        weights = {p: e.site.matrix().float() + e.delta() for p, e in adapter.entries.items()}
        receipt = adapter.merge()
        worst = 0.0
        for path, entry in adapter.entries.items():
            assert not storage_of(entry.site).lossless
            worst = max(worst, float((entry.site.matrix().float() - weights[path]).abs().max()))
        assert receipt.max_error == pytest.approx(worst, rel=1e-3) and 0 < receipt.relative_error < 10
        assert any("quantised again" in note for note in receipt.notes)
        merged = model(ids).logits
        lorry.activate(model, None)
        torch.testing.assert_close(model(ids).logits, merged)
        lorry.activate(model, "default")
        assert (merged - expected).norm() < 0.3 * expected.norm()
        adapter.unmerge()
        assert torch.equal(model(ids).logits, expected)
        for path, entry in adapter.entries.items():
            assert all(same_bytes(a, b) for a, b in zip(payload(entry.site.stored), before[path], strict=True))
        adapter.detach()


@pytest.mark.parametrize("kind", ["bnb-8", "bnb-nf4", "ao-int8"])
def test_two_adapters_merge_one_after_another_and_come_out_in_reverse(kind):
    model, ids = quantized(kind), tokens()
    with torch.no_grad():
        bare = model(ids).logits
        one = off_zero(lorry.attach(model, lorry.LoRA(rank=2), name="one"), 1)
        two = off_zero(lorry.attach(model, lorry.LoRA(rank=2), name="two"), 2)
        one.merge()
        first = model(ids).logits
        two.merge()
        assert not torch.equal(model(ids).logits, first)
        with pytest.raises(lorry.AdapterError, match="unmerge it first"):
            one.unmerge()
        two.unmerge()
        lorry.activate(model, None)
        one_only = model(ids).logits
        one.unmerge()
        assert torch.equal(model(ids).logits, bare) and not torch.equal(one_only, bare)


@pytest.mark.parametrize("kind", ["bnb-8", "bnb-nf4", "ao-int8"])
def test_rows_and_dora_on_a_quantised_base(kind):
    model, ids = quantized(kind), tokens()
    off_zero(lorry.attach(model, lorry.LoRA(rank=4), name="a"), 1)
    off_zero(lorry.attach(model, lorry.DoRA(rank=2), name="b"), 2)
    with torch.no_grad():
        with lorry.rows(model, ["a", None, {"a": 0.5, "b": 0.5}]):
            mixed = model(ids).logits
        for row, composition in enumerate(["a", None, {"a": 0.5, "b": 0.5}]):
            lorry.activate(model, composition)
            # 8-bit products quantise activations row by row, so rows do not mix
            torch.testing.assert_close(mixed[row], model(ids[row : row + 1]).logits[0], atol=1e-4, rtol=1e-4)


def test_a_quantised_base_is_not_compared_by_weights_but_by_shapes():
    dense = lorry.attach(llama(1), lorry.LoRA(rank=2)).fingerprint
    other = lorry.attach(quantized("bnb-nf4"), lorry.LoRA(rank=2)).fingerprint
    assert dense.require(other, "the adapter") == "quantized" and other.require(dense, "the adapter") == "quantized"
    wider = lorry.attach(llama(1, intermediate_size=128), lorry.LoRA(rank=2)).fingerprint
    with pytest.raises(lorry.FingerprintError):
        wider.require(other, "the adapter")


def test_a_storage_nobody_knows_is_an_error_that_says_what_still_works():
    layer = nn.Sequential(nn.Linear(8, 4))
    layer[0].weight = nn.Parameter(layer[0].weight.to(torch.float8_e4m3fn), requires_grad=False)
    adapter = lorry.attach(layer, lorry.LoRA(rank=2))
    with pytest.raises(SiteError, match="float8.*Adapters still run"):
        adapter.merge()


def test_importing_lorry_imports_neither_package_nor_this_storage():
    code = (
        "import sys, lorry; print([m for m in ('bitsandbytes', 'torchao', 'transformers', 'peft', "
        "'lorry.core.sites.quantized') "
        "if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_merging_a_dense_base_imports_neither_package():
    code = (
        "import sys, torch, lorry; m = torch.nn.Sequential(torch.nn.Linear(4, 4)); lorry.attach(m, "
        "lorry.LoRA(rank=2)).merge(); "
        "print([m for m in ('bitsandbytes', 'torchao') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
