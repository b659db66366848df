"""AutoLoRA's gated fusion: the checks of its mathematics."""

import pytest
import torch
from core.tiny import close, off_zero
from methods.small import batch, scatter_trained, stack

import lorry

NAMES = tuple("abcdefghij")


def loaded(count=3, method=None, **options):
    """A stack of layers with trained LoRAs, and a gate over those that a pass says."""
    model = stack().double()
    for number, name in enumerate(NAMES[:count]):
        adapter = lorry.attach(model, method or lorry.LoRA(rank=2), name=name, seed=number, dtype=torch.float64)
        off_zero(adapter, number, 0.3).train(False)
    options.setdefault("over", NAMES[:count])
    gate = lorry.attach(model, {"method": "gated-fusion", **options}, name="gate", dtype=torch.float64)
    return model, gate


def run(model, composition=None, x=None, **facts):
    with torch.no_grad(), lorry.activate(model, composition), lorry.context(model, **facts):
        return model(batch().double() if x is None else x)


def by_definition(model, gate, path, x, names):
    """The formula, written out for one layer."""
    layer, own = model.get_submodule(path), gate.entries[path].tensors()

    def norm(value, name):
        centred = value - value.mean(-1, keepdim=True)
        unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return unit * own[f"{name}.weight"] + own[f"{name}.bias"]

    y = torch.nn.functional.linear(x, layer.weight, layer.bias)
    total = y
    for name in names:
        update = x @ lorry.adapters(model)[name].entries[path].delta().T
        b, u = norm(y, "norm_base"), norm(update, "norm_update")
        g = torch.sigmoid(b * own["w_base"] + u * own["w_update"] + b * u * own["w_cross"] + own["bias"])
        total = total + own["w_out"] * g * update
    return total


def test_it_is_the_formula():
    model, gate = loaded()
    scatter_trained(gate)
    for path in ("layers.0.up", "layers.1.down"):
        x = batch(5, model.get_submodule(path).in_features).double()
        with torch.no_grad():
            close(model.get_submodule(path)(x), by_definition(model, gate, path, x, "abc"))


@pytest.mark.parametrize("gate", ["none", "scalar", "no-cross", "cross"])
def test_without_updates_the_layer_is_as_it_was(gate):
    model, adapter = loaded(3, gate=gate, start="released")
    scatter_trained(adapter)
    assert not torch.equal(run(model, "gate"), run(model))
    assert torch.equal(run(model, "gate", combined={"gate": []}), run(model))
    for name in "abc":  # a LoRA at its start, although the gate of nothing is not zero
        with torch.no_grad():
            for entry in lorry.adapters(model)[name].entries.values():
                entry.tensors()["B"].zero_()
    assert torch.equal(run(model, "gate"), run(model))


@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_it_reduces_to_the_sum_and_to_task_arithmetic(factor):
    model, gate = loaded()
    with torch.no_grad():
        for name, tensor, _ in gate.named_tensors():
            if name.rpartition(".")[2].startswith("w_"):
                tensor.fill_(2 * factor if name.endswith("w_out") else 0)
    close(run(model, "gate"), run(model, dict.fromkeys("abc", factor)))


def test_without_gates_the_outputs_weights_alone_act():
    model, gate = loaded(gate="none")
    close(run(model, "gate"), run(model, dict.fromkeys("abc", 1.0)))
    assert {name.rpartition(".")[2] for name, _ in gate.named_parameters()} == {"w_out"}


def test_a_scalar_gate_is_one_number_for_a_token():
    model, gate = loaded(1, gate="scalar")
    scatter_trained(gate)
    with torch.no_grad():
        for entry in gate.entries.values():
            entry.tensors()["w_out"].fill_(1)
    layer, x, path = model.get_submodule("layers.0.up"), batch(4).double(), "layers.0.up"
    with torch.no_grad(), lorry.activate(model, None):
        base = layer(x)
    with torch.no_grad(), lorry.activate(model, "gate"):
        share = (layer(x) - base) / (x @ lorry.adapters(model)["a"].entries[path].delta().T)
    close(share, share[:, :1].expand_as(share))
    assert share[:, 0].std() > 1e-3 and (share > 0).all() and (share < 1).all()


