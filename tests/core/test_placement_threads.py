"""Passes, loads and prefetches of several threads on a model whose adapters are placed."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from core.choices import together
from core.placed import crowd, output, put, until
from core.tiny import tokens

import lorry
from lorry.core.life.page_pool import PagePool


@pytest.fixture
def pool():
    return PagePool(512, 256)


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
