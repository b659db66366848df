"""Weights of a composition: tensors that are trained, by site, by step and time, by row."""

import pytest
import torch
from core.tiny import close, llama, off_zero, tokens
from torch import nn

import lorry


def loaded(names="ab", **more):
    model = llama(**more).double()
    for number, name in enumerate(names):
        adapter = lorry.attach(model, lorry.LoRA(rank=2), name=name, seed=number, dtype=torch.float64)
        off_zero(adapter, number + 1, 0.3).train(False)
    lorry.activate(model, None)
    return model


def run(model, composition, ids):
    with torch.no_grad(), lorry.activate(model, composition):
        return model(ids).logits


def test_a_tensor_weighs_like_its_number_and_gets_a_gradient():
    model, ids = loaded(), tokens(2)
    weight = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
    with lorry.activate(model, {"a": weight, "b": 1.5}):
        out = model(ids).logits
        out.square().mean().backward()
    close(out, run(model, {"a": 0.7, "b": 1.5}, ids))
    step = 1e-3  # the norms of Llama run in float32
    high, low = (run(model, {"a": 0.7 + s, "b": 1.5}, ids).square().mean() for s in (step, -step))
    torch.testing.assert_close(weight.grad, (high - low) / (2 * step), rtol=1e-3, atol=1e-6)


def test_rows_have_weights_with_gradients_of_their_own():
    model, ids = loaded(), tokens(3)
    gates = nn.Parameter(torch.tensor([0.2, -0.5, 1.5], dtype=torch.float64))
    with lorry.rows(model, [{"a": g} for g in gates.unbind()]):
        rows = model(ids).logits
    rows.square().sum().backward()
    first, gates.grad = gates.grad.clone(), None
    with lorry.activate(model, {"a": gates}):
        every = model(ids).logits
    every.square().sum().backward()
    torch.testing.assert_close(first, gates.grad, rtol=1e-7, atol=1e-9)
    close(rows, every)
    for row, gate in enumerate(gates.tolist()):
        close(rows[row : row + 1], run(model, {"a": gate}, ids[row : row + 1]))


@pytest.mark.parametrize("wrong", [float("nan"), True, "a", torch.ones(2, 2), torch.tensor(1), [1.0]], ids=repr)
def test_what_is_no_weight_is_refused(wrong):
    model = loaded("a")
    with pytest.raises(lorry.AdapterError, match="weight"):
        lorry.activate(model, {"a": wrong})


def test_weights_by_site_are_those_of_adapters_on_parts_of_the_model():
    """B-LoRA: content in one block, style in another."""
    model, ids = loaded(), tokens(2)
    found = run(
        model,
        {"a": lorry.BySite({"layers.0.*": 1.0}), "b": lorry.BySite({"layers.1.self_attn.*": 0.5}, default=0.0)},
        ids,
    )
    other = llama().double()
    for name, targets in (("a", "model.layers.0.*"), ("b", "model.layers.1.self_attn.*")):
        source = lorry.adapters(model)[name]
        twin = lorry.attach(other, lorry.LoRA(rank=2), targets=targets, name=name, dtype=torch.float64)
        with torch.no_grad():
            for path, entry in twin.entries.items():
                for key, tensor in entry.tensors().items():
                    tensor.copy_(source.entries[path].tensors()[key])
    close(found, run(other, {"a": 1.0, "b": 0.5}, ids))


def test_a_weight_by_step_follows_the_sampler_and_needs_to_be_told():
    model, ids = loaded("a"), tokens(2)
    schedule = lorry.ByStep(lambda step: 1.0 - step / 4)
    with lorry.activate(model, {"a": schedule}):
        for step in range(5):
            with torch.no_grad(), lorry.context(model, step=step):
                found = model(ids).logits
            with torch.no_grad(), lorry.rows(model, [{"a": 1.0 - step / 4}] * 2):
                close(found, model(ids).logits)
        with pytest.raises(lorry.AdapterError, match="step"):
            model(ids)


def test_a_weight_by_timestep_may_differ_by_row():
    model, ids = loaded("a"), tokens(2)
    with lorry.activate(model, {"a": lorry.ByTimestep(lambda t: (t > 500).double())}):
        with torch.no_grad(), lorry.context(model, timestep=torch.tensor([900, 100])):
            found = model(ids).logits
    with torch.no_grad(), lorry.rows(model, ["a", None]):
        close(found, model(ids).logits)


def test_a_function_of_the_site_in_some_rows():
    model, ids = loaded(), tokens(3)

    def only_first_layer(site, step, timestep):
        return 1.0 if site.layer == 0 else 0.0

    with torch.no_grad(), lorry.rows(model, [{"a": only_first_layer}, "b", {"a": only_first_layer}]):
        found = model(ids).logits
    wanted = run(model, {"a": lorry.BySite({"layers.0.*": 1.0})}, ids)
    close(found[[0, 2]], wanted[[0, 2]])
    close(found[1:2], run(model, "b", ids[1:2]))


def test_compositions_that_are_kept_are_bounded():
    from lorry.core.life.state import state_of

    model, ids = loaded("a"), tokens(1)
    for number in range(500):
        lorry.activate(model, {"a": 1.0 + number / 1000})
    assert len(state_of(model)._composed) <= 64
    found = model(ids).logits
    close(found, run(model, {"a": 1.499}, ids))


@pytest.mark.parametrize("form", ["input", "positional", "keyword of the layer"])
def test_every_calling_form_of_a_layer_works(form):
    from transformers.pytorch_utils import Conv1D

    for layer, keyword in (
        (nn.Linear(4, 6), "input"),
        (nn.Conv1d(4, 6, 1), "input"),
        (nn.Embedding(9, 4), "input"),
        (Conv1D(6, 4), "x"),
    ):
        model = nn.Sequential(layer)
        x = torch.randn(2, 4, 3 if isinstance(layer, nn.Conv1d) else 4)
        x = torch.randint(0, 9, (2, 3)) if isinstance(layer, nn.Embedding) else x
        off_zero(lorry.attach(model, lorry.LoRA(rank=2), targets="all", name="a"), 1, 0.3)
        wanted = model(x)
        found = layer(x) if form == "positional" else layer(**{keyword: x})
        torch.testing.assert_close(found, wanted)
        with lorry.rows(model, ["a", None]):
            torch.testing.assert_close(layer(**{keyword: x})[:1], wanted[:1])
        with pytest.raises((TypeError, lorry.AdapterError)):
            layer(wrong=x)
