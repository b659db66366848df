"""The active set: which adapters apply, with which weights, to which rows of a batch.

There is one for each model, and layers read it by reference. Switching puts another object in its place, so it costs
the same whatever is loaded. What all layers need to know of a batch (segments of rows) is worked out here once, not in
each layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorry.core.errors import AdapterError
from lorry.core.forward.entry import Entry
from lorry.core.sites.site import Site
from lorry.kernels.gathered import Stacked
from lorry.kernels.segments import Rows

if TYPE_CHECKING:
    from lorry.core.forward.compiled import Packed
    from lorry.core.life.adapter import Adapter

Composition = Mapping[str, float]


@dataclass(frozen=True)
class Part:
    """One adapter's share of a batch.

    Attributes
    ----------
    adapter
        The adapter.
    weight
        Its weight where it is the same for all its rows.
    rows
        Which rows; None for all.
    weights
        A weight for each row of the part, if they differ.
    seed
        Seed of this part's dropout for this pass; None draws from torch's global generator.
    """

    adapter: Adapter
    weight: float = 1.0
    rows: Rows = None
    weights: Tensor | None = None
    seed: int | None = None

    def count(self, total: int) -> int:
        """Return the number of rows, of `total` in the batch."""
        if self.rows is None:
            return total
        return self.rows.stop - self.rows.start if isinstance(self.rows, slice) else len(self.rows)

    def spread(self, factor: int, device: torch.device) -> Part:
        """Return the part for layers that see `factor` entries for each row (flattened tokens, beams)."""
        rows, weights = self.rows, self.weights
        if isinstance(rows, slice):
            rows = slice(rows.start * factor, rows.stop * factor)
        elif rows is not None:
            rows = rows.to(device)
            if factor > 1:
                rows = (rows[:, None] * factor + torch.arange(factor, device=device)).reshape(-1)
        if weights is not None:
            weights = weights.to(device).repeat_interleave(factor)
        return Part(self.adapter, self.weight, rows, weights, self.seed)


class Active:
    """A composition of adapters for all rows, or one for each row.

    Attributes
    ----------
    parts
        Each adapter's share; rows are sorted, so that an adapter's rows are a slice wherever the batch allows it.
    rows
        Number of rows that the composition was made for; None if it holds for any batch.
    """

    def __init__(self, parts: Sequence[Part], rows: int | None = None) -> None:
        self.parts = tuple(parts)
        self.rows = rows
        self._spread: dict[tuple[int, torch.device], tuple[Part, ...]] = {}
        self._terms: dict[tuple[str, int, torch.device], tuple[tuple[Entry, Part], ...]] = {}
        #: Whether no row has more than one adapter.
        self.exclusive = len(self.parts) == 1 if rows is None else _exclusive(self.parts, rows)
        #: Stacked factors of frozen adapters by site path, kept while this composition lasts.
        self.stacks: dict[str, Stacked] = {}
        #: How the tokens of the batch lie in segments, for grouped kernels on a GPU.
        self.plans: dict[object, object] = {}
        self._groups: dict[int, list[tuple[Tensor, Active]]] = {}
        #: The form for compiled graphs by site path; None if some adapter has none (then its own code is traced).
        self.packed: dict[str, Packed] | None = None

    def __getstate__(self) -> dict[str, object]:
        """Return what a copy of the model takes along: the composition, without what was worked out for it."""
        return {**self.__dict__, "_spread": {}, "_terms": {}, "_groups": {}, "stacks": {}, "plans": {}, "packed": None}

    def terms(self, site: Site, batch: int, device: torch.device) -> tuple[tuple[Entry, Part], ...]:
        """Return the adapters that act at `site`, each with its rows of a batch of `batch` entries.

        Raises
        ------
        AdapterError
            The batch is not a multiple of the number of rows that the composition was made for.
        """
        if self.rows is None:
            key = (site.path, 0, device)
        else:
            key = (site.path, self._factor(batch, f"'{site.path}'"), device)
        found = self._terms.get(key)
        if found is None:
            found = self._terms[key] = self._resolve(site, key[1], device)
        return found

    def _factor(self, batch: int, what: str) -> int:
        """Return how many entries of a module's batch there are for each row."""
        factor, rest = divmod(batch, self.rows or batch)
        if rest or not factor:
            raise AdapterError(
                f"lorry.rows was given {self.rows} rows, but {what} sees a batch of {batch}. Give one composition for "
                "each row of the batch."
            )
        return factor

    def _resolve(self, site: Site, factor: int, device: torch.device) -> tuple[tuple[Entry, Part], ...]:
        parts = self.parts
        if factor:
            spread = self._spread.get((factor, device))
            if spread is None:
                spread = tuple(p.spread(factor, device) for p in parts)
                self._spread[factor, device] = spread
            parts = spread
        found = []
        for part in parts:
            entry = part.adapter.entries.get(site.path)
            if entry is not None and not part.adapter.merged:
                entry.move(device)
                found.append((entry, part))
        return tuple(found)

    def groups(self, batch: int) -> list[tuple[Tensor, Active]]:
        """Return the distinct compositions of a batch of `batch` entries, each with its rows and as an active set for
        all rows.
        """
        rows = self.rows or batch
        factor = self._factor(batch, "a module whose weights are exchanged")
        if factor not in self._groups:
            members: dict[tuple[tuple[int, float], ...], list[int]] = {}
            weights: list[list[tuple[int, float]]] = [[] for _ in range(rows)]
            for number, part in enumerate(self.parts):
                chosen = torch.arange(rows)[slice(None) if part.rows is None else part.rows].tolist()
                values = [part.weight] * len(chosen) if part.weights is None else part.weights.tolist()
                for row, value in zip(chosen, values, strict=True):
                    weights[row].append((number, value))
            for row, composition in enumerate(weights):
                members.setdefault(tuple(composition), []).extend(range(row * factor, (row + 1) * factor))
            self._groups[factor] = [
                (
                    torch.tensor(chosen),
                    Active([Part(self.parts[n].adapter, w, seed=self.parts[n].seed) for n, w in key]),
                )
                for key, chosen in members.items()
            ]
        return self._groups[factor]


