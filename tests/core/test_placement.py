"""Wherever the tensors of an adapter lie, it works and gives the same bits, and nothing else has to know."""

from __future__ import annotations

import copy
import gc
import random
import threading
import time
import weakref

import pytest
import torch
from core.choices import together
from core.tiny import gradients, llama, off_zero, tokens
from laws.fitting import small

import lorry
from lorry.core.life.page_pool import PagePool
from lorry.core.life.state import state_of
from lorry.kernels.gathered import Stacked

PLACES = ["device", "host", "disk", "pool"]


def crowd(*names, method=None, layers=1, dtype=torch.float32):
    """A model with frozen adapters, none of them active."""
    model = llama(layers)
    for number, name in enumerate(names or "ab"):
        adapter = lorry.attach(model, method or lorry.LoRA(rank=2), name=name, seed=number, dtype=dtype)
        off_zero(adapter, number, 0.3).train(False)
    lorry.activate(model, None)
    return model


def output(model, ids, composition=None, rows=None):
    with torch.no_grad():
        if rows is not None:
            with lorry.rows(model, rows):
                return model(ids).logits
        with lorry.activate(model, composition):
            return model(ids).logits


def every_tensor(adapter):
    return {name: (t.clone(), t.stride()) for name, t, _ in adapter.named_tensors()}


def same_tensors(adapter, before):
    now = every_tensor(adapter)
    return now.keys() == before.keys() and all(
        t.dtype == before[n][0].dtype and s == before[n][1] and bits(t) == bits(before[n][0])
        for n, (t, s) in now.items()
    )


def bits(tensor):
    return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).tolist())


def put(placement, name, place, pool):
    placement.place(name, pool if place == "pool" else place)


def resident(model):
    """Bytes of all storages in which the homes of adapters hold tensors now, counted without the placement."""
    storages = {}
    for adapter in lorry.adapters(model).values():
        for _, home in adapter.homes():
            for tensor in (home.resident or {}).values():
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.fixture
def pool():
    return PagePool(512, 256)


# -- the same bits from everywhere

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


# -- limits


def test_two_hundred_adapters_below_a_limit(tmp_path):
    model = llama(1, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1)
    names, ids = [f"a{n}" for n in range(200)], tokens(2, 3)
    order = random.Random(0)
    placement = lorry.placement(model, device_bytes=30_000, host_bytes=60_000, folder=tmp_path)
    wanted = {}
    for number, name in enumerate(names):
        method = lorry.LoRA(rank=order.choice([1, 2, 4, 8]))
        off_zero(lorry.attach(model, method, name=name, seed=number, targets=["q_proj", "down_proj"]), number, 0.5)
        wanted[name] = output(model, ids, name)
        lorry.adapters(model)[name].train(False)
    lorry.activate(model, None)
    highest = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: highest.append(resident(model)))
    for _ in range(400):
        if order.random() < 0.3:
            first, second = order.sample(names, 2)
            expected = torch.stack([wanted[first][0], wanted[second][1]])
            torch.testing.assert_close(output(model, ids, rows=[first, second]), expected)
        else:
            name = order.choice(names[:40] if order.random() < 0.5 else names)
            assert torch.equal(output(model, ids, name), wanted[name]), name
        highest.append(resident(model))
        assert placement.used("device") <= 30_000 and placement.used("host") <= 60_000
    handle.remove()
    assert 0 < max(highest) <= 30_000
    places = [placement.where(name) for name in names]
    assert {"device", "host", "disk"} <= set(places)
    done = placement.statistics
    assert done.hits > 0 and done.misses > 0 and done.evictions > 0 and done.from_disk > 0 and done.to_disk > 0
    assert len(list(tmp_path.iterdir())) <= 200
    for name in names:
        lorry.adapters(model)[name].detach()
    assert not list(tmp_path.iterdir())
    assert lorry.placement(model) is placement, "limits outlive the last adapter"


