import pytest
import torch
from methods.small import batch, round_trip, scatter_trained, set_tensors, stack

import lorry
from lorry.formats.reader import open_adapter
from lorry.methods.offset import Offset


def attached(model, **of):
    """An adapter with a frozen pair that is not zero, and trained factors elsewhere."""
    adapter = lorry.attach(model, Offset(of=lorry.method_from({"rank": 3, "alpha": 5.0, **of}), rank=2), name="a")
    scatter_trained(adapter)
    generator = torch.Generator().manual_seed(2)
    pair = {n: t for n, t, spec in adapter.named_tensors() if n.endswith(("A0", "B0"))}
    set_tensors(adapter, {n: 0.3 * torch.randn(t.shape, generator=generator) for n, t in pair.items()})
    return adapter


@pytest.mark.parametrize("rslora", [False, True])
def test_the_update_is_that_of_the_factors_less_the_pair(rslora):
    x, model = batch().double(), stack().double()
    adapter = attached(model, rank_stabilized=rslora)
    plain = stack().double()
    scale = 5 / (3**0.5 if rslora else 3)
    with torch.no_grad():
        for path, entry in adapter.entries.items():
            own = {n: t.double() for n, t in entry.tensors().items()}
            plain.get_submodule(path).weight.add_(scale * (own["B"] @ own["A"] - own["B0"] @ own["A0"]))
    torch.testing.assert_close(model(x), plain(x), atol=1e-6, rtol=1e-6)
    expected = model(x)
    adapter.fuse()
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("structure", ["lora", "dora", "mos-lora"])
def test_saved_with_what_lies_inside(structure, tmp_path):
    x, model, other = batch(), stack(), stack()
    adapter = attached(model, method=structure)
    loaded = round_trip(adapter, other, tmp_path / "a")
    assert loaded.method == adapter.method and loaded.method.of.info.slug == structure
    assert torch.equal(other(x), model(x))


def test_options_of_the_inner_method_are_changed_through_it():
    adapter = attached(stack())
    adapter.configure(dropout=0.25)
    assert adapter.method.dropout == adapter.method.of.dropout == 0.25
    with pytest.raises(lorry.OptionError, match="no option 'dropuot'"):
        adapter.configure(dropuot=0.25)


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_rescaled_as_data(factor, tmp_path):
    x, model, other = batch(), stack(), stack()
    adapter = attached(model)
    adapter.save(tmp_path / "a")
    file = open_adapter(tmp_path / "a")
    file.rescale(factor)
    file.load(other)
    lorry.activate(model, {"a": factor})
    torch.testing.assert_close(other(x), model(x), atol=1e-5, rtol=1e-5)
    attached(stack(), method="dora").save(tmp_path / "dora")
    with pytest.raises(lorry.AdapterError, match="not proportional to an option alpha"):
        open_adapter(tmp_path / "dora").rescale(factor)


@pytest.mark.parametrize(
    "slug, reason", [("loha", "no product"), ("offset", "already"), ("adalora", "rules"), ("eva", "calibration")]
)
def test_methods_whose_start_no_pair_takes_back_are_refused(slug, reason):
    with pytest.raises(lorry.OptionError, match=reason):
        Offset(of=lorry.method_from(slug))
    with pytest.raises(lorry.SiteError, match="A0 and B0 of its own"):
        lorry.attach(stack(), Offset(of=lorry.PiSSA(rank=2), rank=2))