def test_the_order_does_not_matter_and_any_number_is_taken():
    model, gate = loaded(10, over=())
    scatter_trained(gate)
    names, outputs = list(NAMES), []
    close(
        run(model, "gate", combined={"gate": names}),
        run(model, "gate", combined={"gate": names[::-1]}),
    )
    for count in range(1, 11):
        outputs.append(run(model, "gate", combined={"gate": names[:count]}))
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(outputs, outputs[1:], strict=False))
    assert torch.equal(run(model, "gate"), run(model))  # nobody said which


def test_rows_of_a_batch_have_members_of_their_own():
    model, gate = loaded(3, over=())
    scatter_trained(gate)
    x = batch(3).double()
    weights = {"a": torch.tensor([1.0, 0.0, 0.5]), "b": torch.tensor([0.0, 1.0, 0.0])}
    mixed = run(model, "gate", x, combined={"gate": weights})
    for row, alone in enumerate(({"a": 1.0}, {"b": 1.0}, {"a": 0.5})):
        close(mixed[row : row + 1], run(model, "gate", x[row : row + 1], combined={"gate": alone}))
    with pytest.raises(lorry.AdapterError, match="'zz', which is not loaded"):
        run(model, "gate", combined={"gate": ["a", "zz"]})


def test_a_member_of_a_pass_may_sit_on_fewer_layers():
    model, gate = loaded(2)
    scatter_trained(gate)
    off_zero(lorry.attach(model, lorry.LoRA(rank=2), targets="up", name="few", dtype=torch.float64), 9, 0.3)
    x = batch(5, 24).double()
    down = model.get_submodule("layers.0.down")
    with torch.no_grad(), lorry.activate(model, "gate"), lorry.context(model, combined={"gate": ["a", "few"]}):
        with_few = down(x)
    with torch.no_grad(), lorry.activate(model, "gate"), lorry.context(model, combined={"gate": ["a"]}):
        close(down(x), with_few)


def test_only_the_gate_is_trained():
    model, gate = loaded(rank=2)
    before = {n: t.clone() for a in "abc" for n, t, _ in lorry.adapters(model)[a].named_tensors()}
    model(batch().double()).square().mean().backward()
    assert all(p.grad is not None for p in gate.parameters())
    others = [p for n, p in model.named_parameters() if ":" not in n or "lorry_gate:" not in n]
    assert others and all(p.grad is None for p in others)
    torch.optim.SGD(gate.parameters(), 1.0).step()
    after = {n: t for a in "abc" for n, t, _ in lorry.adapters(model)[a].named_tensors()}
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_the_number_of_parameters():
    for options, per_channel in (({}, 9), ({"gate": "no-cross"}, 8), ({"gate": "scalar"}, 9), ({"gate": "none"}, 1)):
        model, gate = loaded(1, **options)
        assert gate.count() == per_channel * 2 * (16 + 24)
    model, gate = loaded(1, rank=3)
    assert gate.count() == 9 * 2 * (16 + 24) + 3 * 4 * (16 + 24)


def test_starts():
    wide = torch.nn.Sequential(torch.nn.Linear(4, 4000))
    released, small = (
        lorry.attach(wide, {"method": "gated-fusion", "start": start}, targets="all", name=start).entries["0"].tensors()
        for start in ("released", "small")
    )
    released, small = ({n: t.detach() for n, t in own.items()} for own in (released, small))
    assert float(released["w_base"].std()) == pytest.approx(1, abs=0.05) and released["bias"].std() > 0.9
    assert float(small["w_cross"].std()) == pytest.approx(0.1, abs=0.01) and not small["bias"].any()


def test_a_convolution_is_normed_over_its_channels():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3, padding=1)).double()
    off_zero(lorry.attach(model, lorry.LoRA(rank=2), targets="all", name="a", dtype=torch.float64), 1, 0.3)
    gate = lorry.attach(
        model, {"method": "gated-fusion", "over": ["a"]}, targets="all", name="gate", dtype=torch.float64
    )
    scatter_trained(gate)
    x = torch.randn(2, 3, 5, 5).double()
    whole = run(model, "gate", x)
    # a pixel of a 3 x 3 window alone gives what it gives in the picture
    close(run(model, "gate", x[:, :, 1:4, 1:4])[:, :, 1, 1], whole[:, :, 2, 2])
    assert whole.shape == (2, 6, 5, 5)


def test_names_twice_are_refused():
    with pytest.raises(lorry.OptionError, match="each adapter once"):
        lorry.method_from({"method": "gated-fusion", "over": ["a", "a"]})
