"""Adapters on quantised bases: bitsandbytes in 8 and 4 bit and torchao, on the CPU."""

import subprocess
import sys

import pytest
import torch
from core.tiny import gradients, llama, off_zero, same_bytes, tokens
from torch import nn

import lorry
from lorry.core.errors import SiteError
from lorry.core.sites.fingerprint import FingerprintCache, fingerprint
from lorry.core.sites.kinds import catalogue
from lorry.core.sites.storage import storage_of

#: bitsandbytes repacks 4-bit weights for evaluation on some processors, and then needs widths in blocks of 64.
WIDTH = 128
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
    model = llama(1, dtype=dtype, intermediate_size=WIDTH)
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


def dense(model, dtype=torch.float64):
    """The model with ordinary layers of the weights that its quantised ones stand for."""
    plain = llama(1, intermediate_size=WIDTH).to(dtype)
    with torch.no_grad():
        for path, site in catalogue(model).items():
            plain.get_submodule(path).weight.copy_(site.matrix() if isinstance(site.owner, nn.Linear) else site.stored)
    return plain


@pytest.mark.parametrize("kind", KINDS)
def test_forward_backward_on_a_quantised_base(kind):
    model, ids = quantized(kind), tokens()
    exact = dense(model)(ids).logits
    base = model(ids).logits
    adapter = lorry.attach(model, lorry.LoRA(rank=4))
    # base and adapted layers may take different kernels: the adapted model is as near to float64 as the base is
    tolerance = 1.5 * (base - exact).norm() + 1e-6 * exact.norm()
    assert (model(ids).logits - exact).norm() <= tolerance, "the identity at the start"
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


@pytest.mark.parametrize("kind", [k for k in KINDS if k.startswith("bnb-") and k != "bnb-8"])
def test_gradients_pass_layers_that_were_evaluated_before_and_between(kind):
    """Some processors repack a 4-bit layer for evaluation, into a form that has no gradient."""
    model, ids = quantized(kind), tokens()
    with torch.no_grad():
        model(ids)
    adapter = off_zero(lorry.attach(model, lorry.LoRA(rank=4)))
    with torch.no_grad():
        model(ids)
    model.train()(ids).logits.square().mean().backward()
    found = gradients(adapter)
    plain = dense(model)
    other = lorry.attach(plain, lorry.LoRA(rank=4), dtype=torch.float64)
    with torch.no_grad():
        for (_, a, _), (_, b, _) in zip(other.named_tensors(), adapter.named_tensors(), strict=True):
            a.copy_(b)
    plain.train()(ids).logits.square().mean().backward()
    for name, wanted in gradients(other).items():
        assert (found[name] - wanted).norm() < 1e-4 * wanted.norm(), name


@pytest.mark.parametrize("kind", [k for k in KINDS if k.startswith("bnb-") and k != "bnb-8"])
def test_the_weight_that_is_read_is_the_one_that_the_layer_computes_with(kind):
    """Before and after the layer repacked it, where it does."""
    model = quantized(kind)
    generator = torch.Generator().manual_seed(0)
    for path in ("mlp.down_proj", "self_attn.k_proj"):
        layer = model.get_submodule(f"model.layers.0.{path}")
        x = torch.randn(5, layer.in_features, generator=generator)
        site = catalogue(model)[f"model.layers.0.{path}"]
        with torch.no_grad():
            first = site.matrix().double()
            y = layer(x)
            weight = site.matrix().double()
        assert weight.shape == (layer.out_features, layer.in_features)
        assert (weight - first).norm() < 4e-3 * first.norm(), "scales may be rounded to bfloat16"
        # activations and sums may be rounded to bfloat16, too
        assert (y - x.double() @ weight.T).norm() < 1e-2 * y.norm()


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
        receipt = adapter.fuse()
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
        adapter.unfuse()
        assert torch.equal(model(ids).logits, expected)
        for path, entry in adapter.entries.items():
            assert all(same_bytes(a, b) for a, b in zip(payload(entry.site.stored), before[path], strict=True))
        adapter.detach()


@pytest.mark.parametrize("kind", ["bnb-8", "bnb-nf4", "ao-int8"])
def test_two_adapters_merge_one_after_another_and_come_out_in_reverse(kind):
    model, ids = quantized(kind), tokens()
    with torch.no_grad():
        one = off_zero(lorry.attach(model, lorry.LoRA(rank=2), name="one"), 1)
        two = off_zero(lorry.attach(model, lorry.LoRA(rank=2), name="two"), 2)
        lorry.activate(model, None)
        bare = model(ids).logits
        lorry.activate(model, "two")
        one.fuse()
        first = model(ids).logits
        two.fuse()
        assert not torch.equal(model(ids).logits, first)
        with pytest.raises(lorry.AdapterError, match="unfuse it first"):
            one.unfuse()
        two.unfuse()
        lorry.activate(model, None)
        one_only = model(ids).logits
        one.unfuse()
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
    dense = lorry.attach(llama(1, intermediate_size=WIDTH), lorry.LoRA(rank=2)).fingerprint
    other = lorry.attach(quantized("bnb-nf4"), lorry.LoRA(rank=2)).fingerprint
    assert dense.require(other, "the adapter") == "quantized" and other.require(dense, "the adapter") == "quantized"
    wider = lorry.attach(llama(1, intermediate_size=192), lorry.LoRA(rank=2)).fingerprint
    with pytest.raises(lorry.FingerprintError):
        wider.require(other, "the adapter")


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_quantisation_is_the_same_base_and_another_one_cannot_be_told(kind):
    model = quantized(kind)
    marks = [fingerprint(catalogue(m).values()) for m in (model, quantized(kind))]
    assert marks[0].compare(marks[1]) == "match" and any(":q" in value for value in marks[0].sites.values())
    with torch.no_grad():
        model(tokens())
        assert fingerprint(catalogue(model).values()) == marks[0], "a pass in evaluation leaves it"
        site = catalogue(model)["model.layers.0.self_attn.v_proj"]
        cache = FingerprintCache()
        before = cache.hash_of(site)
        changed = site.matrix().float()
        changed[3, 5] += changed.abs().max()
        site.holder._parameters["weight"] = site.storage.encode(site, changed)
        assert cache.hash_of(site) != before
    assert fingerprint(catalogue(model).values()).compare(marks[0]) == "quantized"


def test_a_storage_nobody_knows_is_an_error_that_says_what_still_works():
    layer = nn.Sequential(nn.Linear(8, 4))
    layer[0].weight = nn.Parameter(layer[0].weight.to(torch.float8_e4m3fn), requires_grad=False)
    adapter = lorry.attach(layer, lorry.LoRA(rank=2))
    with pytest.raises(SiteError, match="float8.*Adapters still run"):
        adapter.fuse()


def test_importing_lorry_imports_none_of_these_packages():
    names = ("bitsandbytes", "torchao", "transformers", "peft")
    code = f"import sys, lorry; print([m for m in {names} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_merging_a_dense_base_imports_neither_package():
    code = (
        "import sys, torch, lorry; m = torch.nn.Sequential(torch.nn.Linear(4, 4)); lorry.attach(m, "
        "lorry.LoRA(rank=2)).fuse(); "
        "print([m for m in ('bitsandbytes', 'torchao') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
