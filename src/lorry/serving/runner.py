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
from lorry.serving.paging.arena import Arena
from lorry.serving.paging.batch import Batch
from lorry.serving.paging.hooks import PagedCache, PagedModel
from lorry.serving.paging.kernels import Scratch
from lorry.serving.paging.resident import Resident
from lorry.serving.paging.store import Store
from lorry.serving.paging.updates import Stretch, computed_in, prepare
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
        self._arena = Arena(computed_in(store.shape.dtype, store.shape.device), store.shape.device)
        self._last: tuple[object, Active | None, bool] | None = None

    def forget(self) -> None:
        """Let go of what was worked out for the last batch: the base weights were changed."""
        self._last = None

    def dropped(self, resident: Resident) -> None:
        """Let go of what was made of an adapter's tensors, which leave their pages."""
        name = resident.adapter.name
        self._arena.forget(resident)
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
        return sorted(range(len(parts)), key=lambda n: (parts[n][1] > 1, _place(parts[n][0])))

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
            prepare(active, _stretches(compositions, lengths), sum(lengths), self._arena)
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


def _place(resolved: Resolved) -> tuple[tuple[int, float], ...]:
    """Return by what compositions are ordered, so that like ones come together."""
    return tuple((version.serial, weight) for version, weight in resolved)


def _stretches(compositions: Sequence[Resolved], lengths: Sequence[int]) -> list[Stretch]:
    """Return which tokens have which adapter; neighbours of one composition are one stretch."""
    found: list[Stretch] = []
    start = 0
    for resolved, parts in groupby(zip(compositions, lengths, strict=True), key=lambda part: part[0]):
        stop = start + sum(length for _, length in parts)
        found += [Stretch(start, stop, version.factors, weight) for version, weight in resolved]
        start = stop
    return found
