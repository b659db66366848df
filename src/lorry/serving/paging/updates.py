"""Low-rank updates of a batch, read from the pages of a pool: what each adapter has where, and one product for many.

Single tokens of different adapters are the hard case of decoding: a product for each would be a call's overhead around
a matrix times a vector. Their factors are gathered from the pool in one operation for each rank, and multiplied in one
batched product; the gathered factors are kept as long as the batch has the same composition. Longer stretches of one
adapter are multiplied with its factors where they lie. The definition is `lorry.kernels.lowrank.reference`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from lorry.core.forward.active import Active
from lorry.core.forward.entry import Entry
from lorry.core.forward.fused import STACKED
from lorry.core.life.images import ALIGNED, Slot
from lorry.core.life.page_pool import Lease, PagePool
from lorry.core.method.families import Bottleneck
from lorry.serving.paging.resident import Resident

#: Tokens of one adapter in a row from which its factors are used where they lie.
LONG = 6
#: Bytes of a site's factors beyond which copying them costs more than a call for each adapter.
_LARGE = 1 << 18
#: The kinds of factors that there were so far; their numbers stay.
_KINDS: dict[object, int] = {}


@dataclass(frozen=True)
class SiteFactors:
    """A plain update of one site.

    Attributes
    ----------
    entry
        The adapter there.
    a, b
        Where A ``(rank, in)`` and B ``(out, rank)`` lie in what is paged in.
    scale
        Factor of the update.
    """

    entry: Entry
    a: Slot
    b: Slot
    scale: float


class Factors:
    """The plain updates of one adapter, by site.

    Attributes
    ----------
    sites
        Path -> the factors there.
    odd
        Sites where the adapter is something else.
    number
        Of the kind: paths, shapes and types of the factors. Adapters of one kind are multiplied together.
    scales
        Factors of the updates, in the order of `sites`.
    large
        Whether a call for each adapter costs less than copying its factors.
    """

    def __init__(self, resident: Resident) -> None:
        self.resident = resident
        found = {path: _plain(entry, resident) for path, entry in resident.adapter.entries.items()}
        self.sites = {path: factors for path, factors in found.items() if factors is not None}
        self.odd = {path for path, factors in found.items() if factors is None}
        kind = tuple((path, f.a.shape, f.b.shape, f.a.dtype) for path, f in self.sites.items())
        self.number = _KINDS.setdefault(kind, len(_KINDS))
        self.scales = torch.tensor([factors.scale for factors in self.sites.values()], dtype=torch.float64)
        self.large = any(f.a.nbytes + f.b.nbytes > _LARGE for f in self.sites.values())
        self._starts = torch.tensor([(f.a.start, f.b.start) for f in self.sites.values()]).view(-1, 2)
        self._lease: Lease | None = None
        self._addresses: Tensor | None = None

    def ready(self, path: str) -> tuple[Tensor, Tensor]:
        """Return A and B at a site for computing."""
        tensors = self.resident.ready(self.sites[path].entry.home)
        return tensors["A"], tensors["B"]

    def addresses(self) -> Tensor | None:
        """Return the bytes of the pool at which A and B begin, ``(sites, 2)``; None if not all lie in one piece."""
        lease = self.resident.lease
        if lease is None:
            return None
        if lease is not self._lease:
            self._lease = lease
            if len(lease.runs) == 1:
                self._addresses = self._starts + lease.pages[0] * lease.pool.page_bytes
            else:
                each = [[self.resident.address(slot) for slot in (f.a, f.b)] for f in self.sites.values()]
                whole = all(address is not None for pair in each for address in pair)
                self._addresses = torch.tensor(each) if whole else None
        return self._addresses


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


@dataclass(frozen=True)
class Stretch:
    """Tokens in a row that have an adapter.

    Attributes
    ----------
    start, stop
        Which tokens of the batch.
    factors
        The adapter's.
    weight
        Its weight.
    """

    start: int
    stop: int
    factors: Factors
    weight: float


class Part(Protocol):
    """Who gives updates of some tokens of a batch."""

    @property
    def paths(self) -> tuple[str, ...]:
        """The sites."""

    def made(self, number: int) -> Made:
        """Return what to multiply with at the site of a number."""


def computed_in(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the type in which updates are computed, for layers that compute in `dtype`."""
    # on the CPU, batched products of a token each are several times faster so
    return torch.float32 if device.type == "cpu" and dtype.itemsize < 4 else dtype


