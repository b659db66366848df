"""What a merge function is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from lorry.core.method.start import mix_seed
from lorry.merging.factors import Factors, Joint


@dataclass(frozen=True)
class SiteInput:
    """The adapters to merge at one site, in the order of their names, so that the order in which they were given is
    nothing.

    Attributes
    ----------
    path
        The site; an expert's number is appended for banks.
    names
        The adapters.
    factors
        For each adapter its update with the scale folded into B, or None where it has no update here.
    weights
        For each adapter its weight at this site.
    facts
        Where a method leaves numbers for the receipt (entries kept, displacement, ...).
    """

    path: str
    shape: tuple[int, int]
    names: tuple[str, ...]
    factors: tuple[Factors | None, ...]
    weights: tuple[float, ...]
    facts: dict[str, Any] = field(default_factory=dict)

    def present(self) -> list[tuple[str, Factors, float]]:
        """Return name, factors and weight of the adapters that have an update here; at least one has."""
        rows = zip(self.names, self.factors, self.weights, strict=True)
        return [(name, f, w) for name, f, w in rows if f is not None]

    @property
    def strength(self) -> float:
        """Sum of the weights' sizes over the adapters that are present: 1 for an average."""
        return sum(abs(w) for _, _, w in self.present())

    def shares(self) -> list[float]:
        """Return ``|w| / strength`` for each adapter that is present; equal shares if all weights are 0."""
        rows, total = self.present(), self.strength
        return [abs(w) / total if total else 1 / len(rows) for _, _, w in rows]

    @cached_property
    def joint(self) -> Joint:
        """Return all present updates in one pair of orthonormal bases; worked out once for method and receipt."""
        return Joint.of([f for _, f, _ in self.present()])

    def generator(self, seed: int, name: str) -> torch.Generator:
        """Return a generator that depends on seed, site and adapter name alone."""
        return torch.Generator().manual_seed(mix_seed(seed, self.path, name))

    def ranks(self) -> list[int]:
        """Return the ranks of the adapters that are present."""
        return [f.rank for _, f, _ in self.present()]

    def reweighted(self, weights: Mapping[str, float]) -> SiteInput:
        """Return the same site with other weights by name."""
        fresh = tuple(weights[n] for n in self.names)
        return SiteInput(self.path, self.shape, self.names, self.factors, fresh, self.facts)


Candidate = Mapping[str, Factors]


@dataclass(frozen=True)
class Pool:
    """All sites of all adapters, for methods that look beyond one site.

    Attributes
    ----------
    names
        The adapters, sorted.
    paths
        All sites, in order.
    read
        Gives the input at one site; it is read from its source at each call.
    objective
        Loss of a candidate, lower is better, or None if none was given.
    extras
        Further data that a method declares in its ``needs``.
    facts
        Numbers for the receipt that belong to no single site.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    read: Callable[[str], SiteInput]
    objective: Callable[[Candidate], float] | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def sites(self) -> Iterable[SiteInput]:
        """Yield the input of each site."""
        for path in self.paths:
            yield self.read(path)
