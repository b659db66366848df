"""The checks of SMoRA's definition."""

import pytest
import torch
import torch.nn.functional as F
from core.tiny import gradients, off_zero
from torch import nn

import lorry
from lorry.methods.smora import SMoRA


def layer(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 20)).double()
    adapter = lorry.attach(model, SMoRA(**{"rank": 16, "top_k": 4, **options}), dtype=torch.float64)
    return model, adapter, adapter.entries["0"].tensors()


def inputs(rows=12):
    return torch.randn(rows, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def gates_of(model, x):
    """The gates of each expert, by a fresh adapter's records: mass of single tokens."""
    gates = []
    for row in x:
        with lorry.context(model, recording=True) as context:
            model(row.unsqueeze(0))
        gates.append(context.records["default", "0", "mass"])
    return torch.stack(gates)


def test_identity_at_the_start_for_any_gate():
    model, adapter, tensors = layer()
    with torch.no_grad():
        tensors["router"].normal_(0, 3)
    x = inputs()
    assert torch.equal(model(x), F.linear(x, model[0].weight, model[0].bias))
    assert adapter.count() == 16 * (24 + 20) + 16 * 24


@pytest.mark.filterwarnings("ignore:SMoRA")
def test_top_1_of_blocks_equals_separate_experts():
    """Four LoRAs of rank 4 with one active: the same outputs and gradients as written out one by one."""
    model, adapter, tensors = layer(partition=4, top_k=4, alpha=8.0)
    off_zero(adapter)
    x = inputs()
    weight, bias = model[0].weight.detach(), model[0].bias.detach()
    a, b, router = (tensors[n].detach().clone().requires_grad_() for n in ("A", "B", "router"))
    best = (x @ router.T).sigmoid().float().argmax(1)
    rows = []
    for i, e in enumerate(best.tolist()):
        part = slice(4 * e, 4 * e + 4)
        rows.append(weight @ x[i] + bias + 8.0 / 4 * b[:, part] @ (a[part] @ x[i]))
    expected = torch.stack(rows)
    expected.square().sum().backward()
    output = model(x)
    output.square().sum().backward()
    torch.testing.assert_close(output, expected, atol=1e-7, rtol=1e-7)
    found = gradients(adapter)
    torch.testing.assert_close(found["0.A"], a.grad, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found["0.B"], b.grad, atol=1e-6, rtol=1e-6)
    # with a single active expert each gate is h/h = 1
    assert float(found["0.router"].abs().max()) < 1e-6


def test_uniform_gates_are_a_plain_lora():
    model, adapter, tensors = layer(rank=8, top_k=8, alpha=16.0)
    off_zero(adapter)
    with torch.no_grad():
        tensors["router"].zero_()
    x = inputs()
    expected = F.linear(x, model[0].weight, model[0].bias) + 16 / 8 * x @ tensors["A"].T @ tensors["B"].T
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("partition", "bias_in_gate"), [(1, True), (2, True), (2, False)])
def test_gates_are_those_of_the_definition(partition, bias_in_gate):
    model, adapter, tensors = layer(partition=partition, bias_in_gate=bias_in_gate)
    off_zero(adapter, std=0.5)
    tensors["bias"].uniform_(-0.2, 0.2, generator=torch.Generator().manual_seed(1))
    x, k = inputs(), 4 // partition
    q = (x @ tensors["router"].detach().T).sigmoid()
    h = q + tensors["bias"]
    order = h.argsort(-1, descending=True)[:, :k]
    value = (h if bias_in_gate else q).clamp_min(1e-6)
    chosen = torch.zeros_like(h).scatter(1, order, value.gather(1, order))
    expected = k * chosen / chosen.sum(1, keepdim=True)
    found = gates_of(model, x)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    assert ((found != 0).sum(1) == k).all()
    torch.testing.assert_close(found.sum(1), torch.full((12,), float(k)))
    # the sparse form: only chosen ranks are gathered
    ranks = (order[:, :, None] * partition + torch.arange(partition)).flatten(1)
    weights = expected.repeat_interleave(partition, 1).gather(1, ranks)
    units = torch.einsum("tki,ti->tk", tensors["A"][ranks], x) * weights
    update = torch.einsum("tk,tko->to", units, tensors["B"].T[ranks]) * 16.0 / 4
    torch.testing.assert_close(model(x), F.linear(x, model[0].weight, model[0].bias) + update, atol=1e-5, rtol=1e-5)


def test_gradients_reach_what_was_chosen_and_the_router():
    model, adapter, tensors = layer()
    off_zero(adapter)
    x = inputs(2)
    used = (gates_of(model, x) != 0).any(0)
    model(x).square().sum().backward()
    found = gradients(adapter)
    assert 0 < int(used.sum()) < 16
    assert torch.equal(found["0.A"].abs().sum(1) > 0, used)
    assert torch.equal(found["0.B"].abs().sum(0) > 0, used)
    assert found["0.router"].any() and not tensors["bias"].requires_grad


def test_the_bias_balances_fixed_scores():
    model, adapter, tensors = layer(rate=0.01)
    entry, x = adapter.entries["0"], inputs(200) + 2.0
    model.train()

    def variation():
        with lorry.context(model) as context:
            model(x)
        load = context.records["default", "0", "counts"]
        entry.method.after_step(tensors, entry.site, {"counts": load})
        return float(load.std() / load.mean())

    before = variation()
    for _ in range(150):
        after = variation()
    assert before > 0.8 and after < 0.5


def test_gates_stay_finite_under_a_large_negative_bias():
    model, adapter, tensors = layer()
    off_zero(adapter)
    tensors["bias"].fill_(-50.0)
    assert torch.isfinite(model(inputs())).all()


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 8, "top_k": 9},
        {"rank": 9, "top_k": 4, "partition": 2},
        {"rank": 8, "top_k": 3, "partition": 2},
    ],
)
def test_bad_options(options):
    with pytest.raises(lorry.OptionError, match="partition must divide rank and top_k"):
        SMoRA(**options)


def test_a_router_that_cannot_learn_is_warned_of():
    with pytest.warns(UserWarning, match="gets no gradient"):
        SMoRA(rank=8, top_k=1)