def test_those_that_were_not_needed_for_longest_leave_first():
    model = crowd(*"abc")
    placement = lorry.placement(model)
    placement.limit(3 * placement.nbytes("a"), None, None)
    for name in "abcab":
        output(model, tokens(), name)
    lorry.attach(model, lorry.LoRA(rank=2), name="d", activate=False)
    assert [placement.where(name) for name in "abcd"] == ["device", "device", "host", "device"]
    lorry.adapters(model)["d"].train(False)
    output(model, tokens(), "c")
    assert [placement.where(name) for name in "abcd"] == ["host", "device", "device", "device"]


def test_what_does_not_fit_is_lent_and_right():
    model, ids = crowd(*"abcd"), tokens(4)
    rows = ["a", "b", {"c": 1.0, "d": -0.5}, "d"]
    wanted, alone = output(model, ids, rows=rows), output(model, ids, "a")
    placement = lorry.placement(model)
    size = placement.nbytes("a")
    for fitting in (2, 0):
        placement = lorry.placement(model, device_bytes=fitting * size + size // 2)
        seen = []
        handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(resident(model)))  # noqa: B023
        torch.testing.assert_close(output(model, ids, rows=rows), wanted)
        assert torch.equal(output(model, ids, "a"), alone)
        handle.remove()
        assert max(seen) <= fitting * size
        assert sum(placement.where(n) == "device" for n in "abcd") == fitting


def test_lending_from_disk_reads_what_a_site_needs(tmp_path):
    model, ids = crowd("a"), tokens()
    wanted = output(model, ids, "a")
    placement = lorry.placement(model, device_bytes=0, host_bytes=0, folder=tmp_path)
    assert placement.where("a") == "disk"
    assert torch.equal(output(model, ids, "a"), wanted)
    assert placement.where("a") == "disk" and resident(model) == 0


def test_pins_are_counted_and_hold():
    model = crowd(*"abc")
    placement = lorry.placement(model)
    placement.evict("a")
    with placement.pin("a"):
        assert placement.where("a") == "device"
        placement.pin("a")
        lorry.placement(model, device_bytes=placement.nbytes("a"))
        assert [placement.where(n) for n in "abc"] == ["device", "host", "host"]
        output(model, tokens(), "b")
        assert placement.where("b") == "host", "there was no room beside a pinned one"
        with pytest.raises(lorry.AdapterError, match="pinned"):
            placement.evict("a")
        with pytest.raises(lorry.AdapterError, match="no room for adapter 'b'.*'a' cannot leave"):
            placement.pin("b")
    with pytest.raises(lorry.AdapterError, match="pinned"):
        placement.place("a", "host")
    placement.unpin("a")
    with pytest.raises(lorry.AdapterError, match="not pinned"):
        placement.unpin("a")
    output(model, tokens(), "b")
    assert [placement.where(n) for n in "ab"] == ["host", "device"]


def test_an_adapter_in_the_base_stays(tmp_path):
    model = crowd("a", "b")
    placement = lorry.placement(model, folder=tmp_path)
    placement.place("a", "disk")
    wanted = output(crowd("a", "b"), tokens(), "a")
    lorry.adapters(model)["a"].merge()
    torch.testing.assert_close(output(model, tokens()), wanted)
    with pytest.raises(lorry.AdapterError, match="base"):
        placement.evict("a")
    lorry.placement(model, device_bytes=0)
    assert [placement.where(n) for n in "ab"] == ["device", "host"]
    lorry.adapters(model)["a"].unmerge()
    placement.evict("a")
    assert placement.where("a") == "host"


def test_an_adapter_that_cannot_fit_is_not_loaded(tmp_path):
    model = crowd("a")
    lorry.adapters(model)["a"].save(tmp_path / "a")
    size = lorry.placement(model).nbytes("a")
    lorry.placement(model, device_bytes=size, host_bytes=size)
    lorry.load(model, tmp_path / "a", name="b", activate=False)
    with pytest.raises(lorry.AdapterError, match="folder"):
        lorry.load(model, tmp_path / "a", name="c", activate=False)
    assert set(lorry.adapters(model)) == {"a", "b"}
    lorry.placement(model, folder=tmp_path / "away")
    lorry.load(model, tmp_path / "a", name="c", activate=False)
    assert sorted(lorry.placement(model).where(n) for n in "abc") == ["device", "disk", "host"]


