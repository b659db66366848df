"""Runs one batch through the model, each part with its own composition of adapters."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorry.core.forward.active import Active
from lorry.core.life.state import kept_state
from lorry.core.method.layout import BatchLayout
from lorry.serving.paging.batch import Batch
from lorry.serving.paging.hooks import PagedCache, PagedModel
from lorry.serving.paging.resident import Resident
from lorry.serving.paging.store import Store

#: Names on the model with their weights; None for the bare base.
Applied = dict[str, float] | None


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
        self._last: tuple[object, Active | None, bool] | None = None

    def dropped(self, resident: Resident) -> None:
        """Let go of what was made of an adapter's tensors, which leave their pages."""
        name, last = resident.adapter.name, None if self._last is None else self._last[1]
        for active in (*resident.adapter.state.drop_composed(name), *([] if last is None else [last])):
            active.forget()

    @torch.no_grad()
    def logits(self, batch: Batch, compositions: Sequence[Applied]) -> Tensor:
        """Return the logits ``(wanted, vocabulary)`` of a batch, whose parts have these compositions."""
        root: nn.Module = self.model.model
        if root.training:
            root.eval()
        cache = PagedCache(self.store, batch)
        inputs = {"input_ids": batch.tokens, "position_ids": batch.positions}
        state = kept_state(root)
        if state is None:
            return self._wanted(cache, batch, inputs, self._picks)
        active, picks = self._active(compositions, batch.lengths)
        scope = state.enter(active)
        try:
            return self._wanted(cache, batch, inputs, picks)
        finally:
            state.leave(*scope)

    def _active(self, compositions: Sequence[Applied], lengths: tuple[int, ...]) -> tuple[Active | None, bool]:
        """Return what applies to a batch, and whether the head may be left out for all tokens but some."""
        key = (tuple(None if c is None else tuple(c.items()) for c in compositions), lengths)
        if self._last is not None and self._last[0] == key:
            return self._last[1:]
        state = kept_state(self.model.model)
        assert state is not None
        if all(each == compositions[0] for each in compositions):
            active = state.composed(compositions[0])
        else:
            active = state.rows(compositions, None, BatchLayout(len(compositions), lengths=lengths))
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
