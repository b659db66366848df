"""Small settings of every registered method, for real models."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

import lorry
from lorry.core.method.base import Method
from lorry.core.method.registry import presets

#: Options that are sizes, with values small enough for layers of a few dozen channels; and what an update is scaled by.
SMALL = {
    "rank": 2,
    "initial_rank": 2,
    "most_rank": 3,
    "target_rank": 2,
    "experts": 3,
    "top_k": 2,
    "kernels": (2, 2, 4),
    "tokens": tuple(range(16)),
    "dropout": 0.0,
    "eta": 0.02,
}


def small(slug: str, **more: Any) -> Method:
    """The method with its defaults but for sizes; `more` replaces any option."""
    of = presets()[slug].of if slug in presets() else slug
    fields = {f.name: f for f in dataclasses.fields(lorry.methods()[of].cls)}  # type: ignore[arg-type]
    chosen = {k: v for k, v in SMALL.items() if k in fields and isinstance(fields[k].default, type(v))}
    for dropped in ((), ("top_k",), ("rank",), tuple(chosen)):
        try:
            return lorry.method_from({"method": slug, **{k: v for k, v in chosen.items() if k not in dropped}, **more})
        except lorry.OptionError:
            continue
    raise AssertionError(f"{slug} needs options: give every option a default")


def with_dense_updates(plain: Any, adapter: lorry.Adapter, weight: float = 1.0) -> Any:
    """Add the dense updates of an adapter to the weights of a model that Lorry does not know, and return it."""
    with torch.no_grad():
        for site, delta in adapter.deltas():
            owner = site.path if site.holder is site.owner else f"{site.path.rpartition('.')[0]}"
            holder = plain.get_submodule(owner)
            stored = getattr(holder, site.parameter)
            stored.add_(site.kind.to_weight(site, weight * delta).to(stored.dtype))
        for entry in adapter.entries.values():
            update = entry.method.bias_delta(entry.tensors(), entry.site)
            if update is not None:
                holder = plain.get_submodule(entry.site.path)
                own = torch.zeros((), dtype=stored.dtype) if holder.bias is None else holder.bias
                holder.bias = torch.nn.Parameter((own + weight * update).to(stored.dtype), requires_grad=False)
    return plain


def merges(adapter: lorry.Adapter) -> bool:
    """Whether the adapter is a change of weights with the options it has at every site."""
    return all(entry.method.fusing != "never" for entry in adapter.entries.values())