def prepare(
    active: Active,
    stretches: Sequence[Stretch],
    tokens: int,
    dtype: torch.dtype,
    parts: Sequence[Part] = (),
    odd: Iterable[str] = (),
) -> None:
    """Make the updates of a batch ready at every site where all adapters of the batch are plain.

    Parameters
    ----------
    active
        The composition of the batch, which takes them along.
    stretches
        Which tokens have which adapter.
    tokens
        Tokens of the batch.
    dtype
        In which they are computed.
    parts
        Who gives the updates of further tokens.
    odd
        Sites where the adapters of these are something else.
    """
    members: list[Part] = list(parts)
    short: dict[int, list[Stretch]] = {}
    for stretch in stretches:
        if stretch.stop - stretch.start >= LONG or stretch.factors.large:
            members.append(_Long(stretch, dtype))
        else:
            short.setdefault(stretch.factors.number, []).append(stretch)
    members += [_Short(each, dtype) if len(each) > 1 else _Long(each[0], dtype) for each in short.values()]
    excluded = {path for stretch in stretches for path in stretch.factors.odd}.union(odd)
    updates: dict[str, SiteUpdate] = {}
    for member in members:
        for number, path in enumerate(member.paths):
            if path not in excluded:
                updates.setdefault(path, SiteUpdate(tokens)).parts.append((member, number))
    for path, update in updates.items():
        active.kept[STACKED, path] = update
        active.ready[path] = False  # that way is for one adapter on all tokens


class _Long:
    """One stretch, whose factors are used where they lie."""

    def __init__(self, stretch: Stretch, dtype: torch.dtype) -> None:
        self.paths = tuple(stretch.factors.sites)
        self._stretch = stretch
        self._dtype = dtype

    def made(self, number: int) -> Made:
        """Return what to multiply with at the site of a number."""
        stretch, path = self._stretch, self.paths[number]
        a, b = (tensor.to(self._dtype) for tensor in stretch.factors.ready(path))
        scale = stretch.weight * stretch.factors.sites[path].scale
        return slice(stretch.start, stretch.stop), a.t(), b.t(), scale


class _Short:
    """Stretches of few tokens of adapters of one kind, whose factors are gathered from the pool."""

    def __init__(self, stretches: list[Stretch], dtype: torch.dtype) -> None:
        first = stretches[0].factors
        self.paths = tuple(first.sites)
        self._stretches = stretches
        self._dtype = dtype
        device = first.resident.pool.device
        places = [place for stretch in stretches for place in range(stretch.start, stretch.stop)]
        run = places == list(range(places[0], places[0] + len(places)))
        self._index = slice(places[0], places[-1] + 1) if run else torch.tensor(places, device=device)
        #: Each stretch once for each of its tokens.
        self._each = [stretch for stretch in stretches for _ in range(stretch.start, stretch.stop)]
        weights = torch.tensor([stretch.weight for stretch in self._each], dtype=torch.float64)
        scales = torch.stack([stretch.factors.scales for stretch in self._each]) * weights[:, None]
        self._scales = scales.to(device, dtype)[:, :, None, None].unbind(1)
        addresses = [stretch.factors.addresses() for stretch in self._each]
        whole = [address for address in addresses if address is not None]
        self._units: Tensor | None = None
        if len(whole) == len(addresses):
            self._units = torch.stack(whole, 2).to(device) // ALIGNED  # (sites, A and B, tokens)
        self._gathered: list[list[Tensor]] = [[], []]

    def made(self, number: int) -> Made:
        """Return what to multiply with at the site of a number, for each token."""
        if self._units is None:
            pairs = [stretch.factors.ready(self.paths[number]) for stretch in self._each]
            a, b = torch.stack([a for a, _ in pairs]), torch.stack([b.t() for _, b in pairs])
        else:
            if not self._gathered[0]:
                sites = tuple(self._stretches[0].factors.sites.values())
                ranks = [site.a.shape[0] for site in sites]
                pool = self._stretches[0].factors.resident.pool
                for which, slots in enumerate(([site.a for site in sites], [site.b for site in sites])):
                    self._gathered[which] = _gathered(pool, slots, ranks, self._units[:, which])
            a, b = (gathered[number] for gathered in self._gathered)
        return self._index, a.to(self._dtype).mT, b.to(self._dtype), self._scales[number]


