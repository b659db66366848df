"""What is active: which adapters apply, with which weights, to which rows or tokens of a batch.

Switching puts another object in the place of the present one, so it costs the same whatever is loaded. What all layers
need to know of a batch (segments of rows or tokens) is worked out here once, not in each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lorry.core.errors import AdapterError
from lorry.core.forward.entry import Entry, Member
from lorry.core.forward.weights import BySite, Weight, at_call, varies
from lorry.core.method.context import Context, at_positions
from lorry.core.method.layout import BatchLayout, Pass, ranges
from lorry.core.sites.site import Site
from lorry.kernels.segments import Rows


@dataclass(frozen=True)
class Portion:
    """One adapter's portion of a batch.

    Attributes
    ----------
    adapter
        The adapter.
    weight
        Its weight where it is the same for all its rows.
    rows
        Which rows; None for all.
    weights
        A weight for each row of the portion, if they differ.
    kind
        The kind of tokens that it is for; None for all tokens.
    seed
        Seed of this portion's dropout for this pass; None draws from torch's global generator.
    """

    adapter: Member
    weight: Weight = 1.0
    rows: Rows = None
    weights: Tensor | None = None
    kind: int | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Term:
    """What one adapter adds in one call of a layer.

    Attributes
    ----------
    entry
        The adapter at the site.
    weight
        Its weight: a number, or a scalar tensor.
    rows
        Which of the layer's entries (or tokens); None for all.
    weights
        A further weight for each of them ``(rows,)``, or None.
    seed
        As in `Portion`.
    """

    entry: Entry
    weight: float | Tensor = 1.0
    rows: Rows = None
    weights: Tensor | None = None
    seed: int | None = None

    @property
    def constant(self) -> bool:
        """Whether no weight carries a gradient, so that fused operations may take them as numbers."""
        return isinstance(self.weight, float) and (self.weights is None or not self.weights.requires_grad)


@dataclass(frozen=True)
class Terms:
    """All terms of one call.

    Attributes
    ----------
    each
        The terms.
    tokens
        Whether their `rows` are tokens of the flattened input, and not entries of its first dimension.
    """

    each: tuple[Term, ...]
    tokens: bool

    def count(self, x: Tensor) -> int:
        """Return the number of entries (or tokens) that the layer's input has."""
        return _tokens(x) if self.tokens else x.shape[0]


