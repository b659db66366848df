"""The checks of EPT's definition."""

import math

import pytest
import torch
import torch.nn.functional as F
from core.tiny import gradients, llama, off_zero, tokens
from torch import nn

import lorry
from lorry.methods.ept import EPT
from lorry.methods.parts.tasks import nearest_tasks, pooled, similarities


def layer(width=48, out=24, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, out)).double()
    chosen = {"kernels": (2, 4, 6), "rank": 3, "tasks": 4, "temperature": 1.0, **options}
    adapter = lorry.attach(model, EPT(**chosen), dtype=torch.float64)
    return model, adapter, adapter.entries["0"]


def inputs(*shape, width=48):
    return torch.randn(*(shape or (7,)), width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def base(model, x):
    return F.linear(x, model[0].weight, model[0].bias)


def test_an_expert_is_the_transposed_convolution():
    model, adapter, entry = layer()
    off_zero(adapter, std=0.5)
    tensors = entry.tensors()
    for e, size in enumerate((2, 4, 6)):
        seed = tensors["B"][: 24 // size] @ tensors["A"][:, : 48 // size]
        kernel = tensors[f"kernel_{e}"]
        expected = F.conv_transpose2d(seed[None, None], kernel[None, None], stride=size)[0, 0]
        found = entry.method.expert(tensors, entry.site, e).detach()
        torch.testing.assert_close(found, expected.detach(), atol=1e-15, rtol=0)
        assert int(torch.linalg.matrix_rank(found)) <= 3 * size


@pytest.mark.parametrize(("width", "out"), [(48, 24), (47, 25), (50, 23)])
@pytest.mark.parametrize("renormalize", [True, False])
def test_the_fast_form_equals_the_dense_one(width, out, renormalize):
    model, adapter, entry = layer(width, out, top_k=2, renormalize_topk=renormalize, kernels=(2, 4, 4, 6))
    off_zero(adapter, std=0.5)
    tensors, x = entry.tensors(), inputs(2, 5, width=width)
    p = (x @ tensors["router"].T).softmax(-1)
    gates = torch.zeros_like(p).scatter(-1, p.topk(2).indices, p.topk(2).values)
    if renormalize:
        gates = gates / gates.sum(-1, keepdim=True)
    expected = base(model, x)
    for e, size in enumerate((2, 4, 4, 6)):
        expert = entry.method.expert(tensors, entry.site, e)
        assert expert.shape == (out, width)
        expected = expected + gates[..., e : e + 1] * size / 4 * x @ expert.T
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("scale", "factors"), [("s/T", (0.5, 1.0, 1.5)), ("s/s_max", (1 / 3, 2 / 3, 1.0)), ("none", (1.0,) * 3)]
)
def test_frequency_scales(scale, factors):
    method = EPT(kernels=(2, 4, 6), tasks=4, freq_scale=scale)
    assert method.scales == pytest.approx(factors)


def test_identity_and_gradients_at_the_start():
    """Kernels are zero: only selected kernels have a gradient; A, B and the router none."""
    model, adapter, entry = layer(top_k=1, contrastive=0.0)
    x = inputs(1)
    assert torch.equal(model(x), base(model, x))
    model(x).square().sum().backward()
    chosen = int((x @ entry.tensors()["router"].T).argmax())
    found = {n.removeprefix("0."): bool(g.any()) for n, g in gradients(adapter).items()}
    assert found == {
        "A": False,
        "B": False,
        "router": False,
        **{f"kernel_{e}": e == chosen for e in range(3)},
    }
    with pytest.raises(lorry.OptionError, match="init_std.*above 0"):
        EPT(init_std=0.0)


def test_seeds_are_nested():
    model, adapter, entry = layer()
    off_zero(adapter)
    tensors = entry.tensors()
    before = [entry.method.expert(tensors, entry.site, e).detach() for e in range(3)]
    with torch.no_grad():
        tensors["B"][24 // 6 :] += 1
    after = [entry.method.expert(tensors, entry.site, e).detach() for e in range(3)]
    assert torch.equal(before[2], after[2]) and not torch.equal(before[0], after[0])


def test_parameter_count():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(768, 768))
    plan = lorry.plan(model, EPT(contrastive=0.0))
    assert plan.trained == 6384 + 8 * 768
    mixture = lorry.plan(model, {"method": "lora-mixer", "experts": 8})
    assert (mixture.trained - 8 * 768) / 6384 > 10
    assert lorry.plan(model, EPT()).trained == 6384 + 8 * 768 + 8 * 768


def test_a_task_gate_merges_per_task():
    model, adapter, entry = layer(gate="task", top_k=2)
    off_zero(adapter, std=0.3)
    x = inputs()
    with pytest.raises(lorry.AdapterError, match="cannot be fused"):
        adapter.fuse()
    for task in range(4):
        adapter.configure(serve_task=None)
        with lorry.context(model, task_ids=torch.full((7,), task)):
            expected = model(x).detach()
        adapter.configure(serve_task=task)
        torch.testing.assert_close(model(x).detach(), expected)
        adapter.fuse()
        torch.testing.assert_close(model(x).detach(), expected, atol=1e-6, rtol=1e-6)
        adapter.unfuse()
    with pytest.raises(lorry.AdapterError, match="tensors .* do not fit"):
        adapter.configure(tasks=9)


def test_rows_have_the_gate_of_their_task():
    model, adapter, _ = layer(gate="token+task", contrastive=0.0)
    off_zero(adapter, std=0.5)
    x = inputs(4, 5)
    with pytest.raises(lorry.AdapterError, match="give task_ids"):
        model(x)
    tasks = torch.tensor([0, 3, 1, 3])
    with lorry.context(model, task_ids=tasks):
        together = model(x)
    for row, task in enumerate(tasks.tolist()):
        with lorry.context(model, task_ids=torch.tensor([task])):
            torch.testing.assert_close(model(x[row : row + 1]), together[row : row + 1])
    with lorry.context(model, task_ids=torch.tensor([3, 3, 3, 0])):
        assert not torch.allclose(model(x), together)


def test_contrastive_loss():
    rows, width = 6, 5
    equal = similarities(torch.randn(rows, width), torch.ones(4, width), 0.05)
    assert F.cross_entropy(equal, torch.arange(rows) % 4) == pytest.approx(math.log(4), rel=1e-5)
    features = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    embeddings = torch.randn(4, width, generator=torch.Generator().manual_seed(1))
    cosine = F.cosine_similarity(features[:, None], embeddings[None], dim=-1) / 0.05
    torch.testing.assert_close(similarities(features, embeddings, 0.05), cosine, atol=1e-5, rtol=1e-5)


def test_the_contrastive_loss_is_left_once_and_trains_the_embeddings():
    model = llama()
    adapter = lorry.attach(model, EPT(rank=2, tasks=3, contrastive=0.5))
    model.train()
    seen = {}
    last = model.model.layers[1].mlp.up_proj
    last.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    tasks, mask = torch.tensor([0, 2, 1]), torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:] = False
    with lorry.context(model, task_ids=tasks, padding_mask=mask) as context:
        model(tokens())
        loss = lorry.auxiliary_loss(model)
    assert len(context.losses) == 1
    weight = mask.float().unsqueeze(-1)
    feature = (seen["x"] * weight).sum(1) / weight.sum(1)
    embeddings = adapter.shared.tensors()["tasks"]
    torch.testing.assert_close(loss, 0.5 * F.cross_entropy(similarities(feature, embeddings, 0.05), tasks))
    optimizer = torch.optim.Adam([embeddings], lr=0.05)
    for _ in range(40):
        with lorry.context(model, task_ids=tasks, padding_mask=mask):
            model(tokens())
            optimizer.zero_grad()
            lorry.auxiliary_loss(model).backward()
            optimizer.step()
    assert torch.equal(nearest_tasks(pooled(seen["x"], mask), embeddings), tasks)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"kernels": ()}, "kernels"),
        ({"kernels": (2, 0), "top_k": 1}, "at least 1"),
        ({"kernels": (2, 4), "top_k": 3}, "top_k=3"),
        ({"serve_task": 1}, "gate that reads the task"),
        ({"serve_task": 8, "gate": "task"}, "serve_task=8"),
        ({"freq_scale": "s"}, "must be one of"),
        ({"temperature": 0.0}, "above 0"),
    ],
)
def test_bad_options(options, rule):
    with pytest.raises(lorry.OptionError, match=rule):
        EPT(**options)
