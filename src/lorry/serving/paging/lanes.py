"""Factors of the adapters that decode now, side by side, so that one batched product takes all of one kind.

A batch differs from the one before it by a request that ended and one that began. So the factors stay where they are
from pass to pass: only those of an adapter that is new are copied from its pages, and the last one moves into a gap.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorry.core.life.images import ALIGNED
from lorry.serving.paging.updates import Factors, Made, windows


class Lane:
    """Factors of adapters of one kind.

    Parameters
    ----------
    like
        One of them.
    dtype
        In which they are multiplied.

    Attributes
    ----------
    paths
        Their sites.
    held
        Whose factors lie in which place.
    dtype, device
        Of the factors.
    """

    def __init__(self, like: Factors, dtype: torch.dtype) -> None:
        self.paths = tuple(like.sites)
        self.held: list[Factors] = []
        self.dtype = dtype
        self.device = like.resident.pool.device
        sites = tuple(like.sites.values())
        self._ranks = [site.a.shape[0] for site in sites]
        self._slots = ([site.a for site in sites], [site.b for site in sites])
        #: For A and B: sites whose factors have one shape, and their memory ``(sites, places, rank, width)``.
        self._memory: tuple[list[_Shape], list[_Shape]] = (self._shapes(0), self._shapes(1))
        self._views: list[list[Tensor]] = [[], []]

    def settle(self, wanted: Sequence[Factors]) -> list[int]:
        """Hold the factors of these adapters, and return which of them lies in which place, from the first on."""
        places: dict[Factors, list[int]] = {}
        for number, factors in enumerate(wanted):
            places.setdefault(factors, []).append(number)
        order: list[int | None] = [places[f].pop() if places.get(f) else None for f in self.held]
        count = len(wanted)
        self._grow(count)
        moving = [place for place in range(count, len(order)) if order[place] is not None]
        left = [number for numbers in places.values() for number in numbers]
        order += [None] * (count - len(order))
        for place in range(count):
            if order[place] is not None:
                continue
            if moving:
                source = moving.pop()
                for shape in (*self._memory[0], *self._memory[1]):
                    shape.memory[:, place] = shape.memory[:, source]
                order[place] = order[source]
            else:
                order[place] = left.pop()
                self._put(place, wanted[order[place]])  # type: ignore[index]
        found = [number for number in order[:count] if number is not None]
        self.held = [wanted[number] for number in found]
        return found

    def factors(self, number: int, count: int) -> tuple[Tensor, Tensor]:
        """Return Aᵀ and Bᵀ ``(places, in, rank)``, ``(places, rank, out)`` of the site of a number."""
        a, b = (views[number][:count] for views in self._views)
        return a.mT, b

    def _put(self, place: int, factors: Factors) -> None:
        addresses = factors.addresses()
        for which, shapes in enumerate(self._memory):
            for shape in shapes:
                if addresses is not None:
                    slot = self._slots[which][shape.numbers[0]]
                    units = addresses[shape.numbers, which].to(self.device) // ALIGNED
                    shape.memory[:, place] = windows(factors.resident.pool, slot, units).view(shape.memory[:, 0].shape)
                    continue
                for row, number in enumerate(shape.numbers):
                    tensor = factors.ready(self.paths[number])[which]
                    shape.memory[row, place] = tensor if which == 0 else tensor.t()

    def _shapes(self, which: int) -> list[_Shape]:
        alike: dict[tuple[int, int], list[int]] = {}
        for number, (slot, rank) in enumerate(zip(self._slots[which], self._ranks, strict=True)):
            alike.setdefault((rank, slot.nbytes // slot.dtype.itemsize // rank), []).append(number)
        return [_Shape(numbers, rank, width) for (rank, width), numbers in alike.items()]

    def _grow(self, count: int) -> None:
        if self._views[0] and count <= self._views[0][0].shape[0]:
            return
        room = max(4, count + count // 2)
        for which, shapes in enumerate(self._memory):
            self._views[which] = [torch.empty(0)] * len(self.paths)
            for shape in shapes:
                fresh = torch.empty(len(shape.numbers), room, *shape.each, dtype=self.dtype, device=self.device)
                fresh[:, : shape.memory.shape[1]] = shape.memory
                shape.memory = fresh
                for row, number in enumerate(shape.numbers):
                    self._views[which][number] = fresh[row]


class _Shape:
    """Sites whose factors have one shape."""

    def __init__(self, numbers: list[int], rank: int, width: int) -> None:
        self.numbers = numbers
        self.each = (rank, width)
        self.memory = torch.empty(len(numbers), 0, rank, width)


class LaneRows:
    """The tokens of a batch whose factors lie in one lane; a `lorry.serving.paging.updates.Part`.

    Parameters
    ----------
    lane
        Where, from the first place on.
    start
        The first of the tokens.
    weights
        Of their adapters.
    """

    def __init__(self, lane: Lane, start: int, weights: Sequence[float]) -> None:
        self.paths = lane.paths
        self._lane = lane
        self._count = len(weights)
        self._rows = slice(start, start + len(weights))
        scales = torch.stack([factors.scales for factors in lane.held])
        scales *= torch.tensor(weights, dtype=torch.float64)[:, None]
        self._scales = scales.to(lane.device, lane.dtype)[:, :, None, None].unbind(1)

    def made(self, number: int) -> Made:
        """Return what to multiply with at the site of a number."""
        return self._rows, *self._lane.factors(number, self._count), self._scales[number]
