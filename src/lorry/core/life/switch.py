"""Switching the adapter of a base in place: a sparse update overwrites a few values, and they are put back bit for bit.

Fusing exchanges whole weights; here the bytes touched are those of the adapter, whatever the size of the base.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lorry.core.errors import AdapterError
from lorry.core.life.adapter import Adapter
from lorry.core.life.base_edits import Edit
from lorry.core.life.fuse import check_kept
from lorry.core.method.families import WeightDelta
from lorry.core.sites.site import Site
from lorry.core.sites.storage import Dense, storage_of

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Patch:
    """What a switch writes into one weight.

    Attributes
    ----------
    site
        The weight.
    index
        Positions in the memory of the stored weight, ascending in the order of the adapter.
    own
        The base's values there.
    new
        The values with the adapter, rounded once.
    """

    site: Site
    index: Tensor
    own: Tensor
    new: Tensor


class Switch:
    """A sparse adapter made ready to be written into its base, and taken out, as often as one likes."""

    def __init__(self, adapter: Adapter, patches: list[Patch], weight: float) -> None:
        self.adapter = adapter
        self.patches = patches
        self.weight = weight
        self._written: list[tuple[Tensor, int]] = []  # the weights as they were left, by their versions

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy of the model takes along; versions are others there."""
        return {**self.__dict__, "_written": [(weight, weight._version == v) for weight, v in self._written]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up what a copy brought along."""
        self.__dict__.update(state)
        self._written = [(weight, weight._version if same else -1) for weight, same in state["_written"]]

    @property
    def written(self) -> bool:
        """Whether the adapter's values are in the base."""
        return self.adapter.in_base

    @property
    def nbytes(self) -> int:
        """Bytes that one write passes over: each position, its value, and its place in the base."""
        return sum(p.index.nbytes + 2 * p.new.nbytes for p in self.patches)

    def on(self) -> None:
        """Write the adapter's values into the base; until `off` it applies to everything the model computes.

        Raises
        ------
        AdapterError
            An adapter is in the base already (two sets of overwritten values would be mixed up), or this one is active
            here and would count twice.
        """
        state = self.adapter.state
        _check_bare(self.adapter)
        state.check_fuse(self.adapter.name, self.weight)
        if state.active is not None and self.adapter.name in state.active.members:
            raise AdapterError(
                f"Adapter '{self.adapter.name}' is active and would count twice; call lorry.activate(model, None) "
                "first."
            )
        state.hashes.hold(self.adapter.sites)
        self._write_new()
        places = tuple((p.site.holder, p.site.parameter) for p in self.patches)
        state.edits.made(Edit(self.adapter.name, self.weight, self._write_own, places, again=self._write_new))
        state.changed()

    def off(self) -> None:
        """Put the base's own values back.

        Raises
        ------
        AdapterError
            The adapter's values are not in the base.
        """
        if not self.written:
            raise AdapterError(f"The values of adapter '{self.adapter.name}' are not in the base.")
        self.adapter.unfuse()

    def _write_new(self) -> None:
        for patch in self.patches:
            _write(patch.site, patch.index, patch.new)
        self._written = [(patch.site.stored, patch.site.stored._version) for patch in self.patches]

    def _write_own(self) -> None:
        for patch, (weight, version) in zip(self.patches, self._written, strict=True):
            if patch.site.stored is not weight or weight._version != version:
                raise AdapterError(
                    f"The weight of '{patch.site.path}' was changed after adapter '{self.adapter.name}' was written "
                    "into it (loaded anew, trained or overwritten), so the kept values no longer belong to it. Switch "
                    "off before changing the base; or detach the adapter with detach(keep=True), which leaves the base "
                    "as it is."
                )
        for patch in self.patches:
            _write(patch.site, patch.index, patch.own)


def make_switch(adapter: Adapter, weight: float = 1.0) -> Switch:
    """Make a sparse adapter ready to be switched in place.

    Parameters
    ----------
    adapter
        An adapter whose method gives `WeightDelta.sparse`, on a dense base.
    weight
        Strength of the update.

    Raises
    ------
    AdapterError
        The update is not sparse, the base is quantised, or an adapter is in the base now.
    """
    _check_bare(adapter)
    patches = []
    for entry in adapter.entries.values():
        method, site = entry.method, entry.site
        check_kept(site)
        found = cast(WeightDelta, method).sparse(entry.tensors(), site) if "sparse" in method.capabilities else None
        if found is None or not isinstance(storage_of(site), Dense):
            raise AdapterError(f"The update at '{site.path}' is not sparse on a dense weight; use adapter.fuse().")
        index = _in_memory(site, found[0])
        own = _flat(site).index_select(0, index)
        exact = torch.promote_types(own.dtype, torch.float32)
        new = (own.to(exact) + weight * found[1].detach().to(exact)).to(own.dtype)
        patches.append(Patch(site, index, own, new))
    return Switch(adapter, patches, weight)


def _check_bare(adapter: Adapter) -> None:
    if adapter.state.edits.names:
        other = adapter.state.edits.names[-1]
        raise AdapterError(f"Adapter '{other}' is in the base; take it out before '{adapter.name}' is written.")


def _flat(site: Site) -> Tensor:
    """Return the memory of the stored weight as a vector."""
    stored = site.stored.detach()
    if not stored.is_contiguous():
        raise AdapterError(f"The weight of '{site.path}' is not contiguous and cannot be written in place.")
    return stored.view(-1)


def _write(site: Site, index: Tensor, values: Tensor) -> None:
    """Overwrite the memory of a weight at distinct places, as whole numbers of the same width: the bits are copied,
    and PyTorch's scatter of those is the fastest on every dtype.
    """
    stored = site.stored
    values = values.to(stored.device, stored.dtype)  # the model may have been cast or moved since
    width = _BITS[values.element_size()]
    _flat(site).view(width).scatter_(0, index.to(stored.device), values.view(width))


def _in_memory(site: Site, index: Tensor) -> Tensor:
    """Return where entries of the matrix ``(*lead, out, in)`` lie in the memory of the stored weight."""
    matrix = site.kind.to_matrix(site, site.stored.detach())
    index = index.long()
    if matrix.is_contiguous():
        return index
    places = torch.unravel_index(index, site.shape)
    return torch.stack([place * step for place, step in zip(places, matrix.stride(), strict=True)]).sum(0)
