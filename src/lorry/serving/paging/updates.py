"""Low-rank updates of a batch: few products for any number of adapters.

Single tokens of different adapters are the hard case of decoding: a product for each would be a call's overhead around
a matrix times a vector. They are multiplied by rank unit (`lorry.kernels.lists`), with factors that lie side by side
as long as their adapters are in use (`Arena`). Longer stretches of one adapter are multiplied with its factors where
they lie in the pool. The definition is `lorry.kernels.lowrank.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorry.core.forward.active import Active
from lorry.core.forward.fused import STACKED
from lorry.kernels.lists import RowLists, runs
from lorry.serving.paging.arena import Arena
from lorry.serving.paging.factors import Factors

#: Tokens in a row times the rank of their adapter from which a product of their own costs less.
LONG = 512


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

    @property
    def long(self) -> bool:
        """Whether a product of its own is the better way."""
        return self.factors.large or (self.stop - self.start) * self.factors.rank >= LONG


def computed_in(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the type in which updates are computed, for layers that compute in `dtype`."""
    # on the CPU, products of a token each are several times faster so
    return torch.float32 if device.type == "cpu" and dtype.itemsize < 4 else dtype


def prepare(active: Active, stretches: Sequence[Stretch], tokens: int, arena: Arena) -> None:
    """Make the updates of a batch ready at every site where all adapters of the batch are plain.

    Parameters
    ----------
    active
        The composition of the batch, which takes them along.
    stretches
        Which tokens have which adapter.
    tokens
        Tokens of the batch.
    arena
        Holds the factors from now on, unless they are large.
    """
    excluded = {path for stretch in stretches for path in stretch.factors.odd}
    long, short = [s for s in stretches if s.long], _Short([s for s in stretches if not s.long], arena)
    arena.hold(stretch.factors for stretch in stretches if not stretch.factors.large)
    every = {path: None for stretch in stretches for path in stretch.factors.sites}
    paths = [path for path in every if path not in excluded]
    for path, units in zip(paths, short.units(paths), strict=True):
        own = [stretch for stretch in long if path in stretch.factors.sites]
        active.kept[STACKED, path] = SiteUpdate(path, tokens, own, short.rows, units, arena)
        active.ready[path] = False  # that way is for one adapter on all tokens


class _Short:
    """Stretches of few tokens, whose factors lie in the arena.

    Attributes
    ----------
    stretches
        All of them.
    rows
        The tokens of the batch from the first to the last that are in them.
    """

    def __init__(self, stretches: list[Stretch], arena: Arena) -> None:
        self.stretches = stretches
        self.arena = arena
        start = min((stretch.start for stretch in stretches), default=0)
        self.rows = slice(start, max((stretch.stop for stretch in stretches), default=0))
        lengths = torch.tensor([stretch.stop - stretch.start for stretch in stretches], dtype=torch.long)
        tokens = runs(torch.tensor([s.start - start for s in stretches], dtype=torch.long), lengths)
        self._tokens, order = tokens.sort(stable=True)  # one may have several adapters
        self._numbers = torch.arange(len(stretches)).repeat_interleave(lengths)[order]

    def units(self, paths: Sequence[str]) -> list[_Units | None]:
        """Return the units of all tokens at each site; None if no adapter of theirs is there."""
        if not self.stretches:
            return [None] * len(paths)
        columns = [[stretch.factors.ranks.get(path, 0) for path in paths] for stretch in self.stretches]
        found: dict[tuple[int, ...], _Units | None] = {}
        for ranks in (each := list(zip(*columns, strict=True))):
            if ranks not in found:
                found[ranks] = self._made(ranks) if any(ranks) else None
        return [found[ranks] for ranks in each]

    def _made(self, ranks: tuple[int, ...]) -> _Units:
        device, dtype = self.arena.device, self.arena.dtype
        rank = torch.tensor(ranks)[self._numbers]
        first = torch.tensor([self.arena.held[stretch.factors] for stretch in self.stretches])[self._numbers]
        counts = torch.zeros(self.rows.stop - self.rows.start, dtype=torch.long).index_add_(0, self._tokens, rank)
        lists = RowLists(counts.to(device), runs(first, rank).to(device), dtype)
        weights = [stretch.weight for stretch in self.stretches]
        if set(weights) == {1.0}:
            return _Units(lists)
        each = torch.tensor(weights, dtype=torch.float64)[self._numbers].repeat_interleave(rank)
        return _Units(lists, each.to(device, dtype))


@dataclass(frozen=True)
class _Units:
    """The rank units of each token, and what they are weighed with; None for 1."""

    lists: RowLists
    weights: Tensor | None = None


class SiteUpdate:
    """The updates of a batch at one site; a `lorry.kernels.gathered.Prepared`.

    Parameters
    ----------
    path
        The site.
    tokens
        Tokens of the batch.
    long
        The long stretches that have an adapter there.
    rows, units
        The tokens from the first to the last that are in short ones, and their units there; None for none.
    arena
        Holds what is not large.
    """

    def __init__(
        self, path: str, tokens: int, long: list[Stretch], rows: slice, units: _Units | None, arena: Arena
    ) -> None:
        self._tokens = tokens
        self._rows, self._units = rows, units
        self._factors = None if self._units is None else arena.at(path)
        self._long = [(slice(s.start, s.stop), *_own(s, path, arena)) for s in long]

    def serves(self, x: Tensor) -> bool:
        """Whether the input has the batch's tokens."""
        return x.numel() == self._tokens * x.shape[-1] and x.is_floating_point()

    def add(self, out: Tensor, x: Tensor) -> Tensor:
        """Add the updates to the layer's output in place."""
        flat, tokens = out.view(-1, out.shape[-1]), x.reshape(-1, x.shape[-1])
        if self._units is not None and self._factors is not None:
            (a, b), units = self._factors, self._units
            h = units.lists.dots(tokens[self._rows].to(a.dtype), a)
            flat[self._rows].add_(units.lists.sums(h if units.weights is None else h * units.weights, b))
        for rows, a, b, scale in self._long:
            h = tokens[rows].to(a.dtype) @ a
            if flat.dtype == b.dtype:
                flat[rows].addmm_(h, b, alpha=scale)
            else:
                flat[rows].add_((h @ b) * scale)
        return out


def _own(stretch: Stretch, path: str, arena: Arena) -> tuple[Tensor, Tensor, float]:
    """Return Aᵀ, Bᵀ and the factor of the update of a stretch that has a product of its own."""
    factors = stretch.factors
    if not factors.large:
        units = slice(arena.held[factors], arena.held[factors] + factors.ranks[path])
        a, b = arena.at(path)
        return a[units].t(), b[units], stretch.weight
    a, b = (tensor.to(arena.dtype) for tensor in factors.ready(path))
    return a.t(), b.t(), stretch.weight * factors.sites[path].scale
