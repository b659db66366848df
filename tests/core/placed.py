"""Models with frozen adapters to be placed, and what they compute and hold."""

from __future__ import annotations

import time
import weakref

import torch
from core.tiny import llama, off_zero

import lorry
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


def stacked_factors(model):
    """What the composition that applies now keeps of its adapters' factors."""
    kept = state_of(model).active.kept.values()
    return [weakref.ref(t) for s in kept if isinstance(s, Stacked) for _, *pair in s.groups for t in pair]


def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)
