"""What is in the base weights now: the one place that says so, and how each of it gets out again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.errors import AdapterError

#: A weight of the base: the module that holds it, and its name there.
Place = tuple[nn.Module, str]


class Exchanged:
    """A weight that was exchanged for a fused one.

    Parameters
    ----------
    holder, name
        Where.
    original
        The base's own; None if it was given up.
    fused
        What lies there from now on.
    """

    def __init__(self, holder: nn.Module, name: str, original: nn.Parameter | None, fused: nn.Parameter) -> None:
        self.holder = holder
        self.name = name
        self.original = original
        self.fused = fused
        self._version = _version(fused)
        self._place = _place(fused)
        dense = type(fused) is nn.Parameter and fused.is_floating_point() and not fused.is_meta
        self._sample = _sample(fused).clone() if dense else None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy of the model takes along; versions and addresses are others there."""
        return {**self.__dict__, "_version": self._intact}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up what a copy brought along."""
        self.__dict__.update(state)
        self._version = _version(self.fused) if state["_version"] else -1
        self._place = _place(self.fused)

    @property
    def untouched(self) -> bool:
        """Whether what was put there lies there as it was, or moved to another device or type with the model."""
        return self.holder._parameters.get(self.name) is self.fused and self._intact

    @property
    def _intact(self) -> bool:
        """Whether the fused weight itself is as it was, even if that of a later adapter lies in its place."""
        if _version(self.fused) != self._version:
            return False
        if self._sample is None or _place(self.fused) == self._place:
            return True
        return torch.equal(_sample(self.fused).cpu(), self._sample.to(self.fused.dtype).cpu())

    def put_back(self) -> None:
        """Let the original lie there again, where and as what the model is now."""
        original, fused = self.original, self.fused
        assert original is not None
        if self._sample is not None and (original.dtype, original.device) != (fused.dtype, fused.device):
            original.data = original.data.to(fused.device, fused.dtype)
        self.holder._parameters[self.name] = original


def _version(weight: Tensor) -> int:
    """Return how often a weight was changed in place; those made in inference mode do not count."""
    return 0 if weight.is_inference() else weight._version


def _place(weight: Tensor) -> tuple[object, ...]:
    return weight.dtype, weight.device, weight.data_ptr() if type(weight) is nn.Parameter else None


def _sample(weight: Tensor) -> Tensor:
    """Return a few entries from all over a weight."""
    return weight.detach()[tuple(slice(None, None, max(n // 4, 1)) for n in weight.shape)]


def changed_since(name: str, exchanged: Iterable[Exchanged]) -> AdapterError | None:
    """Return the error for weights that were changed after an adapter was fused into them, if there are any."""
    touched = [f"'{e.name}' of {type(e.holder).__name__}" for e in exchanged if not e.untouched]
    if not touched:
        return None
    return AdapterError(
        f"The base was changed after adapter '{name}' was fused into it ({len(touched)} weights, e.g. {touched[0]}: "
        "loaded anew, trained or overwritten), so the kept originals no longer belong to it. Unfuse before changing "
        "the base; or detach the adapter with detach(keep=True), which leaves the base as it is."
    )


@dataclass(frozen=True)
class Edit:
    """An adapter whose update is in the base.

    Attributes
    ----------
    name
        Of the adapter.
    weight
        With which it is there.
    undo
        Takes it out; None if that is impossible because the originals were given up.
    places
        The weights that it changed.
    exchanged
        How, where whole weights were exchanged.
    again
        Puts it in again after `undo`, where values were overwritten in place.
    """

    name: str
    weight: float
    undo: Callable[[], None] | None
    places: tuple[Place, ...]
    exchanged: tuple[Exchanged, ...] = ()
    again: Callable[[], None] | None = None


class BaseEdits:
    """All edits of a base, in the order in which they were made."""

    def __init__(self) -> None:
        self._edits: list[Edit] = []

    @property
    def names(self) -> list[str]:
        """Names of the adapters that are in the base."""
        return [e.name for e in self._edits]

    def weight(self, name: str) -> float:
        """Return the weight with which an adapter is in the base."""
        return self._of(name).weight

    def __contains__(self, name: object) -> bool:
        """Whether the adapter of this name is in the base."""
        return any(e.name == name for e in self._edits)

    def made(self, edit: Edit) -> None:
        """Note an edit that was made."""
        self._edits.append(edit)

    def undo(self, name: str) -> Edit:
        """Take an adapter out of the base.

        Raises
        ------
        AdapterError
            It is not there, another one was put into the same weights later, the originals were given up, or the
            weights were changed since.
        """
        edit = self._of(name)
        mine = {(id(holder), place) for holder, place in edit.places}
        for later in self._edits[self._edits.index(edit) + 1 :]:
            if any((id(holder), place) in mine for holder, place in later.places):
                raise AdapterError(
                    f"Adapter '{later.name}' was fused after '{name}' into the same weights; unfuse it first."
                )
        if edit.undo is None:
            raise AdapterError(
                f"Adapter '{name}' was fused with keep=False, so the original weights are gone; load the base "
                "again to have them back."
            )
        edit.undo()
        self._edits.remove(edit)
        return edit

    def kept(self, name: str) -> bool:
        """Whether an adapter can be taken out of the base again."""
        return self._of(name).undo is not None

    def forget(self, name: str) -> Edit:
        """Forget an edit without undoing it: what lies in the base is the base from now on."""
        edit = self._of(name)
        self._edits.remove(edit)
        return edit

    @contextmanager
    def bare(self, in_place: bool = True) -> Iterator[None]:
        """Let weights be the base's own for a while, so that what is derived from the base is right.

        Parameters
        ----------
        in_place
            Also those of which single values were overwritten.

        Raises
        ------
        AdapterError
            The base was changed since something was fused into it, so that nobody knows what it is.
        """
        changed: list[tuple[nn.Module, str, nn.Parameter]] = []
        for edit in self._edits:
            # of several edits of one weight the last one lies there
            error = changed_since(edit.name, [e for e in edit.exchanged if self._last(e)])
            if error is not None:
                raise error
        overwritten = [e for e in reversed(self._edits) if in_place and e.again is not None and e.undo is not None]
        for edit in overwritten:
            assert edit.undo is not None
            edit.undo()
        for edit in reversed(self._edits):
            for item in edit.exchanged:
                if item.original is not None:
                    changed.append((item.holder, item.name, item.fused))
                    item.put_back()
        try:
            yield
        finally:
            for holder, name, fused in reversed(changed):
                holder._parameters[name] = fused
            for edit in reversed(overwritten):
                assert edit.again is not None
                edit.again()

    def _last(self, item: Exchanged) -> bool:
        """Whether no later edit exchanged the same weight."""
        same = [e for edit in self._edits for e in edit.exchanged if (e.holder, e.name) == (item.holder, item.name)]
        return same[-1] is item

    def _of(self, name: str) -> Edit:
        found = next((e for e in self._edits if e.name == name), None)
        if found is None:
            raise AdapterError(f"Adapter '{name}' is not fused: nothing of it is in the base.")
        return found
