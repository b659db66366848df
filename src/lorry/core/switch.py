"""Switching the adapter of a base in place: a sparse update overwrites a few values, and they are put back bit for bit.

Merging exchanges whole weights; here the bytes touched are those of the adapter, so the cost does not grow with the base.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorry.core.adapter import Adapter
from lorry.core.errors import AdapterError
from lorry.core.families import WeightDelta
from lorry.core.sites import Site
from lorry.core.storage import Dense, storage_of


@dataclass
class Overwritten:
    """Which values of the base an adapter has overwritten, and what they were.

    Attributes:
        adapter: whose values are in the base now.
        saved: at each site the rows and columns that were written, and the base's own values there.
    """

    adapter: Adapter
    saved: list[tuple[Site, tuple[Tensor, ...], Tensor]]

    def restore(self) -> None:
        """Put the base's own values back.

        Raises:
            AdapterError: it was done already.
        """
        if not self.saved:
            raise AdapterError(f"The values of adapter '{self.adapter.name}' were taken out of the base already.")
        with torch.no_grad():
            for site, where, values in self.saved:
                _matrix(site)[where] = values
        self.saved = []
        self.adapter.state.merged.remove(self.adapter.name)


def overwrite(adapter: Adapter, weight: float = 1.0) -> Overwritten:
    """Write ``W + weight · ΔW`` into the base in place, at the positions where a sparse adapter changes it.

    Args:
        adapter: an adapter whose method gives `WeightDelta.sparse`, on a dense base.
        weight: strength of the update.

    Raises:
        AdapterError: the update is not sparse, the base is quantised, the adapter is active, or another adapter is in
            the base already (two sets of overwritten values would be mixed up). Nothing is changed then.
    """
    state = adapter.state
    if state.merged:
        raise AdapterError(
            f"Adapter '{state.merged[-1]}' is in the base; take it out before '{adapter.name}' is written."
        )
    if state.active is not None and any(part.adapter is adapter for part in state.active.parts):
        raise AdapterError(
            f"Adapter '{adapter.name}' is active and would count twice; call lorry.activate(model, None) first."
        )
    plans: list[tuple[Site, tuple[Tensor, ...], Tensor]] = []
    for entry in adapter.entries.values():
        method, site = entry.method, entry.site
        found = method.sparse(entry.tensors(), site) if isinstance(method, WeightDelta) else None
        if found is None or not isinstance(storage_of(site), Dense):
            raise AdapterError(
                f"The update at '{site.path}' is not sparse on a dense weight; merge it with adapter.merge()."
            )
        index, values = found
        _matrix(site)
        plans.append((site, torch.unravel_index(index.long(), site.shape), values.detach() * weight))
    saved = []
    with torch.no_grad():
        for site, where, change in plans:
            matrix = _matrix(site)
            before = matrix[where].clone()
            exact = torch.promote_types(before.dtype, torch.float32)
            matrix[where] = (before.to(exact) + change.to(exact)).to(before.dtype)
            saved.append((site, where, before))
    state.merged.append(adapter.name)
    return Overwritten(adapter, saved)


def _matrix(site: Site) -> Tensor:
    """Return the stored weight as a matrix that shares its memory."""
    matrix = site.kind.to_matrix(site, site.stored.detach())
    if matrix.untyped_storage().data_ptr() != site.stored.untyped_storage().data_ptr():
        raise AdapterError(
            f"The weight of '{site.path}' has a memory format that cannot be written in place as a matrix."
        )
    return matrix
