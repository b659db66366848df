"""One uniform form of every composition of plain low-rank adapters, so that a compiled graph serves all of them.

At each site the active factors lie side by side, A ``(ranks, in)`` and B ``(out, ranks)``, and a table of gates says
how much each rank unit counts for each row. Adapters, weights and rows change the contents of these tensors, never the
graph.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lorry.core.forward.active import Active, Portion
from lorry.core.method.families import Bottleneck
from lorry.core.method.layout import BatchLayout
from lorry.core.sites.site import Site

#: What is active on each model, by its slot. Compiled code must find it here: tensors that it reaches through a
#: module are taken to have fixed shapes, and every rank would be a graph of its own.
UNIFORM: dict[int, dict[str, Uniform] | None] = {}
_numbers = itertools.count()


class Slot:
    """A model's place in `UNIFORM`; a copied model gets a place of its own."""

    def __init__(self) -> None:
        self.number = next(_numbers)
        weakref.finalize(self, UNIFORM.pop, self.number, None)

    def __reduce__(self) -> tuple[type[Slot], tuple[()]]:
        """Copy and unpickle as a new slot."""
        return Slot, ()


@dataclass
class Uniform:
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


def uniform_forward(site: Site, output: Tensor, x: Tensor, uniform: Uniform | None, training: bool) -> Tensor:
    """Return the layer's output with the uniform update; plain tensor operations for the compiler."""
    if uniform is None:
        return output
    kind = site.kind
    if x.is_floating_point():
        x = x.to(output.dtype)
        if training and uniform.dropout > 0:
            x = F.dropout(x, uniform.dropout)
    h = kind.down(site, x, uniform.a.to(output.dtype))
    # a layer may see several entries for each row (beams, flattened tokens); rows lie together
    line = torch.arange(h.shape[0], device=h.device) * uniform.gates.shape[0] // h.shape[0]
    gates = uniform.gates.index_select(0, line).to(h.dtype)
    h = h * gates.view(h.shape[0], *[1] * (h.ndim - 2), gates.shape[1])
    return output + kind.up(site, h, uniform.b.to(output.dtype))


def uniform_form(active: Active, sites: list[Site]) -> dict[str, Uniform] | None:
    """Return the uniform form of a composition at every site, or None if there is none: adapters or weights with code
    of their own, or tokens of one row apart.
    """
    layout, portions = active.layout, [p for p in active.portions if not p.adapter.in_base]
    if layout is not None and (layout.lengths is not None or layout.counts):
        return None
    for portion in portions:
        grows = portion.weights is not None and portion.weights.requires_grad
        if portion.kind is not None or not isinstance(portion.weight, float) or grows:
            return None
        for entry in portion.adapter.entries.values():
            if not {"plain", "stored"} <= entry.method.capabilities or not entry.site.kind.factors_apply(entry.site):
                return None
    # whatever mode this is called in, the result may serve a later training step
    with torch.inference_mode(False), torch.enable_grad():
        table = _table(active, portions)
        return {site.path: uniform for site in sites if (uniform := _uniform_site(site, portions, table)) is not None}


def _table(active: Active, portions: list[Portion]) -> Tensor:
    """Return the weight of each portion in each entry of the batch, ``(entries, portions)``; two equal lines where all
    are the same.
    """
    layout = active.layout if active.layout is not None else BatchLayout(1)
    table = torch.zeros(layout.entries, len(portions))
    for column, portion in enumerate(portions):
        rows = layout.spread(portion.rows, 1, table.device)
        weights = None if portion.weights is None else layout.spread_values(portion.weights.cpu(), 1)
        number = cast(float, portion.weight)
        table[slice(None) if rows is None else rows, column] = number if weights is None else weights
    return table if len(table) > 1 else table.repeat(2, 1)


def _uniform_site(site: Site, portions: list[Portion], table: Tensor) -> Uniform | None:
    a, b, gates, dropout = [], [], [], 0.0
    for column, portion in enumerate(portions):
        entry = portion.adapter.entries.get(site.path)
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
    uniform = Uniform(left, right, torch.cat(gates, 1).to(left.device), dropout)
    for tensor, dims in ((uniform.a, (0,)), (uniform.b, (1,)), (uniform.gates, (0, 1))):
        # what torch._dynamo.maybe_mark_dynamic sets, without importing the compiler for those who do not compile
        tensor._dynamo_weak_dynamic_indices = set(dims)  # type: ignore[attr-defined]
    return uniform
