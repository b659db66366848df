"""Calibration sees the gradient and the inputs that it says it sees, and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from core.tiny import llama, same_bytes, snapshot, tokens
from torch import nn

import lorry
from lorry.core.life.calibrate import calibrate, finish_step, needs_calibration

METHOD = {"method": "shira", "mask": "grad", "density": 0.1}


def gradients_seen(adapter, batches, loss_fn):
    """The gradients as the method gets them."""
    from lorry.core.life.calibrate import observe

    found = observe(adapter, {"gradient": adapter.sites}, batches, loss_fn)["gradient"]
    return {path: seen.gradient for path, seen in found.items()}


class Twice(nn.Module):
    """One layer called twice, an embedding tied to the head, a convolution and packed attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.inner = nn.Linear(8, 8)
        self.mix = nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.inner(torch.tanh(self.inner(self.embed(ids))))
        x = x + self.mix(x.mT).mT
        x = x + self.attention(x, x, x)[0]
        return self.head(x)


def twice() -> Twice:
    torch.manual_seed(0)
    return Twice().eval()


def loss_of(model, ids):
    return nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


def test_mean_gradient_of_every_kind_and_of_a_layer_used_twice():
    batches = [tokens(2, 5, vocabulary=20, seed=s) for s in (1, 2)]
    plain, model = twice(), twice()
    targets = ["inner", "mix", "attention.in_proj_weight", "attention.out_proj"]
    adapter = lorry.attach(model, METHOD, targets=targets)
    seen = gradients_seen(adapter, batches, loss_of)
    for batch in batches:
        (loss_of(plain, batch) / 2).backward()
    expected = {
        "inner": plain.inner.weight.grad,
        "mix": plain.mix.weight.grad.flatten(1),
        "attention.in_proj_weight": plain.attention.in_proj_weight.grad,
        "attention.out_proj": plain.attention.out_proj.weight.grad,
    }
    for path, gradient in expected.items():
        assert torch.allclose(seen[path], gradient, atol=1e-6), path


def test_a_tied_weight_gives_each_site_its_share():
    ids = tokens(2, 5, vocabulary=20)
    model, plain = twice(), twice()
    adapter = lorry.attach(model, METHOD, targets=["embed", "head"])
    seen = gradients_seen(adapter, [ids], loss_of)
    loss_of(plain, ids).backward()
    total = seen["embed"].T + seen["head"]
    assert torch.allclose(total, plain.embed.weight.grad, atol=1e-6)
    assert not torch.allclose(seen["head"], total, atol=1e-4)


def test_nothing_is_left_behind_and_it_is_deterministic():
    batches = [tokens(2, 6, seed=s) for s in (1, 2)]

    def loss(model, ids):
        return model(input_ids=ids, labels=ids).loss

    starts = []
    for _ in range(2):
        model = llama(attention_dropout=0.3).train()
        before = snapshot(model)
        adapter = lorry.attach(model, METHOD, seed=4)
        lorry.activate(model, "default")
        assert needs_calibration(adapter)
        receipt = calibrate(adapter, batches, loss)
        assert receipt.sites == len(adapter.entries) == receipt.tensors_applied
        assert not needs_calibration(adapter) and adapter.metadata["calibration"]["batches"] == 2
        assert model.training and model.model.layers[0].training
        assert adapter.state.active is not None and adapter.trainable
        assert all(p.grad is None for p in model.parameters())
        assert not any("weight" in m.__dict__ for m in model.modules())
        assert all(same_bytes(v, snapshot(model)[k]) for k, v in before.items())
        starts.append({n: t for n, t, _ in adapter.named_tensors()})
    assert all(torch.equal(v, starts[1][k]) for k, v in starts[0].items())


def test_only_one_dense_gradient_is_alive_at_a_time():
    model = llama(layers=3)
    adapter = lorry.attach(model, METHOD)
    alive = []

    from lorry.core.life.probes import WeightGradients

    watch, ids = WeightGradients(adapter.sites), tokens()
    with watch.watching(adapter):
        leaves = [m.__dict__["weight"] for m in model.modules() if "weight" in m.__dict__]
        own = watch._add
        watch._add = lambda site, gradient: (
            alive.append(sum(leaf.grad is not None for leaf in leaves)),
            own(site, gradient),
        )
        lorry.activate(model, None)
        model(input_ids=ids, labels=ids).loss.backward()
    assert alive == [1] * len(adapter.entries)


def test_quantised_weights_are_seen_through_the_layer():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = nn.Linear(64, 32, bias=False)
    quantised = bitsandbytes.nn.Linear4bit(64, 32, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    quantised.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    model = nn.Sequential(quantised).to("cpu")
    x = torch.randn(5, 64)
    model(x)
    adapter = lorry.attach(model, METHOD, targets=["0"])
    seen = gradients_seen(adapter, [x], lambda m, b: m(b).square().sum())
    expected = 2 * model(x).detach().T @ x
    assert torch.allclose(seen["0"], expected, rtol=1e-3, atol=1e-3)


def test_refusals():
    model, ids = twice(), tokens(2, 5, vocabulary=20)
    with pytest.raises(lorry.AdapterError, match="takes no calibration"):
        calibrate(lorry.attach(model, "lora", targets=["inner"], name="a"), [ids], loss_of)
    adapter = lorry.attach(model, METHOD, targets=["inner"], name="b")
    with pytest.raises(lorry.AdapterError, match="no batches"):
        calibrate(adapter, [], loss_of)
    with pytest.raises(lorry.AdapterError, match="depends on none"):
        calibrate(adapter, [ids], lambda m, b: torch.zeros((), requires_grad=True))
    with pytest.raises(lorry.SiteError, match="linear sites only"):
        from lorry.core.life.calibrate import observe

        observe(adapter, {"input": [adapter.state.sites["mix"]]}, [ids], loss_of)
    lorry.adapters(model)["a"].fuse()
    with pytest.raises(lorry.AdapterError, match="fused into the base"):
        calibrate(adapter, [ids], loss_of)
    assert needs_calibration(adapter)


def test_finish_step_calls_each_hook():
    model = twice()
    adapter = lorry.attach(model, {"method": "dylora", "rank": 4}, targets=["inner"])
    drawn = []
    for step in range(1, 30):
        finish_step(adapter, step, 30)
        drawn.append(int(adapter.shared.tensors()["drawn"]))
    assert set(drawn) == {1, 2, 4}