@pytest.mark.parametrize("options", [{"device_bytes": -1}, {"host_bytes": 1.5}, {"device_bytes": True}])
def test_a_limit_is_a_number_of_bytes(options):
    with pytest.raises(lorry.OptionError, match="number of bytes"):
        lorry.placement(crowd("a"), **options)


def test_unknown_names_and_places():
    model = crowd("alpha")
    placement = lorry.placement(model)
    for call in (
        placement.where,
        placement.nbytes,
        placement.pin,
        placement.unpin,
        placement.evict,
        placement.prefetch,
    ):
        with pytest.raises(lorry.AdapterError, match="Did you mean 'alpha'"):
            call("alpa")
    with pytest.raises(lorry.OptionError, match="'cuda'"):
        placement.place("alpha", "cuda")
    with pytest.raises(lorry.AdapterError, match="folder"):
        placement.place("alpha", "disk")
    assert placement.where("alpha") == "device"


# -- nothing stays behind


def stacked_factors(model):
    """What the composition that applies now keeps of its adapters' factors."""
    kept = state_of(model).active.kept.values()
    return [weakref.ref(t) for s in kept if isinstance(s, Stacked) for _, *pair in s.groups for t in pair]


@pytest.mark.parametrize("place", ["host", "disk", "pool"])
def test_eviction_leaves_no_copy_of_the_tensors_alive(place, tmp_path, pool):
    model, ids = crowd(*"abcde"), tokens(8, 1)
    placement = lorry.placement(model, folder=tmp_path)
    rows = [*"abcd", *"abcd"]
    with torch.no_grad(), lorry.rows(model, rows):
        wanted = model(ids).logits
        assert stacked_factors(model), "decoding with four adapters stacks their factors"
        watched = [weakref.ref(t) for _, t, _ in lorry.adapters(model)["a"].named_tensors()] + stacked_factors(model)
        put(placement, "a", place, pool)
        assert not any(ref() is not None for ref in watched)
        assert torch.equal(model(ids).logits, wanted)
        placement.evict("a")
        assert pool.used == 0


def test_a_composition_of_another_thread_keeps_no_copies():
    model, ids = crowd(*"abcd"), tokens(8, 1)
    placement = lorry.placement(model)
    ready, done = threading.Event(), threading.Event()
    watched = []

    def other():
        with torch.no_grad(), lorry.rows(model, [*"abcd", *"abcd"]):
            model(ids)
            watched.extend(stacked_factors(model))
            ready.set()
            assert done.wait(30)
            model(ids)

    def evicting():
        assert ready.wait(30)
        assert watched
        placement.evict("b")
        alive = [ref for ref in watched if ref() is not None]
        done.set()
        assert not alive

    together(other, evicting)


def test_detaching_frees_pages_and_files_and_leaves_the_handle_working(tmp_path):
    model, pool = crowd(*"abcd"), PagePool(512, 256)
    placement = lorry.placement(model, folder=tmp_path / "away")
    handles = lorry.adapters(model)
    before = {name: every_tensor(a) for name, a in handles.items()}
    for name, place in zip("abcd", PLACES, strict=True):
        put(placement, name, place, pool)
    for name, adapter in handles.items():
        adapter.detach()
        pool.check()
        assert same_tensors(adapter, before[name])
        with pytest.raises(lorry.AdapterError, match=name):
            placement.where(name)
    assert pool.used == 0 and not list((tmp_path / "away").iterdir())
    assert not any(k.startswith("forward") for k in vars(model))
    handles["c"].save(tmp_path / "c")
    lorry.load(crowd("a"), tmp_path / "c", name="c")


