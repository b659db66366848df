"""The checks of CoMoL's definition."""

import pytest
import torch
import torch.nn.functional as F
from core.tiny import gradients, llama, off_zero, tokens
from torch import nn

import lorry
from lorry.merging.mixture import from_adapters
from lorry.methods.comol import CoMoL


def layer(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 20)).double()
    adapter = lorry.attach(model, CoMoL(**{"rank": 4, "experts": 3, **options}), dtype=torch.float64)
    return model, adapter, adapter.entries["0"].tensors()


def inputs(*shape):
    return torch.randn(*(shape or (7,)), 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def base(model, x):
    return F.linear(x, model[0].weight, model[0].bias)


@pytest.mark.parametrize("start", ["up", "core"])
def test_identity_at_the_start_for_any_router(start):
    model, _, tensors = layer(start=start)
    with torch.no_grad():
        tensors["router"].normal_(0, 3)
    assert torch.equal(model(inputs()), base(model, inputs()))
    assert tensors["cores"].any() is not (start == "core") and tensors["B"].any() == (start == "core")


@pytest.mark.parametrize("router_input", ["core", "full"])
def test_mixed_outputs_are_mixed_cores_with_gradients(router_input):
    model, adapter, tensors = layer(router_input=router_input, alpha=8.0)
    off_zero(adapter, std=0.5)
    x = inputs(2, 5)
    own = {n: t.detach().clone().requires_grad_() for n, t in tensors.items()}
    code = x @ own["A"].T
    gates = ((code if router_input == "core" else x) @ own["router"].T).softmax(-1)
    core = torch.einsum("bte,eij->btij", gates, own["cores"])
    expected = base(model, x) + 2.0 * torch.einsum("btij,btj->bti", core, code) @ own["B"].T
    output = model(x)
    # the gates are worked out in float32
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-6)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, gradient in gradients(adapter).items():
        torch.testing.assert_close(gradient, own[name.removeprefix("0.")].grad, atol=1e-5, rtol=1e-5)


def test_one_core_is_a_plain_lora_and_merges():
    model, adapter, tensors = layer(experts=1, alpha=8.0)
    off_zero(adapter)
    x = inputs()
    expected = base(model, x) + 2.0 * x @ tensors["A"].T @ (tensors["B"] @ tensors["cores"][0]).T
    torch.testing.assert_close(model(x), expected)
    adapter.fuse()
    torch.testing.assert_close(model(x), expected)


def test_equal_cores_give_the_router_no_gradient():
    model, adapter, tensors = layer()
    off_zero(adapter)
    with torch.no_grad():
        tensors["cores"].copy_(tensors["cores"][0].clone().expand(3, 4, 4))
    model(inputs()).square().sum().backward()
    assert float(gradients(adapter)["0.router"].abs().max()) < 1e-6
    expected = base(model, inputs()) + inputs() @ tensors["A"].T @ (tensors["B"] @ tensors["cores"][0]).T
    torch.testing.assert_close(model(inputs()), expected, atol=1e-6, rtol=1e-6)


