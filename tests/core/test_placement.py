"""Wherever the tensors of an adapter lie, it works and gives the same bits, and nothing else has to know."""

from __future__ import annotations

import copy

import pytest
import torch
from core.placed import PLACES, bits, crowd, every_tensor, output, put, same_tensors
from core.tiny import gradients, llama, off_zero, tokens
from laws.fitting import small

import lorry
from lorry.core.life.page_pool import PagePool


@pytest.fixture
def pool():
    return PagePool(512, 256)


COMPOSITIONS = ["a", {"a": 0.5, "b": -1.0}]
ROWS = ["a", None, {"a": 0.5, "b": 2.0}]


@pytest.mark.parametrize("place", PLACES)
def test_an_adapter_gives_the_same_bits_from_everywhere(place, tmp_path, pool):
    model, ids = crowd("a", "b"), tokens()
    wanted, mixed = [output(model, ids, c) for c in COMPOSITIONS], output(model, ids, rows=ROWS)
    before = every_tensor(lorry.adapters(model)["a"])
    placement = lorry.placement(model, folder=tmp_path / "away")
    put(placement, "a", place, pool)
    assert placement.where("a") is (pool if place == "pool" else place)
    assert same_tensors(lorry.adapters(model)["a"], before)
    assert torch.equal(output(model, ids, rows=ROWS), mixed)
    put(placement, "a", place, pool)
    for composition, expected in zip(COMPOSITIONS, wanted, strict=True):
        assert torch.equal(output(model, ids, composition), expected)
    put(placement, "a", "device", pool)
    assert same_tensors(lorry.adapters(model)["a"], before)
    assert pool.used == 0


@pytest.mark.parametrize("slug", sorted(lorry.methods()))
def test_every_method_gives_the_same_bits_from_everywhere(slug, tmp_path):
    model, ids, pool = llama(1), tokens(), PagePool(4096, 256)
    targets = ["model.norm", "model.layers.0.mlp"] if slug == "full" else "all-linear"
    for name in "ab":
        try:
            adapter = lorry.attach(model, small(slug), targets=targets, name=name, seed=ord(name), activate=False)
        except lorry.SiteError:
            adapter = lorry.attach(model, small(slug), targets="mlp", name=name, seed=ord(name), activate=False)
        off_zero(adapter, ord(name), 0.1).train(False)
    ask = [{"composition": "a"}, {"rows": ["a", None, "b"]}]

    def ran(which):
        torch.manual_seed(0)
        return output(model, ids, **which)

    wanted, before = [ran(which) for which in ask], every_tensor(lorry.adapters(model)["a"])
    placement = lorry.placement(model, folder=tmp_path)
    for place in ("host", "disk", "pool"):
        for which, expected in zip(ask, wanted, strict=True):
            put(placement, "a", place, pool)
            assert torch.equal(ran(which), expected)
        put(placement, "a", place, pool)
        assert same_tensors(lorry.adapters(model)["a"], before)
        placement.place("a", "device")
    # and lent, one site at a time
    lorry.placement(model, device_bytes=0, host_bytes=0)
    for which, expected in zip(ask, wanted, strict=True):
        assert torch.equal(ran(which), expected)
    assert [placement.where(n) for n in "ab"] == ["disk", "disk"]


def test_every_dtype_and_memory_order_survives(tmp_path, pool):
    model = crowd("a")
    (_, home), *_ = lorry.adapters(model)["a"].homes()
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (48,), dtype=torch.uint8, generator=generator)
    dtypes = "bfloat16 float16 float32 float64 float8_e4m3fn float8_e5m2 int8 int16 int32 int64 uint8 uint16 uint32"
    dtypes += " uint64 complex64 complex128"
    for name in dtypes.split():
        home.replace(name, raw.view(getattr(torch, name)))  # any bits at all, NaNs with payloads among them
    home.replace("bool", raw > 99)
    home.replace("transposed", torch.randn(6, 5, generator=generator).t())
    home.replace("strided", torch.randn(6, 8, generator=generator)[:, ::2])
    home.replace("empty", torch.empty(0, 3))
    home.replace("scalar", torch.tensor(float("nan")))
    before = {name: (bits(t), t.dtype, t.shape) for name, t in home.tensors().items()}
    placement = lorry.placement(model, folder=tmp_path)
    for place in ("host", "disk", "pool", "disk", "device", "pool", "host", "device"):
        put(placement, "a", place, pool)
        assert {name: (bits(t), t.dtype, t.shape) for name, t in home.tensors().items()} == before, place
        pool.check()
    assert home.tensors()["transposed"].stride() == (1, 5)
    assert all(t.data_ptr() % 64 == 0 for t in home.tensors().values())