def test_files_go_with_the_model(tmp_path):
    model = crowd("a")
    lorry.placement(model, folder=tmp_path).place("a", "disk")
    assert len(list(tmp_path.iterdir())) == 1
    del model
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_what_did_not_change_is_not_written_again(tmp_path):
    model = crowd("a")
    placement = lorry.placement(model, folder=tmp_path)
    placement.place("a", "disk")
    (file,) = tmp_path.iterdir()
    written = placement.statistics.to_disk
    for way in (["device"], ["host"], ["host", "device"], ["device", "host"]):
        for place in (*way, "disk"):
            placement.place("a", place)
        assert placement.statistics.to_disk == written and list(tmp_path.iterdir()) == [file]
    placement.place("a", "device")
    next(iter(lorry.adapters(model)["a"].named_tensors()))[1].add_(1)
    before = every_tensor(lorry.adapters(model)["a"])
    placement.place("a", "disk")
    assert placement.statistics.to_disk > written and list(tmp_path.iterdir()) != [file]
    assert len(list(tmp_path.iterdir())) == 1
    assert same_tensors(lorry.adapters(model)["a"], before)


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped", "foreign"])
def test_a_damaged_file_is_an_error_that_says_what_to_do(damage, tmp_path):
    model, ids = crowd("a", "b"), tokens()
    placement = lorry.placement(model, folder=tmp_path)
    wanted = output(model, ids, "b")
    placement.place("a", "disk")
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[:-7])
    elif damage == "flipped":
        content[-100] ^= 4
        file.write_bytes(content)
    else:
        from safetensors.torch import save_file

        save_file({"bytes": torch.zeros(3, dtype=torch.uint8)}, file)
    for act in (lambda: output(model, ids, "a"), lambda: placement.place("a", "host"), lambda: placement.pin("a")):
        with pytest.raises(lorry.CheckpointError, match="'a' was placed.*Detach the adapter and load"):
            act()
    assert torch.equal(output(model, ids, "b"), wanted)
    adapter = lorry.adapters(model)["a"]
    adapter.detach()
    assert not list(tmp_path.iterdir())
    with pytest.raises(lorry.CheckpointError, match="Detach"):
        list(adapter.named_tensors())


def test_a_disk_that_refuses_leaves_the_adapter_where_it_was(tmp_path):
    model = crowd("a")
    (tmp_path / "file").write_text("no folder")
    placement = lorry.placement(model, folder=tmp_path / "file")
    wanted = output(model, tokens(), "a")
    with pytest.raises(lorry.CheckpointError, match="could not be written"):
        placement.place("a", "disk")
    assert placement.where("a") == "device" and torch.equal(output(model, tokens(), "a"), wanted)


# -- saving, copying, compiling, moving


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


# -- threads


def test_threads_that_activate_while_another_evicts(tmp_path):
    names = [f"a{n}" for n in range(6)]
    model, ids, pool = crowd(*names), tokens(2, 3), PagePool(300, 256)
    wanted = {n: output(model, ids, n) for n in names}
    placement = lorry.placement(model, folder=tmp_path)
    placement = lorry.placement(model, device_bytes=2 * placement.nbytes("a0"), host_bytes=2 * placement.nbytes("a0"))
    stop = threading.Event()

    def passing(seed):
        def job():
            order = random.Random(seed)
            try:
                for _ in range(60):
                    name = order.choice(names)
                    assert torch.equal(output(model, ids, name), wanted[name])
            finally:
                stop.set()

        return job

    def evicting():
        order = random.Random(9)
        while not stop.is_set():
            name = order.choice(names)
            try:
                order.choice(
                    [
                        placement.evict,
                        placement.prefetch,
                        lambda n: placement.place(n, pool),
                        lambda n: placement.place(n, "disk"),
                    ]
                )(name)
            except lorry.AdapterError as error:
                assert "under way" in str(error) or "no room" in str(error)
            pool.check()
            assert placement.used("device") <= placement.room.device_bytes

    together(passing(1), passing(2), evicting)
    pool.check()


