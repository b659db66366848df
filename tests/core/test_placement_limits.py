"""Limits of a placement, pins, and what is left of an adapter that went away."""

from __future__ import annotations

import gc
import random
import threading
import weakref

import pytest
import torch
from core.choices import together
from core.placed import PLACES, crowd, every_tensor, output, put, resident, same_tensors, stacked_factors
from core.tiny import llama, off_zero, tokens

import lorry
from lorry.core.life.page_pool import PagePool


@pytest.fixture
def pool():
    return PagePool(512, 256)


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
    lorry.adapters(model)["a"].fuse()
    torch.testing.assert_close(output(model, tokens()), wanted)
    with pytest.raises(lorry.AdapterError, match="base"):
        placement.evict("a")
    lorry.placement(model, device_bytes=0)
    assert [placement.where(n) for n in "ab"] == ["device", "host"]
    lorry.adapters(model)["a"].unfuse()
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