def test_gauge_freedom():
    model, adapter, tensors = layer()
    off_zero(adapter, std=0.3)
    before = model(inputs()).detach()
    p, q = (torch.eye(4).double() + 0.3 * torch.randn(4, 4, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    with torch.no_grad():
        tensors["B"].copy_(tensors["B"] @ p.inverse())
        tensors["cores"].copy_(p @ tensors["cores"] @ q.inverse())
        tensors["A"].copy_(q @ tensors["A"])
        tensors["router"].copy_(tensors["router"] @ q.inverse())
    torch.testing.assert_close(model(inputs()).detach(), before, atol=1e-6, rtol=1e-6)


def test_tokens_are_routed_by_themselves():
    model, adapter, _ = layer(router_std=1.0)
    off_zero(adapter)
    x = inputs(1, 6)
    with torch.no_grad():
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        torch.testing.assert_close(model(x)[:, order], model(x[:, order]))
        torch.testing.assert_close(model(x)[:, 2:3], model(x[:, 2:3]))


#: Shapes (out, in) of q, k, v, o, down_proj, and layers, by model; the totals are the published ones.
QWEN_8B = ([(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (4096, 12288)], 36)
QWEN_14B = ([(5120, 5120), (1024, 5120), (1024, 5120), (5120, 5120), (5120, 17408)], 40)
LLAMA_8B = ([(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (4096, 14336)], 32)


@pytest.mark.parametrize(
    ("model", "experts", "router", "millions"),
    [
        (QWEN_8B, 8, "core", 25.16),
        (QWEN_8B, 64, "core", 27.91),
        (QWEN_8B, 4, "core", 24.97),
        (QWEN_8B, 8, "full", 33.40),
        (QWEN_8B, 64, "full", 93.78),
        (QWEN_14B, 8, "core", 35.82),
        (LLAMA_8B, 4, "core", 23.24),
    ],
)
def test_published_parameter_counts(model, experts, router, millions):
    shapes, layers = model
    with torch.device("meta"):
        block = nn.ModuleList(nn.Linear(i, o, bias=False) for o, i in shapes)
    method = CoMoL(rank=16, experts=experts, router_input=router)
    plan = lorry.plan(block, method)
    assert plan.trained * layers / 1e6 == pytest.approx(millions, abs=0.005)
    formula = sum(16 * (o + i) + experts * 256 + experts * (16 if router == "core" else i) for o, i in shapes)
    assert plan.trained == formula


def loras(model, same_space):
    """Two trained LoRAs, the second in the spaces of the first or not."""
    adapters = [
        lorry.attach(model, {"method": "lora", "rank": 3, "alpha": 6}, name=n, seed=s) for s, n in enumerate("ab")
    ]
    for number, adapter in enumerate(adapters):
        off_zero(adapter, seed=number, std=0.3)
    if same_space:
        mix = torch.randn(3, 3, generator=torch.Generator().manual_seed(4))
        for path, entry in adapters[1].entries.items():
            first = adapters[0].entries[path].tensors()
            with torch.no_grad():
                entry.tensors()["A"].copy_(mix @ first["A"])
                entry.tensors()["B"].copy_(first["B"] @ mix.T)
    return adapters


@pytest.mark.parametrize("same_space", [True, False])
def test_cores_of_existing_loras(same_space):
    model = llama()
    sources = loras(model, same_space)
    kept = {n: t.clone() for a in sources for n, t, _ in ((a.name + n, t, s) for n, t, s in a.named_tensors())}
    mixed = from_adapters(model, "comol", ["a", "b"], name="mix")
    for path, entry in mixed.entries.items():
        tensors = entry.tensors()
        for number, source in enumerate(sources):
            delta = source.entries[path].delta()
            rebuilt = tensors["B"] @ tensors["cores"][number] @ tensors["A"]
            error = float((rebuilt - delta).detach().norm() / delta.detach().norm())
            assert error < 1e-5 if number == 0 or same_space else error > 0.1
    assert (mixed.receipt.relative_error < 1e-3) is same_space
    assert all(torch.equal(t, kept[a.name + n]) for a in sources for n, t, _ in a.named_tensors())
    assert {n.rpartition(".")[2] for n, _ in mixed.named_parameters()} == {"cores", "router", "router_bias"}
    model(tokens())


def test_the_reference_can_be_used_through_its_gate():
    """With a gate that always takes the first core, the mixture is the reference LoRA."""
    model = llama()
    loras(model, False)
    ids = tokens()
    lorry.activate(model, "a")
    expected = model(ids).logits.detach()
    mixed = from_adapters(model, "comol", ["a", "b"], name="mix")
    with torch.no_grad():
        for entry in mixed.entries.values():
            entry.tensors()["router_bias"].copy_(torch.tensor([40.0, 0.0]))
    torch.testing.assert_close(model(ids).logits.detach(), expected, atol=1e-5, rtol=1e-4)


def test_bad_options():
    with pytest.raises(lorry.OptionError, match="would stay zero"):
        CoMoL(train_factors=False)
    with pytest.raises(lorry.OptionError, match="router_input"):
        CoMoL(router_input="both")
    with pytest.raises(lorry.OptionError, match="at least 1"):
        CoMoL(experts=0)
