"""One uniform form of every composition of plain low-rank adapters, so that a compiled graph serves all of them.

At each site the active factors lie side by side, A ``(ranks, in)`` and B ``(out, ranks)``, and a table of gates says
how much each rank unit counts for each row. Adapters, weights and rows change the contents of these tensors, never the
graph.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lorry.core.method.families import Bottleneck
from lorry.core.sites.site import Site

if TYPE_CHECKING:
    from lorry.core.forward.active import Active, Part

#: What is active on each model, by its slot. Compiled code must find it here: tensors that it reaches through a
#: module are taken to have fixed shapes, and every rank would be a graph of its own.
PACKED: dict[int, dict[str, Packed] | None] = {}
_numbers = itertools.count()


class Slot:
    """A model's place in `PACKED`; a copied model gets a place of its own."""

    def __init__(self) -> None:
        self.number = next(_numbers)
        weakref.finalize(self, PACKED.pop, self.number, None)

    def __reduce__(self) -> tuple[type[Slot], tuple[()]]:
        """Copy and unpickle as a new slot."""
        return Slot, ()


@dataclass
class Packed:
    """Factors and gates at one site.

    Attributes
    ----------
    a, b
        ``(ranks, in)`` and ``(out, ranks)``.
    gates
        ``(compositions, ranks)``, one for each row, or two equal ones for all rows, so that sizes stay symbolic.
    dropout
        Of the input, if all adapters agree.
    """

    a: Tensor
    b: Tensor
    gates: Tensor
    dropout: float


def packed_forward(site: Site, output: Tensor, x: Tensor, packed: Packed | None, training: bool) -> Tensor:
    """Return the layer's output with the packed update; plain tensor operations for the compiler."""
    if packed is None:
        return output
    kind = site.kind
    if x.is_floating_point():
        x = x.to(output.dtype)
        if training and packed.dropout > 0:
            x = F.dropout(x, packed.dropout)
    h = kind.down(site, x, packed.a.to(output.dtype))
    # a layer may see several entries for each row (beams, flattened tokens); rows lie together
    line = torch.arange(h.shape[0], device=h.device) * packed.gates.shape[0] // h.shape[0]
    gates = packed.gates.index_select(0, line).to(h.dtype)
    h = h * gates.view(h.shape[0], *[1] * (h.ndim - 2), gates.shape[1])
    return output + kind.up(site, h, packed.b.to(output.dtype))


def pack(active: Active, sites: list[Site]) -> dict[str, Packed] | None:
    """Return the packed form of a composition at every site, or None if some adapter has no such form."""
    parts = [p for p in active.parts if not p.adapter.merged]
    for part in parts:
        for entry in part.adapter.entries.values():
            method = entry.method
            stock = isinstance(method, Bottleneck) and method.plain and type(method).factors is Bottleneck.factors
            if not stock or not entry.site.kind.factors_apply(entry.site):
                return None
    # whatever mode this is called in, the result may serve a later training step
    with torch.inference_mode(False), torch.enable_grad():
        table = _table(active, parts)
        return {site.path: packed for site in sites if (packed := _pack_site(site, parts, table)) is not None}


def _table(active: Active, parts: list[Part]) -> Tensor:
    """Return the weight of each part in each row, ``(rows, parts)``; two equal rows where all are the same."""
    rows = active.rows or 1
    table = torch.zeros(rows, len(parts))
    for column, part in enumerate(parts):
        chosen = slice(None) if part.rows is None else part.rows
        table[chosen, column] = part.weight if part.weights is None else part.weights
    return table if rows > 1 else table.repeat(2, 1)


def _pack_site(site: Site, parts: list[Part], table: Tensor) -> Packed | None:
    a, b, gates, dropout = [], [], [], 0.0
    for column, part in enumerate(parts):
        entry = part.adapter.entries.get(site.path)
        if entry is None:
            continue
        entry.move(site.device)
        method = cast(Bottleneck, entry.method)
        left, right = method.factors(entry.tensors(), site)
        a.append(left)
        b.append(right)
        gates.append(table[:, column : column + 1].expand(-1, left.shape[0]) * method.scale(site))
        dropout = max(dropout, method.dropout)
    if not a:
        return None
    # a view where one adapter is alone: a parameter and a plain tensor would be two graphs
    left, right = (a[0].view_as(a[0]), b[0].view_as(b[0])) if len(a) == 1 else (torch.cat(a), torch.cat(b, 1))
    packed = Packed(left, right, torch.cat(gates, 1).to(left.device), dropout)
    for tensor, dims in ((packed.a, (0,)), (packed.b, (1,)), (packed.gates, (0, 1))):
        # what torch._dynamo.maybe_mark_dynamic sets, without importing the compiler for those who do not compile
        tensor._dynamo_weak_dynamic_indices = set(dims)  # type: ignore[attr-defined]
    return packed
