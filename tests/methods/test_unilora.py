import math

import pytest
import torch
from methods.small import batch, copies, peft_model, set_tensors, stack, train

import lorry
from lorry.methods.unilora import balanced


def matrix_of(adapter):
    """P as a dense matrix ``(D, d)`` in the order of the adapter's sites' paths."""
    theta, scale = adapter.shared.tensors()["theta"], adapter.shared.tensors()["inverse_roots"].double()
    index = torch.cat([adapter.entries[p].home.tensors()["index"].long() for p in sorted(adapter.entries)])
    dense = torch.zeros(len(index), len(theta), dtype=torch.float64)
    dense[torch.arange(len(index)), index] = scale[index]
    return dense


@pytest.mark.parametrize("projection", ["balanced", "local", "identity"])
def test_isometry(projection):
    adapter = lorry.attach(stack(), lorry.UniLoRA(rank=3, projection=projection))
    p = matrix_of(adapter)
    assert torch.allclose(p.T @ p, torch.eye(p.shape[1], dtype=torch.float64), atol=1e-6)
    u, v = torch.randn(2, p.shape[1], dtype=torch.float64)
    assert math.isclose((p @ u - p @ v).norm(), (u - v).norm(), rel_tol=1e-6)


def test_balance_and_seed():
    index = balanced(1010, 17, torch.Generator().manual_seed(1))
    uses = torch.bincount(index, minlength=17)
    assert uses.max() - uses.min() == 1 and uses.sum() == 1010
    assert torch.equal(index, balanced(1010, 17, torch.Generator().manual_seed(1)))
    assert not torch.equal(index, balanced(1010, 17, torch.Generator().manual_seed(2)))


def test_assignment_depends_on_projection_seed_only():
    def index(seed, projection_seed):
        adapter = lorry.attach(stack(), lorry.UniLoRA(projection_seed=projection_seed), seed=seed)
        return adapter.entries["layers.0.up"].home.tensors()["index"]

    assert torch.equal(index(0, 42), index(1, 42))
    assert not torch.equal(index(0, 42), index(0, 43))


def test_one_vector_for_all():
    model = stack()
    adapter = lorry.attach(model, lorry.UniLoRA(rank=4, size=50))
    assert [p.shape for p in adapter.parameters()] == [(50,)]
    assert adapter.count() == 50
    assert len({e.tensors()["theta"].data_ptr() for e in adapter.entries.values()}) == 1
    assert adapter.to(torch.bfloat16).shared.tensors()["theta"].dtype == torch.float32


def test_default_size_is_that_of_rank_one():
    model = stack()
    assert lorry.attach(model, lorry.UniLoRA(rank=4)).count() == lorry.plan(stack(), lorry.LoRA(rank=1)).trained


def test_identity_projection_is_lora():
    x = batch()
    lora_model, uni_model = stack(), stack()
    lora = lorry.attach(lora_model, lorry.LoRA(rank=2))
    uni = lorry.attach(uni_model, lorry.UniLoRA(rank=2, projection="identity"))
    values = copies(lora)
    parts = [values[f"{path}.{n}"].flatten() for path in sorted(lora.entries) for n in "AB"]
    set_tensors(uni, {"shared.theta": torch.cat(parts)})
    assert torch.allclose(lora_model(x), uni_model(x), atol=1e-6)
    losses = [
        train(m, a, 5, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        for m, a in ((lora_model, lora), (uni_model, uni))
    ]
    assert torch.allclose(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-5)


def test_gradient_is_the_projected_one():
    model = stack().double()
    adapter = lorry.attach(model, lorry.UniLoRA(rank=2, size=40), dtype=torch.float64)
    plain = lorry.attach(stack().double(), lorry.LoRA(rank=2), dtype=torch.float64)
    base = plain.state.root
    with torch.no_grad():
        for path, entry in adapter.entries.items():
            a, b = entry.method.factors(entry.tensors(), entry.site)
            set_tensors(plain, {f"{path}.A": a, f"{path}.B": b})
    for m in (model, base):
        m(batch().double()).square().sum().backward()
    whole = torch.cat([plain.entries[p].tensors()[n].grad.flatten() for p in sorted(plain.entries) for n in "AB"])
    expected = matrix_of(adapter).T @ whole
    assert torch.allclose(adapter.parameters()[0].grad.double(), expected, rtol=1e-5, atol=1e-7)


def test_round_trip_rebuilds_the_assignment(tmp_path):
    x, model = batch(), stack()
    adapter = lorry.attach(model, lorry.UniLoRA(rank=4, size=60))
    train(model, adapter, 3)
    adapter.save(tmp_path / "a")
    other = stack()
    loaded = lorry.load(other, tmp_path / "a")
    assert all(torch.equal(v, copies(loaded)[k]) for k, v in copies(adapter).items())
    assert torch.equal(model(x), other(x))
    written = (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    assert written < 60 * 4 + 2000


def test_merges_and_switches_off():
    x, model = batch(), stack()
    bare = stack()(x)
    adapter = lorry.attach(model, lorry.UniLoRA())
    with_adapter = model(x)
    assert not torch.equal(with_adapter, bare)
    lorry.activate(model, None)
    assert torch.equal(model(x), bare)
    lorry.activate(model, "default")
    adapter.fuse()
    assert torch.allclose(model(x), with_adapter, atol=1e-6)


def test_same_as_peft():
    from peft import UniLoraConfig

    x = batch()
    config = UniLoraConfig(r=3, theta_d_length=77, target_modules=["up", "down"], unilora_dropout=0.0)
    peer = peft_model(stack(), config)
    model = stack()
    adapter = lorry.attach(model, lorry.UniLoRA(rank=3, size=77))
    values = {}
    for path in adapter.entries:
        layer = peer.base_model.model.get_submodule(path)
        indices = [layer.unilora_indices_A["default"], layer.unilora_indices_B["default"]]
        values[f"{path}.index"] = torch.cat([i.flatten() for i in indices])
    scales = torch.zeros(77)
    for module in peer.modules():
        if hasattr(module, "unilora_scales_A"):
            scales[module.unilora_indices_A["default"]] = module.unilora_scales_A["default"]
            scales[module.unilora_indices_B["default"]] = module.unilora_scales_B["default"]
    theta = peer.base_model.unilora_theta_d["default"].detach()
    set_tensors(adapter, {**values, "shared.theta": theta, "shared.inverse_roots": scales})
    assert torch.allclose(model(x), peer(x), atol=1e-5)


@pytest.mark.parametrize("options", [{"size": 10**6}, {"projection": "identity", "size": 5}])
def test_sizes_that_do_not_fit(options):
    with pytest.raises(lorry.OptionError, match="size must be"):
        lorry.attach(stack(), lorry.UniLoRA(**options))
    with pytest.raises(lorry.OptionError, match="bound"):
        lorry.UniLoRA(bound=0.0)