def test_threads_that_load_and_detach_beside_others(tmp_path):
    model, ids = crowd(*"abc"), tokens(2, 3)
    wanted = {n: output(model, ids, n) for n in "abc"}
    placement = lorry.placement(model, folder=tmp_path)
    size = placement.nbytes("a")
    lorry.placement(model, device_bytes=2 * size, host_bytes=size)
    stop = threading.Event()

    def loading():
        try:
            for number in range(25):
                adapter = lorry.attach(model, lorry.LoRA(rank=3), name=f"new{number}", activate=False)
                adapter.train(False)
                placement.prefetch(["a", "b", "c"])
                output(model, ids, adapter.name)
                adapter.detach()
        finally:
            stop.set()

    def passing():
        order = random.Random(2)
        while not stop.is_set():
            name = order.choice("abc")
            assert torch.equal(output(model, ids, name), wanted[name])

    together(loading, passing, passing)
    assert set(lorry.adapters(model)) == set("abc")
    for adapter in lorry.adapters(model).values():
        adapter.detach()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["device", "pool"])
def test_a_pass_under_way_ends_with_the_tensors_it_began_with(place, pool):
    model, ids = crowd("a", "b", layers=2), tokens()
    wanted = output(model, ids, "a")
    placement = lorry.placement(model)
    put(placement, "a", place, pool)
    inside, go_on = threading.Event(), threading.Event()
    found = []

    def waiting(*_):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert go_on.wait(30)

    handle = model.model.layers[1].register_forward_pre_hook(waiting)
    thread = threading.Thread(target=lambda: found.append(output(model, ids, "a")))
    thread.start()
    assert inside.wait(30)
    with pytest.raises(lorry.AdapterError, match="under way"):
        placement.evict("a")
    lorry.placement(model, device_bytes=0)
    assert placement.where("a") is (pool if place == "pool" else "device")
    assert placement.where("b") == "host"
    lorry.adapters(model)["a"].detach()
    if place == "pool":  # nobody may write to pages that a pass still reads
        for _ in range(pool.free):
            pool.take(1).write(0, torch.full((256,), 255, dtype=torch.uint8))
    go_on.set()
    thread.join(30)
    handle.remove()
    assert torch.equal(found[0], wanted)


def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_prefetch_goes_on_while_a_pass_computes(tmp_path):
    model, ids = crowd("a", "b", "c"), tokens()
    wanted = {n: output(model, ids, n) for n in "abc"}
    placement = lorry.placement(model, folder=tmp_path)
    placement.place("b", "disk")
    placement.place("c", "host")

    def in_the_middle(*_):
        placement.prefetch(["a", "b", "c"])
        until(lambda: placement.where("b") == placement.where("c") == "device")

    handle = model.model.layers[0].mlp.register_forward_pre_hook(in_the_middle)
    assert torch.equal(output(model, ids, "a"), wanted["a"])
    handle.remove()
    misses = placement.statistics.misses
    for name in "bc":
        assert torch.equal(output(model, ids, name), wanted[name])
    assert placement.statistics.misses == misses


def test_prefetch_waits_and_raises_at_the_first_use(tmp_path):
    model, ids = crowd("a", "b"), tokens()
    placement = lorry.placement(model, folder=tmp_path)
    wanted = output(model, ids, "b")
    placement.place("a", "disk")
    (file,) = tmp_path.iterdir()
    placement.place("b", "disk")
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    placement.prefetch(["a", "b"])
    misses = placement.statistics.misses
    assert torch.equal(output(model, ids, "b"), wanted)
    assert placement.statistics.misses == misses, "the pass waited for what was on its way"
    with pytest.raises(lorry.CheckpointError, match="Detach the adapter"):
        output(model, ids, "a")
    file.write_bytes(content)
    placement.prefetch("a")
    output(model, ids, "a")
    assert placement.where("a") == "device"


def test_prefetch_keeps_the_limits(tmp_path):
    model = crowd(*"abc")
    size = lorry.placement(model).nbytes("a")
    placement = lorry.placement(model, device_bytes=2 * size, host_bytes=0, folder=tmp_path)
    placement.pin("c")
    placement.prefetch(["a", "b"])
    until(lambda: placement.where("b") == "device")
    assert placement.used("device") <= 2 * size
    assert [placement.where(n) for n in "abc"] == ["disk", "device", "device"]