@pytest.mark.parametrize("place", PLACES[1:])
def test_an_adapter_trains_again_after_it_was_away(place, tmp_path, pool):
    ids = tokens()

    def step(model):
        adapter = lorry.adapters(model)["a"].train()
        lorry.activate(model, "a")
        model(ids).logits.square().mean().backward()
        return gradients(adapter)

    wanted = step(crowd("a"))
    model = crowd("a")
    placement = lorry.placement(model, folder=tmp_path)
    put(placement, "a", place, pool)
    with lorry.activate(model, "a"):
        assert not model(ids).logits.requires_grad
    put(placement, "a", place, pool)
    found = step(model)
    assert found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)
    assert placement.where("a") == "device"
    for where in ("host", "disk", pool):
        with pytest.raises(lorry.AdapterError, match="in training"):
            placement.place("a", where)
    with pytest.raises(lorry.AdapterError, match="in training"):
        placement.evict("a")
    parameters = lorry.adapters(model)["a"].parameters()
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in parameters), "a parameter holds its own memory alone"
    lorry.adapters(model)["a"].train(False)
    placement.place("a", "disk")
    assert placement.where("a") == "disk" and pool.used == 0


def test_gradients_pass_through_an_adapter_that_is_away(tmp_path, pool):
    def step(place):
        model = crowd("a", "b")
        trained = lorry.adapters(model)["b"].train()
        put(lorry.placement(model, folder=tmp_path), "a", place, pool)
        with lorry.rows(model, ["a", "b", {"a": 1.0, "b": 1.0}]):
            model(tokens()).logits.square().mean().backward()
        return gradients(trained)

    wanted = step("device")
    for place in PLACES[1:]:
        found = step(place)
        assert all(torch.equal(found[n], wanted[n]) for n in wanted), place


def test_tensors_fetched_in_inference_mode_serve_training(tmp_path):
    model, ids = crowd("a", "b"), tokens()
    placement = lorry.placement(model, folder=tmp_path)
    placement.place("a", "disk")
    with torch.inference_mode(), lorry.activate(model, "a"):
        model(ids)
    assert placement.where("a") == "device"
    other = lorry.adapters(model)["b"].train()
    with lorry.activate(model, {"a": 1.0, "b": 1.0}):
        model(ids).logits.sum().backward()  # through the tensors that were fetched
    assert gradients(other)
    adapter = lorry.adapters(model)["a"].train()
    with lorry.activate(model, "a"):
        model(ids).logits.sum().backward()
    assert gradients(adapter)


def test_changes_of_an_adapter_that_is_away_are_kept(tmp_path, pool):
    for place in PLACES:
        model, like = crowd("a"), crowd("a")
        placement = lorry.placement(model, folder=tmp_path)
        for adapter in (lorry.adapters(model)["a"], lorry.adapters(like)["a"]):
            if adapter.state.root is model:
                put(placement, "a", place, pool)
            off_zero(adapter, 9, 0.5)
        placement.place("a", "disk")
        assert torch.equal(output(model, tokens(), "a"), output(like, tokens(), "a")), place


@pytest.mark.parametrize("place", PLACES)
def test_saving_an_adapter_that_is_away(place, tmp_path, pool):
    model = crowd("a")
    lorry.adapters(model)["a"].save(tmp_path / "before")
    placement = lorry.placement(model, folder=tmp_path / "away")
    put(placement, "a", place, pool)
    lorry.adapters(model)["a"].save(tmp_path / "after")
    assert (placement.where("a") == "device") == (place == "device"), "saving brings nothing to the device"
    file = "adapter_model.safetensors"
    assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "after" / file).read_bytes()


def test_a_copy_of_the_model_has_all_tensors_and_no_placement(tmp_path):
    model, pool, ids = crowd(*"abcd"), PagePool(512, 256), tokens()
    wanted = {n: output(model, ids, n) for n in "abcd"}
    placement = lorry.placement(model, device_bytes=1_000_000, folder=tmp_path)
    for name, place in zip("abcd", PLACES, strict=True):
        put(placement, name, place, pool)
    twin = copy.deepcopy(model)
    assert [placement.where(n) for n in "abd"] == ["device", "host", pool] and placement.where("c") != "device"
    for adapter in lorry.adapters(model).values():
        adapter.detach()
    pool.memory.fill_(255)
    for name in "abcd":
        assert torch.equal(output(twin, ids, name), wanted[name])
    fresh = lorry.placement(twin)
    assert fresh is not placement and fresh.room.device_bytes is None
    fresh.place("a", "host")
    assert torch.equal(output(twin, ids, "a"), wanted["a"])


def test_a_compiled_model(tmp_path):
    model, ids = crowd("a", "b"), tokens()
    model.compile(backend="eager")
    placement = lorry.placement(model, folder=tmp_path)
    wanted = {n: output(model, ids, n) for n in "ab"}
    for name, other, place in (("a", "b", "host"), ("b", "a", "disk"), ("a", "b", "disk")):
        lorry.activate(model, other)
        placement.place(name, place)
        with pytest.raises(lorry.AdapterError, match="compiled"):
            placement.evict(other)
        assert torch.equal(model(ids).logits, wanted[other])
        lorry.activate(model, name)
        assert placement.where(name) == "device"
        assert torch.equal(model(ids).logits, wanted[name])


def test_casting_an_adapter_that_is_away(tmp_path, pool):
    for place in PLACES:
        model, like = crowd("a"), crowd("a")
        put(lorry.placement(model, folder=tmp_path), "a", place, pool)
        for one in (model, like):
            lorry.adapters(one)["a"].to(torch.bfloat16)
        assert torch.equal(output(model, tokens(), "a"), output(like, tokens(), "a"))
