"""Runs one batch through the model, each part with its own composition of adapters."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from lorry.core.forward.active import Active
from lorry.core.life.state import ModelState, kept_state
from lorry.core.method.layout import BatchLayout
from lorry.serving.paging.batch import Batch
from lorry.serving.paging.hooks import PagedCache, PagedModel
from lorry.serving.paging.kernels import Scratch
from lorry.serving.paging.lanes import Lane, LaneRows
from lorry.serving.paging.resident import Resident
from lorry.serving.paging.store import Store
from lorry.serving.paging.updates import LONG, Stretch, computed_in, prepare
from lorry.serving.served import Resolved


class Runner:
    """A model over pages, with adapters.

    Parameters
    ----------
    model
        As for `PagedModel`.
    store
        Where keys and values lie.
    """

    def __init__(self, model: PagedModel, store: Store) -> None:
        self.model = model
        self.store = store
        root = model.model
        self._picks = "logits_to_keep" in inspect.signature(type(root).forward).parameters
        head = root.get_output_embeddings()  # type: ignore[operator]
        self._head = next((path for path, module in root.named_modules() if module is head), "")
        self._scratch = Scratch()
        self._dtype = computed_in(store.shape.dtype, store.shape.device)
        self._lanes: dict[int, Lane] = {}
        self._laned: list[tuple[Lane, int, int]] = []  # the lanes of the batch, with their first row and their rows
        self._last: tuple[object, Active | None, bool] | None = None

    def forget(self) -> None:
        """Let go of what was worked out for the last batch: the base weights were changed."""
        self._last = None

    def dropped(self, resident: Resident) -> None:
        """Let go of what was made of an adapter's tensors, which leave their pages."""
        name = resident.adapter.name
        for active in resident.adapter.state.drop_composed(name):
            active.forget()
        if self._last is not None and self._last[1] is not None and name in self._last[1].members:
            self._last[1].forget()
            self._last = None

    def arranged(self, parts: Sequence[tuple[Resolved, int]]) -> list[int]:
        """Return the order in which parts of a batch are to come: what is multiplied together lies side by side.

        Parameters
        ----------
        parts
            Composition and tokens of each.
        """
        order = sorted(range(len(parts)), key=lambda n: (parts[n][1] > 1, _place(parts[n][0])))
        self._laned = []
        laned: dict[int, list[int]] = {}
        if len({resolved for resolved, _ in parts}) > 1:
            singles = [n for n in order if parts[n][1] == 1 and len(parts[n][0]) == 1]
            for _, alike in groupby(singles, key=lambda n: parts[n][0]):
                rows = list(alike)
                factors = parts[rows[0]][0][0][0].factors
                if len(rows) < LONG and not factors.large and factors.sites:
                    laned.setdefault(factors.number, []).extend(rows)
        kept = {n for rows in laned.values() if len(rows) > 1 for n in rows}
        found = [n for n in order if n not in kept and parts[n][1] == 1]  # one token each, so rows are tokens
        for number, rows in laned.items():
            if len(rows) > 1:
                wanted = [parts[n][0][0][0].factors for n in rows]
                lane = self._lanes.get(number)
                if lane is None:
                    lane = self._lanes[number] = Lane(wanted[0], self._dtype)
                before = lane.held
                places = lane.settle(wanted)
                if lane.held != before:
                    self._last = None
                self._laned.append((lane, len(found), len(rows)))
                found += [rows[place] for place in places]
        return found + [n for n in order if parts[n][1] > 1]

    @torch.no_grad()
    def logits(self, batch: Batch, compositions: Sequence[Resolved]) -> Tensor:
        """Return the logits ``(wanted, vocabulary)`` of a batch, whose parts have these compositions."""
        root: nn.Module = self.model.model
        if root.training:
            root.eval()
        cache = PagedCache(self.store, batch, self._scratch)
        inputs = {"input_ids": batch.tokens, "position_ids": batch.positions}
        state = kept_state(root)
        if state is None:
            return self._wanted(cache, batch, inputs, self._picks)
        active, picks = self._active(state, compositions, batch.lengths)
        scope = state.enter(active)
        try:
            return self._wanted(cache, batch, inputs, picks)
        finally:
            state.leave(*scope)

    def _active(
        self, state: ModelState, compositions: Sequence[Resolved], lengths: tuple[int, ...]
    ) -> tuple[Active | None, bool]:
        """Return what applies to a batch, and whether the head may be left out for all tokens but some."""
        key = (tuple(compositions), lengths)
        if self._last is not None and self._last[0] == key:
            return self._last[1:]
        first = compositions[0]
        if all(each == first for each in compositions):
            active = state.composed(_named(first))
        else:
            layout = BatchLayout(len(compositions), lengths=lengths)
            active = state.rows([_named(each) for each in compositions], None, layout)
            rows = [(LaneRows(lane, start, [compositions[start + n][0][1] for n in range(count)]), start, count)
                    for lane, start, count in self._laned]  # fmt: skip
            apart = {n for _, start, count in rows for n in range(start, start + count)}
            odd = {path for lane, _, _ in self._laned for factors in lane.held for path in factors.odd}
            stretches = _stretches(compositions, lengths, apart)
            prepare(active, stretches, sum(lengths), self._dtype, [part for part, _, _ in rows], odd)
        portions = () if active is None else active.portions
        on_head = active is not None and active.layout is not None
        picks = self._picks and not (on_head and any(self._head in p.adapter.entries for p in portions))
        self._last = (key, active, picks)
        return active, picks

    def _wanted(self, cache: PagedCache, batch: Batch, inputs: dict[str, Tensor], picks: bool) -> Tensor:
        if picks:
            found: Tensor = self.model(cache, **inputs, logits_to_keep=batch.wanted).logits[0]
            return found
        every: Tensor = self.model(cache, **inputs).logits[0]
        return every.index_select(0, batch.wanted)


def _named(resolved: Resolved) -> dict[str, float] | None:
    return {version.adapter.name: weight for version, weight in resolved} or None


def _place(resolved: Resolved) -> tuple[tuple[int, int, float], ...]:
    """Return by what compositions are ordered, so that like ones come together."""
    return tuple((version.factors.number, version.serial, weight) for version, weight in resolved)


def _stretches(compositions: Sequence[Resolved], lengths: Sequence[int], apart: set[int]) -> list[Stretch]:
    """Return which tokens have which adapter, of all parts but some; neighbours of one composition are one stretch."""
    found: list[Stretch] = []
    start = 0
    for (resolved, left_out), parts in groupby(
        enumerate(zip(compositions, lengths, strict=True)), key=lambda each: (each[1][0], each[0] in apart)
    ):
        stop = start + sum(length for _, (_, length) in parts)
        if not left_out:
            found += [Stretch(start, stop, version.factors, weight) for version, weight in resolved]
        start = stop
    return found
