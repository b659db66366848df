"""Taps and combiners: base output and each adapter's update apart, and what is made of them."""

import dataclasses

import pytest
import torch
from core.tiny import close, llama, off_zero, tokens

import lorry
from lorry.core.method.families import Combiner
from lorry.core.method.registry import METHODS, register
from lorry.core.method.spec import TensorSpec
from lorry.core.options import option


def loaded(names="ab", method=None):
    model = llama().double()
    for number, name in enumerate(names):
        adapter = lorry.attach(model, method or lorry.LoRA(rank=2), name=name, seed=number, dtype=torch.float64)
        off_zero(adapter, number + 1, 0.3).train(False)
    lorry.activate(model, None)
    return model


@pytest.mark.parametrize("method", [lorry.LoRA(rank=2), lorry.DoRA(rank=2), "shira"], ids=str)
def test_a_tap_sees_base_and_updates_apart_and_changes_nothing(method):
    model, ids, seen = loaded(method=method), tokens(3), []
    with torch.no_grad(), lorry.rows(model, ["a", None, {"a": 0.5, "b": 2.0}]):
        wanted = model(ids).logits
        with lorry.tap(model, seen.append, "layers.0.self_attn.v_proj"):
            found = model(ids).logits
    close(found, wanted)
    (tap,) = seen
    layer, entries = tap.site.owner, {n: a.entries[tap.site.path] for n, a in lorry.adapters(model).items()}
    base = torch.nn.functional.linear(tap.x, layer.weight)
    close(tap.base, base)
    weights = {"a": torch.tensor([1.0, 0, 0.5]), "b": torch.tensor([0.0, 0, 2.0])}
    for name, weight in weights.items():
        update = torch.nn.functional.linear(tap.x, entries[name].delta().detach())
        close(tap.update(name), update * weight.double().view(-1, 1, 1))
    close(tap.output, tap.base + tap.update("a") + tap.update("b"))
    with pytest.raises(lorry.AdapterError, match="'c'"):
        tap.update("c")


def test_a_tap_may_replace_the_output_and_gradients_flow_through_it():
    model, ids = loaded(), tokens(2)
    scale = torch.nn.Parameter(torch.tensor(0.25, dtype=torch.float64))

    def reader(tap):
        return tap.base + scale * tap.update("a")

    with lorry.activate(model, "a"):
        with lorry.tap(model, reader, "all-linear"):
            found = model(ids).logits
        found.square().mean().backward()
    with torch.no_grad(), lorry.activate(model, {"a": 0.25}):
        close(found, model(ids).logits)
    assert scale.grad.abs() > 0
    with lorry.activate(model, "a"), lorry.tap(model, lambda tap: tap.base[:1], "q_proj"):
        with pytest.raises(lorry.AdapterError, match="must return None, or an output"):
            model(ids)


def test_taps_see_sites_without_adapters_and_leave_nothing():
    model, ids, seen = loaded(), tokens(2), []
    before = {p: dict(m.__dict__) for p, m in model.named_modules()}
    with torch.no_grad(), lorry.tap(model, lambda tap: seen.append(tap.site.path), ["embed_tokens", "lm_head"]):
        model(ids)
    assert seen == ["model.embed_tokens", "lm_head"]
    model(ids)
    assert len(seen) == 2
    for adapter in list(lorry.adapters(model).values()):
        adapter.detach()
    assert not any("lorry" in k for m in model.modules() for k in (*m.__dict__, *m._forward_hooks))
    assert before.keys() == dict(model.named_modules()).keys()


def test_taps_see_a_packed_batch():
    model, seen = loaded(), []
    ids = tokens(1, 5)
    with torch.no_grad(), lorry.rows(model, ["a", "b"], lengths=[2, 3]), lorry.tap(model, seen.append, "q_proj"):
        model(ids, use_cache=False)
    tap = seen[0]
    close(tap.output, tap.base + tap.update("a") + tap.update("b"))
    assert not tap.update("a")[:, 2:].any() and tap.update("a")[:, :2].any() and not tap.update("b")[:, :2].any()


@pytest.fixture
def gate():
    """AutoLoRA's shape: a gate for each adapter and channel, made of the layer's input."""

    @register("test-gate", paper="none", kinds=("linear",), identity_at_start=False, fuse="never")
    @dataclasses.dataclass(frozen=True)
    class Gate(Combiner):
        """Weights of other adapters from the layer's input."""

        over: tuple[str, ...] = option(("a", "b"), "Adapters that are combined.")

        @property
        def members(self):
            return self.over

        def tensors(self, site):
            return {"G": TensorSpec((len(self.over), site.in_features))}

        def combine(self, call, updates, tensors):
            gates = torch.sigmoid(call.x @ tensors["G"].to(call.x.dtype).T)
            return sum(gates[..., i : i + 1] * updates[name] for i, name in enumerate(self.over))

    yield Gate
    del METHODS._items["test-gate"]


def test_a_combiner_is_trained_saved_and_loaded_like_any_adapter(gate, tmp_path):
    model, ids = loaded(), tokens(3)
    adapter = lorry.attach(model, gate(), name="gate", dtype=torch.float64)
    with torch.no_grad():
        started = model(ids).logits
        lorry.activate(model, {"a": 0.5, "b": 0.5})
        close(started, model(ids).logits)
    lorry.activate(model, "gate")
    optimizer = torch.optim.SGD(adapter.parameters(), 5.0)
    losses = []
    for _ in range(5):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is None for n, a in lorry.adapters(model).items() if n != "gate" for p in a.parameters())
    with torch.no_grad():
        wanted = model(ids).logits
        with lorry.rows(model, ["gate", None, "a"]):
            mixed = model(ids).logits
    close(mixed[:1], wanted[:1])
    with torch.no_grad(), lorry.activate(model, "a"):
        close(mixed[2:], model(ids[2:]).logits)
    adapter.save(tmp_path / "gate")
    adapter.detach()
    with torch.no_grad():
        lorry.load(model, tmp_path / "gate")
        close(model(ids).logits, wanted)
    with pytest.raises(lorry.AdapterError, match="cannot be fused"):
        lorry.adapters(model)["gate"].fuse()


def test_a_combiner_needs_its_members_on_its_sites(gate):
    model = loaded("a")
    with pytest.raises(lorry.AdapterError, match="combines 'b', which is not loaded"):
        lorry.attach(model, gate(), name="gate")
    assert set(lorry.adapters(model)) == {"a"}
    lorry.attach(model, lorry.LoRA(rank=2), targets="q_proj", name="b")
    with pytest.raises(lorry.AdapterError, match="does not sit on"):
        lorry.attach(model, gate(), name="gate")
    lorry.attach(model, gate(), targets="q_proj", name="gate")
    with pytest.raises(lorry.AdapterError, match="combined by 'gate'"):
        lorry.adapters(model)["b"].detach()
    lorry.adapters(model)["gate"].detach()
    lorry.adapters(model)["b"].detach()
