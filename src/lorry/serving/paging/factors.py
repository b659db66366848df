"""The plain low-rank updates of one adapter, site by site, and where its factors lie in a pool."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from lorry.core.forward.entry import Entry
from lorry.core.life.images import ALIGNED, Slot
from lorry.core.life.page_pool import Lease, PagePool
from lorry.core.method.families import Bottleneck
from lorry.serving.paging.resident import Resident

#: Bytes of a site's factors beyond which keeping a copy of them costs more than a call for each adapter.
_LARGE = 1 << 18


@dataclass(frozen=True)
class SiteFactors:
    """A plain update of one site.

    Attributes
    ----------
    entry
        The adapter there.
    a, b
        Where A ``(rank, in)`` and B ``(out, rank)`` lie in what is paged in; both rank unit by rank unit.
    scale
        Factor of the update.
    """

    entry: Entry
    a: Slot
    b: Slot
    scale: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[0]


@dataclass(frozen=True)
class Alike:
    """Factors of one adapter that have one shape ``(rank, width)``, as they lie in memory.

    Attributes
    ----------
    rank, width
        Rows of A or columns of B, and elements of each.
    places
        The site of each, and whether it is B.
    slot
        Where the first of them lies.
    scales
        What they are multiplied with when they are copied ``(places, 1, 1)``; None for 1.
    """

    rank: int
    width: int
    places: tuple[tuple[str, bool], ...]
    slot: Slot
    scales: Tensor | None


class Factors:
    """The plain updates of one adapter.

    Attributes
    ----------
    sites
        Path -> the factors there.
    odd
        Sites where the adapter is something else.
    ranks
        Path -> rank.
    rank
        The greatest of them; 0 without any.
    large
        Whether a call for each adapter costs less than keeping a copy of its factors.
    """

    def __init__(self, resident: Resident) -> None:
        self.resident = resident
        found = {path: _plain(entry, resident) for path, entry in resident.adapter.entries.items()}
        self.sites = {path: factors for path, factors in found.items() if factors is not None}
        self.odd = {path for path, factors in found.items() if factors is None}
        self.ranks = {path: factors.rank for path, factors in self.sites.items()}
        self.rank = max(self.ranks.values(), default=0)
        self.large = any(f.a.nbytes + f.b.nbytes > _LARGE for f in self.sites.values())

    def ready(self, path: str) -> tuple[Tensor, Tensor]:
        """Return A and B at a site for computing."""
        tensors = self.resident.ready(self.sites[path].entry.home)
        return tensors["A"], tensors["B"]

    @cached_property
    def alike(self) -> tuple[Alike, ...]:
        """All factors, those of one shape together."""
        found: dict[tuple[int, int, torch.dtype], list[tuple[str, bool]]] = {}
        for path, site in self.sites.items():
            for is_b, slot in enumerate((site.a, site.b)):
                found.setdefault((site.rank, _width(slot, site.rank), slot.dtype), []).append((path, bool(is_b)))
        made = []
        for (rank, width, _), places in found.items():
            scales = [self.sites[path].scale if is_b else 1.0 for path, is_b in places]
            factor = None if set(scales) == {1.0} else torch.tensor(scales, dtype=torch.float64).view(-1, 1, 1)
            made.append(Alike(rank, width, tuple(places), self._slot(*places[0]), factor))
        return tuple(made)

    def read(self) -> Iterator[tuple[Alike, Tensor]]:
        """Yield all factors ``(places, rank, width)``, those of one shape together, read from the pool."""
        lease = self.resident.lease
        for alike in self.alike:
            slots = [self._slot(*place) for place in alike.places]
            starts = None if lease is None else self._starts(lease, slots)
            if starts is not None:
                yield alike, _windows(self.resident.pool, alike.slot, starts).view(len(slots), alike.rank, -1)
                continue
            pairs = [(self.ready(path), is_b) for path, is_b in alike.places]
            yield alike, torch.stack([pair[1].t() if is_b else pair[0] for pair, is_b in pairs])

    def _slot(self, path: str, is_b: bool) -> Slot:
        site = self.sites[path]
        return site.b if is_b else site.a

    def _starts(self, lease: Lease, slots: list[Slot]) -> list[int] | None:
        """Return the bytes of the pool at which tensors begin; None if not all lie in one piece."""
        if len(lease.runs) == 1:
            first = lease.pages[0] * lease.pool.page_bytes
            return [first + slot.start for slot in slots]
        found = [self.resident.address(slot) for slot in slots]
        return None if None in found else cast(list[int], found)


def _plain(entry: Entry, resident: Resident) -> SiteFactors | None:
    able = entry.method.capabilities
    if not {"stored", "plain"} <= able or entry.shared is not None or not entry.site.kind.plain_product:
        return None
    a, b = (resident.slot(entry.home, name) for name in ("A", "B"))
    if len(a.shape) != 2 or len(b.shape) != 2 or not a.nbytes or a.dtype != b.dtype or not a.dtype.is_floating_point:
        return None
    rank, width = a.shape
    dense = rank == 1 or (a.stride == (width, 1) and b.stride == (1, b.shape[0]))
    return SiteFactors(entry, a, b, cast(Bottleneck, entry.method).scale(entry.site)) if dense else None


def _width(slot: Slot, rank: int) -> int:
    return slot.nbytes // slot.dtype.itemsize // rank


def _windows(pool: PagePool, slot: Slot, starts: list[int]) -> Tensor:
    """Return tensors of one shape from all over a pool, ``(starts, elements)``.

    They begin at multiples of `ALIGNED`, so a tensor of any size is one row of a view of the pool whose rows overlap.
    """
    flat = pool.rows(slot.dtype).view(-1)
    size, step = slot.nbytes // slot.dtype.itemsize, ALIGNED // slot.dtype.itemsize
    rows = flat.as_strided(((flat.numel() - size) // step + 1, size), (step, 1))
    return rows.index_select(0, torch.tensor(starts, device=pool.device) // ALIGNED)