# -- pages


def test_pages_are_taken_and_given_back_in_any_order():
    pool, order = PagePool(40, 64), random.Random(1)
    leases = []
    for _ in range(400):
        if leases and order.random() < 0.5:
            leases.pop(order.randrange(len(leases))).give_back()
        else:
            count = order.randrange(12)
            if count <= pool.free:  # any free pages serve: there is no other way to fail
                leases.append(pool.take(count))
            else:
                with pytest.raises(lorry.AdapterError, match="are free"):
                    pool.take(count)
        pool.check()
        assert pool.used == sum(len(lease.pages) for lease in leases)
    pages = [p for lease in leases for p in lease.pages]
    assert len(pages) == len(set(pages))


def test_pages_that_a_tensor_still_reads_are_not_given_away():
    pool = PagePool(2, 64)
    lease = pool.take(2)
    view = lease.runs[0][1][70:90].view(4, 5).t()
    lease.give_back()
    assert pool.free == 0
    del view
    assert pool.free == 2
    pool.check()


def test_a_full_pool_makes_room_or_says_so():
    model = crowd(*"abc")
    placement = lorry.placement(model)
    ids, wanted = tokens(), {n: output(model, tokens(), n) for n in "abc"}
    placement.place("a", probe := PagePool(500, 256))
    pool = PagePool(2 * probe.used - 1, 256)  # of adapters of one size, one fits
    for name in "abc":
        placement.place(name, pool)
        pool.check()
    assert [placement.where(n) for n in "abc"] == ["host", "host", pool]
    assert torch.equal(output(model, ids, "a"), wanted["a"])
    assert [placement.where(n) for n in "abc"] == [pool, "host", "host"], "what was in the pool comes back to it"
    with placement.pin("a"):
        with pytest.raises(lorry.AdapterError, match="no room for adapter 'b' on the pool.*pages.*'a' cannot leave"):
            placement.place("b", pool)
        assert torch.equal(output(model, ids, "b"), wanted["b"])
        assert placement.where("b") == "host"
    with pytest.raises(lorry.AdapterError, match="no room"):
        placement.place("a", PagePool(3, 64))
    pool.check()


def test_tensors_on_consecutive_pages_are_views_and_scattered_ones_are_right():
    model, ids = crowd("a", "b"), tokens()
    wanted = {n: output(model, ids, n) for n in "ab"}
    placement, pool = lorry.placement(model), PagePool(400, 128)
    placement.place("a", pool)
    start, end = pool.memory.data_ptr(), pool.memory.data_ptr() + pool.memory.nbytes
    entry = next(iter(lorry.adapters(model)["a"].entries.values()))
    assert all(start <= t.data_ptr() < end for t in entry.tensors().values())
    assert torch.equal(output(model, ids, "a"), wanted["a"])
    singles = [pool.take(1) for _ in range(pool.free)]
    for lease in singles[::2]:  # every second page is free: no tensor of more than a page lies in one piece
        lease.give_back()
    placement.evict("a")
    placement.place("b", pool)
    pool.check()
    assert torch.equal(output(model, ids, "b"), wanted["b"])


def test_a_pool_is_read_by_page_number():
    pool = PagePool(6, 64)
    keep = [pool.take(1) for _ in range(5)]
    for number in (0, 2, 4):
        keep[number].give_back()
    lease = pool.take(4)
    values = torch.arange(64, dtype=torch.float32)
    lease.write(0, values.view(torch.uint8))
    assert torch.equal(pool.rows(torch.float32)[list(lease.pages)].flatten(), values)
    pool.check()


@pytest.mark.parametrize("shape", [(0, 64), (4, 0), (4, 100)])
def test_a_pool_has_pages_of_whole_cache_lines(shape):
    with pytest.raises(lorry.OptionError, match="multiple of 64"):
        PagePool(*shape)
