"""Pages of a pool: taken once, given back when nobody reads them, in one piece where there is one."""

from __future__ import annotations

import random

import pytest
import torch
from core.placed import bits, crowd, output
from core.tiny import tokens

import lorry
from lorry.core.life.page_pool import PagePool


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


def test_pages_of_an_adapter_hold_its_tensors():
    model, pool = crowd("a"), PagePool(400, 128)
    gaps = [pool.take(1) for _ in range(pool.pages)]
    for lease in gaps[::2]:
        lease.give_back()
    placement = lorry.placement(model)
    with pytest.raises(lorry.AdapterError, match="no page pool"):
        placement.pages("a")
    placement.place("a", pool)
    found = placement.pages("a")
    for name, tensor, _ in lorry.adapters(model)["a"].named_tensors():
        pages, offset = found.pop(name)
        lying = pool.memory[list(pages)].flatten()[offset : offset + tensor.nbytes]
        assert bytes(lying.tolist()) == bits(tensor), name
        assert offset == 0 or len(pages) == 1
    assert not found


@pytest.mark.parametrize("shape", [(0, 64), (4, 0), (4, 100)])
def test_a_pool_has_pages_of_whole_cache_lines(shape):
    with pytest.raises(lorry.OptionError, match="multiple of 64"):
        PagePool(*shape)