def _gathered(pool: PagePool, slots: Sequence[Slot], ranks: Sequence[int], units: Tensor) -> list[Tensor]:
    """Return tensors from all over a pool, for each slot ``(tokens, rank, width)`` as they lie in memory.

    Sites whose tensors are of one shape are read together.

    Parameters
    ----------
    pool
        The pool.
    slots, ranks
        What is read: one tensor for each site.
    units
        Where they begin, in units of `ALIGNED` bytes ``(sites, tokens)``.
    """
    alike: dict[tuple[int, int, torch.dtype], list[int]] = {}
    for number, (slot, rank) in enumerate(zip(slots, ranks, strict=True)):
        alike.setdefault((rank, slot.nbytes, slot.dtype), []).append(number)
    found: list[Tensor] = [units] * len(slots)
    for (rank, _, _), numbers in alike.items():
        read = windows(pool, slots[numbers[0]], units[numbers].view(-1))
        for number, tensor in zip(numbers, read.view(len(numbers), units.shape[1], rank, -1).unbind(), strict=True):
            found[number] = tensor
    return found


def windows(pool: PagePool, slot: Slot, units: Tensor) -> Tensor:
    """Return tensors of one shape from all over a pool, ``(units, elements)``.

    They begin at multiples of `ALIGNED`, so a tensor of any size is one row of a view of the pool whose rows overlap.
    """
    flat = pool.rows(slot.dtype).view(-1)
    size, step = slot.nbytes // slot.dtype.itemsize, ALIGNED // slot.dtype.itemsize
    return flat.as_strided(((flat.numel() - size) // step + 1, size), (step, 1)).index_select(0, units)


#: Which tokens; Aᵀ, Bᵀ and a scale, for all of them or one for each.
Made = tuple[slice | Tensor, Tensor, Tensor, float | Tensor]


class SiteUpdate:
    """The updates of a batch at one site; a `lorry.kernels.gathered.Prepared`.

    Attributes
    ----------
    parts
        Who gives them, and the site's number there.
    """

    def __init__(self, tokens: int) -> None:
        self.parts: list[tuple[Part, int]] = []
        self._tokens = tokens
        self._made: list[Made] | None = None

    def serves(self, x: Tensor) -> bool:
        """Whether the input has the batch's tokens."""
        return x.numel() == self._tokens * x.shape[-1] and x.is_floating_point()

    def add(self, out: Tensor, x: Tensor) -> Tensor:
        """Add the updates to the layer's output in place."""
        if self._made is None:
            self._made = [part.made(number) for part, number in self.parts]
        flat, tokens = out.view(-1, out.shape[-1]), x.reshape(-1, x.shape[-1])
        for index, a, b, scale in self._made:
            part = tokens[index].to(a.dtype)
            if isinstance(scale, float):
                h = part @ a
                if flat.dtype == b.dtype and isinstance(index, slice):
                    flat[index].addmm_(h, b, alpha=scale)
                else:
                    _add(flat, index, (h @ b) * scale)
                continue
            h = torch.bmm(part.unsqueeze(1), a).mul_(scale)
            if flat.dtype == b.dtype and isinstance(index, slice):
                flat[index].unsqueeze(1).baddbmm_(h, b)
            else:
                _add(flat, index, torch.bmm(h, b).squeeze(1))
        return out


def _add(out: Tensor, index: slice | Tensor, update: Tensor) -> None:
    if isinstance(index, slice):
        out[index].add_(update)
    else:
        out.index_add_(0, index, update.to(out.dtype))