class Active:
    """A composition of adapters for all rows, or one for each row or kind of token.

    Attributes
    ----------
    portions
        Each adapter's portion; rows are sorted, so that an adapter's rows are a slice wherever the batch allows it.
    layout
        How the batch lies that the composition was made for; None if it holds for any batch.
    """

    def __init__(self, portions: Sequence[Portion], layout: BatchLayout | None = None) -> None:
        self.portions = tuple(portions)
        self.layout = layout
        self.by_kind = any(p.kind is not None for p in self.portions)
        #: Whether some weight may change from call to call.
        self.varying = any(varies(p.weight) and not isinstance(p.weight, BySite) for p in self.portions)
        self.varying |= any(isinstance(p.weight, BySite) and _varies_somewhere(p.weight) for p in self.portions)
        #: What paths of the forward pass keep by site path while this composition lasts.
        self.kept: dict[tuple[str, str], Any] = {}
        #: Layers made ready with their adapter, by path; False where that is not the way.
        self.ready: dict[str, Any] = {}
        #: How the tokens of the batch lie in segments, for grouped kernels on a GPU.
        self.plans: dict[object, object] = {}
        self._terms: dict[tuple[str, int, torch.device], Terms] = {}
        self._spread: dict[tuple[int, torch.device], list[tuple[Rows, Tensor | None]]] = {}
        self._groups: dict[int, list[tuple[Tensor, Active]]] = {}

    def __getstate__(self) -> dict[str, object]:
        """Return what a copy of the model takes along: the composition, without what was worked out for it."""
        fresh: dict[str, object] = {"kept": {}, "ready": {}, "plans": {}, "_terms": {}, "_spread": {}, "_groups": {}}
        return {**self.__dict__, **fresh}

    def forget(self) -> None:
        """Let go of what was made of the adapters' tensors."""
        self.kept.clear()
        self.ready.clear()

    @cached_property
    def exclusive(self) -> bool:
        """Whether no row has more than one adapter."""
        if self.by_kind or self.layout is None:
            return not self.by_kind and len(self.portions) <= 1
        return _exclusive(self.portions, self.layout.rows)

    @property
    def members(self) -> set[str]:
        """Names of the adapters that take part."""
        return {p.adapter.name for p in self.portions}

    @property
    def rows(self) -> int | None:
        """Number of rows that the composition was made for; None if it holds for any batch."""
        return None if self.layout is None else self.layout.rows

    def without(self, adapter: Member) -> Active | None:
        """Return the composition without an adapter; None if nothing is left of one for all rows."""
        left = [p for p in self.portions if p.adapter is not adapter]
        return Active(left, self.layout) if left or self.layout is not None else None

    def fresh(self) -> Active:
        """Return the same composition without anything worked out."""
        return Active(self.portions, self.layout)

    def terms(self, site: Site, x: Tensor, context: Context, seen: Pass | None) -> Terms:
        """Return what the adapters add at `site` for the input `x`.

        Raises
        ------
        AdapterError
            The batch does not fit the rows that the composition was made for, or its layout was not stated.
        """
        if self.by_kind:
            found = self._of_kinds(site, x, context, seen)
        else:
            layout = self.layout
            if layout is None:
                factor = 0
            elif layout.lengths is not None:
                factor = _tokens(x)
            elif (counts := layout.counted(site.path)) is not None:
                factor = -sum(counts)
            else:
                factor = layout.factor(x.shape[0], f"'{site.path}'", seen)
            key = (site.path, factor, x.device)
            kept = self._terms.get(key)
            if kept is None:
                kept = self._terms[key] = self._resolve(site, x, factor)
            found = kept
        return self._weighed(found, site, x, context, seen) if self.varying else found

    def for_all_rows(self, site: Site, device: torch.device) -> Terms:
        """Return what the adapters add at a site that is run once for all rows together.

        Raises
        ------
        AdapterError
            Rows differ in what they ask for there.
        """
        terms = []
        for portion in self.portions:
            entry = portion.adapter.entries.get(site.path)
            if entry is None or portion.adapter.in_base:
                continue
            every = portion.rows is None or portion.rows == slice(0, self.rows)
            if not every or portion.weights is not None or portion.kind is not None or varies(portion.weight):
                raise AdapterError(
                    f"'{site.path}' is run once for all rows together, so they cannot have adapters of their own "
                    "there. Give all rows the same adapter with one number as weight, or leave the site out of the "
                    "adapters."
                )
            entry.move(device)
            terms.append(Term(entry, portion.weight, None, None, portion.seed))  # type: ignore[arg-type]
        return Terms(tuple(terms), False)

    def _resolve(self, site: Site, x: Tensor, factor: int) -> Terms:
        """Return the terms with the weights as they were given."""
        layout, device = self.layout, x.device
        packed = layout is not None and layout.lengths is not None
        if packed and not site.kind.positionwise:
            raise AdapterError(
                f"'{site.path}' ({site.kind.name}) mixes positions, so rows of a packed batch (lengths) cannot have "
                "adapters of their own there. Give each row a place in the first dimension, or leave the site out."
            )
        spread = self._spread.get((factor, device))
        if spread is None:
            spread = [self._placed(p, site, x, factor) for p in self.portions]
            if not (layout is not None and layout.counts):
                self._spread[factor, device] = spread
        terms = []
        for portion, (rows, weights) in zip(self.portions, spread, strict=True):
            entry = portion.adapter.entries.get(site.path)
            if entry is None or portion.adapter.in_base:
                continue
            weight = portion.weight
            while isinstance(weight, BySite):
                weight = weight.of(site)
            if isinstance(weight, float) and weight == 0.0:
                continue
            entry.move(device)
            terms.append(Term(entry, weight, rows, weights, portion.seed))  # type: ignore[arg-type]
        return Terms(tuple(terms), packed)

    def _placed(self, portion: Portion, site: Site, x: Tensor, factor: int) -> tuple[Rows, Tensor | None]:
        """Return where a portion's rows lie in the layer's input, and the weights there."""
        layout, device, weights = self.layout, x.device, portion.weights
        if layout is None:
            return None, None
        lengths = layout.lengths if layout.lengths is not None else layout.counted(site.path)
        if lengths is None:
            weights = None if weights is None else layout.spread_values(weights.to(device), factor)
            return layout.spread(portion.rows, factor, device), weights
        seen = _tokens(x) if layout.lengths is not None else x.shape[0]
        if seen != sum(lengths):
            what = "tokens" if layout.lengths is not None else "entries"
            raise AdapterError(
                f"lorry.rows was given {layout.rows} rows of {sum(lengths)} {what} in all, but '{site.path}' sees "
                f"{seen}. Lengths and counts must add up to what the module sees."
            )
        places, each = ranges(lengths, portion.rows, device)
        return places, None if weights is None else weights.to(device).repeat_interleave(each)

    def _of_kinds(self, site: Site, x: Tensor, context: Context, seen: Pass | None) -> Terms:
        """Return terms of tokens, chosen by kind and row."""
        if context.token_kinds is None:
            raise AdapterError(
                f"The composition at '{site.path}' depends on the kind of each token, but none was told; run the model "
                "inside lorry.context(model, token_kinds=...)."
            )
        kinds = at_positions(context.token_kinds.to(x.device), seen)
        tokens, length = _tokens(x), kinds.shape[1]
        entries, rest = divmod(tokens, length)
        if self.layout is not None and len(kinds) == self.layout.rows and not rest:
            kinds = self.layout.spread_values(kinds, max(entries // self.layout.entries, 1))
        if rest or len(kinds) != entries or not site.kind.positionwise:
            raise AdapterError(
                f"'{site.path}' sees {tokens} tokens, but token_kinds tells of {len(kinds)} rows of {length} "
                "positions. Adapters that depend on the kind of a token belong on layers that see these tokens; leave "
                "the site out."
            )
        flat, terms = kinds.flatten(), []
        for portion in self.portions:
            entry = portion.adapter.entries.get(site.path)
            if entry is None or portion.adapter.in_base:
                continue
            chosen = torch.ones_like(flat, dtype=torch.bool) if portion.kind is None else flat == portion.kind
            weights = None
            if self.layout is not None:
                per = tokens // self.layout.entries
                rows = self.layout.spread(portion.rows, per, x.device)
                inside = torch.zeros_like(chosen)
                inside[slice(None) if rows is None else rows] = True
                chosen &= inside
                if portion.weights is not None:
                    each = torch.zeros(tokens, dtype=portion.weights.dtype, device=x.device)
                    spread = self.layout.spread_values(portion.weights.to(x.device), per)
                    weights = each.index_put((torch.arange(tokens, device=x.device)[rows],), spread)
            index = chosen.nonzero().squeeze(1)
            weight = portion.weight
            while isinstance(weight, BySite):
                weight = weight.of(site)
            if not len(index) or (isinstance(weight, float) and weight == 0.0):
                continue
            entry.move(x.device)
            picked = None if weights is None else weights[index]
            terms.append(Term(entry, weight, index, picked, portion.seed))  # type: ignore[arg-type]
        return Terms(tuple(terms), True)

    def _weighed(self, terms: Terms, site: Site, x: Tensor, context: Context, seen: Pass | None) -> Terms:
        """Return the terms with the weights that hold in this call."""
        each = []
        for term in terms.each:
            weight = at_call(term.weight, site, context)
            if isinstance(weight, float):
                if weight:
                    each.append(replace(term, weight=weight))
                continue
            if weight.ndim == 0:
                each.append(replace(term, weight=weight))
                continue
            spread = self._of_entries(weight, terms.count(x), site, seen)
            spread = spread if term.rows is None else spread[term.rows]
            weights = spread if term.weights is None else spread * term.weights
            each.append(replace(term, weight=1.0, weights=weights))
        return Terms(tuple(each), terms.tokens)

    def _of_entries(self, weight: Tensor, count: int, site: Site, seen: Pass | None) -> Tensor:
        """Return a weight for each row as one for each entry (or token) of the layer."""
        layout = (
            self.layout if self.layout is not None and self.layout.rows == len(weight) else BatchLayout(len(weight))
        )
        if layout.lengths is not None:
            return weight.repeat_interleave(torch.tensor(layout.lengths, device=weight.device))
        per = layout.factor(count, f"'{site.path}'", seen)
        return layout.spread_values(weight, per)

    def groups(self, batch: int, what: str, seen: Pass | None) -> list[tuple[Tensor, Active]]:
        """Return the distinct compositions of a batch of `batch` entries, each with its rows and as an active set for
        all rows.

        Raises
        ------
        AdapterError
            The composition is by token, where a module takes one for whole rows only.
        """
        layout = self.layout if self.layout is not None else BatchLayout(batch)
        if self.by_kind or layout.lengths is not None:
            raise AdapterError(
                f"{what} uses its weights itself, so tokens of one row cannot have adapters of their own there. Give "
                "each row a place in the first dimension, or leave the site out."
            )
        factor = layout.factor(batch, what, seen)
        found = self._groups.get(factor)
        if found is None:
            found = self._grouped(layout, factor)
            if not self.varying and not any(p.weights is not None and p.weights.requires_grad for p in self.portions):
                self._groups[factor] = found
        return found

    def _grouped(self, layout: BatchLayout, factor: int) -> list[tuple[Tensor, Active]]:
        members: dict[tuple[Any, ...], list[int]] = {}
        parts: dict[tuple[Any, ...], list[Portion]] = {}
        weights: list[list[tuple[int, Any]]] = [[] for _ in range(layout.rows)]
        for number, portion in enumerate(self.portions):
            rows = portion.rows.cpu() if isinstance(portion.rows, Tensor) else portion.rows
            chosen = torch.arange(layout.rows)[slice(None) if rows is None else rows].tolist()
            live = portion.weights is not None and portion.weights.requires_grad
            values: list[Any] = [portion.weight] * len(chosen)
            if portion.weights is not None:
                values = list(portion.weights.unbind()) if live else portion.weights.tolist()
            for row, value in zip(chosen, values, strict=True):
                weights[row].append((number, value))
        for row, composition in enumerate(weights):
            key = tuple((n, w if isinstance(w, float) else id(w)) for n, w in composition)
            places = layout.spread(slice(row, row + 1), factor, torch.device("cpu"))
            members.setdefault(key, []).extend(torch.arange(layout.entries * factor)[places].tolist())
            parts[key] = [replace(self.portions[n], weight=w, rows=None, weights=None) for n, w in composition]
        return [(torch.tensor(entries), Active(parts[key])) for key, entries in members.items()]


def _tokens(x: Tensor) -> int:
    """Return the number of tokens of an input: of vectors if it is floating, of indices otherwise."""
    return x.numel() // x.shape[-1] if x.is_floating_point() else x.numel()


def _varies_somewhere(weight: BySite) -> bool:
    inner = (*weight.patterns.values(), weight.default)
    return any(_varies_somewhere(w) if isinstance(w, BySite) else varies(w) for w in inner)


def _exclusive(portions: Sequence[Portion], rows: int) -> bool:
    taken = torch.zeros(rows, dtype=torch.long)
    for portion in portions:
        taken[slice(None) if portion.rows is None else portion.rows] += 1
    return bool((taken <= 1).all())