def _exclusive(parts: Sequence[Part], rows: int) -> bool:
    taken = torch.zeros(rows, dtype=torch.long)
    for part in parts:
        taken[slice(None) if part.rows is None else part.rows] += 1
    return bool((taken <= 1).all())


def compose(composition: str | Composition | None, adapters: Mapping[str, Adapter]) -> dict[str, float]:
    """Return a composition as ``{name: weight}`` with weight-0 members left out.

    Raises
    ------
    AdapterError
        A name that is not loaded (with near misses), or a weight that is not a finite number.
    """
    if composition is None:
        return {}
    if isinstance(composition, str):
        composition = {composition: 1.0}
    weights = {}
    for name, weight in composition.items():
        if name not in adapters:
            raise unknown_adapter(name, adapters)
        if (
            isinstance(weight, bool)
            or not isinstance(weight, int | float)
            or weight != weight
            or abs(weight) == float("inf")
        ):
            raise AdapterError(f"The weight of adapter '{name}' must be a finite number, found {weight!r}.")
        if weight:
            weights[name] = float(weight)
    return weights


def unknown_adapter(name: str, adapters: Mapping[str, Adapter]) -> AdapterError:
    """Return the error for a name that is not loaded."""
    from lorry.core.errors import near_misses, some

    loaded = some(adapters, 6) if adapters else "none"
    return AdapterError(f"No adapter '{name}' is loaded on this model.{near_misses(name, adapters)} Loaded: {loaded}.")


def for_rows(
    compositions: Sequence[str | Composition | None],
    adapters: Mapping[str, Adapter],
    seeds: Mapping[str, int] | None = None,
) -> Active:
    """Return the active set in which each row has its own composition."""
    members: dict[str, list[tuple[int, float]]] = {}
    for row, composition in enumerate(compositions):
        for name, weight in compose(composition, adapters).items():
            members.setdefault(name, []).append((row, weight))
    parts = []
    for name, pairs in members.items():
        indices, weights = [r for r, _ in pairs], {w for _, w in pairs}
        first, last = indices[0], indices[-1]
        contiguous = last - first + 1 == len(indices)
        rows: Rows = slice(first, last + 1) if contiguous else torch.tensor(indices)
        single = weights.pop() if len(weights) == 1 else None
        spread = None if single is not None else torch.tensor([w for _, w in pairs])
        seed = None if seeds is None else seeds.get(name)
        parts.append(Part(adapters[name], 1.0 if single is None else single, rows, spread, seed))
    return Active(parts, len(compositions))
