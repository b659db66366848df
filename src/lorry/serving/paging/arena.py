"""Factors of the adapters that decode now, rank unit by rank unit, so that one product takes all of a batch.

A batch differs from the one before it by a request that ended and one that began. So the factors stay where they are
from pass to pass: only those of an adapter that is new are copied from its pages, to units that are free or that
belong to the adapter that was multiplied with longest ago. What lies here is not counted as the pool's: a copy of the
factors of the adapters that decode, and of some that did.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lorry.serving.paging.factors import Factors
from lorry.serving.paging.resident import Resident


class Arena:
    """Rows of A and of Bᵀ of many adapters, numbered by rank unit.

    Parameters
    ----------
    dtype, device
        Of the rows.

    Attributes
    ----------
    held
        The adapters, those that were used longest ago first, with the first of their units.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self.held: dict[Factors, int] = {}
        self._taken = bytearray()
        self._memory: dict[int, Tensor] = {}  # by width: (places, units, width)
        self._numbers: dict[int, dict[tuple[str, bool], int]] = {}  # by width: which of the places is whose
        self._sites: dict[str, tuple[Tensor, Tensor]] = {}

    def hold(self, wanted: Iterable[Factors]) -> None:
        """Hold the factors of these adapters, whatever has to go for it."""
        wanted = dict.fromkeys(wanted)
        for factors in wanted:
            if factors in self.held:
                self.held[factors] = self.held.pop(factors)  # it was used last now
        for factors in wanted:
            if factors not in self.held:
                self.held[factors] = first = self._room(factors.rank, wanted)
                self._taken[first : first + factors.rank] = b"\1" * factors.rank
                self._put(factors, first)

    def forget(self, resident: Resident) -> None:
        """Hold an adapter no more, if it is held."""
        for factors in [factors for factors in self.held if factors.resident is resident]:
            first = self.held.pop(factors)
            self._taken[first : first + factors.rank] = bytes(factors.rank)

    def at(self, path: str) -> tuple[Tensor, Tensor]:
        """Return A ``(units, in)`` and Bᵀ ``(units, out)`` of a site, scaled, until more is held."""
        if path not in self._sites:
            a, b = (
                self._memory[width][numbers[path, is_b]]
                for is_b in (False, True)
                for width, numbers in self._numbers.items()
                if (path, is_b) in numbers
            )
            self._sites[path] = a, b
        return self._sites[path]

    def _room(self, rank: int, wanted: Iterable[Factors]) -> int:
        """Return the first of so many units in a row that are free."""
        kept = set(wanted)
        while (first := self._taken.find(bytes(rank))) < 0:
            oldest = next((factors for factors in self.held if factors not in kept), None)
            if oldest is not None:
                self.forget(oldest.resident)
            else:
                self._taken += bytes(max(rank, len(self._taken) // 2))
        return first

    def _put(self, factors: Factors, first: int) -> None:
        for alike, values in factors.read():
            numbers = self._numbers.setdefault(alike.width, {})
            places = [numbers.setdefault(place, len(numbers)) for place in alike.places]
            memory = self._memory.get(alike.width)
            shape = (len(numbers), len(self._taken), alike.width)
            if memory is None or memory.shape != shape:
                fresh = torch.empty(shape, dtype=self.dtype, device=self.device)
                if memory is not None:
                    fresh[: memory.shape[0], : memory.shape[1]] = memory
                memory = self._memory[alike.width] = fresh
                self._sites.clear()
            if alike.scales is not None:
                values = values.to(self.dtype) * alike.scales.to(self.device, self.dtype)
            whole = places == list(range(places[0], places[0] + len(places)))
            where = slice(places[0], places[0] + len(places)) if whole else torch.tensor(places, device=self.device)
            memory[where, first : first + alike.rank] = values.to(self.dtype)
