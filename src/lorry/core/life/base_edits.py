"""What is in the base weights now: the one place that says so, and how each of it gets out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from lorry.core.errors import AdapterError

#: A weight of the base: the module that holds it, and its name there.
Place = tuple[nn.Module, str]


@dataclass(frozen=True)
class Exchanged:
    """A weight that was exchanged for a merged one.

    Attributes
    ----------
    holder, name
        Where.
    original
        The base's own; None if it was given up.
    merged
        What lies there since.
    version
        Of `merged` when it was put there, by which later changes show.
    """

    holder: nn.Module
    name: str
    original: nn.Parameter | None
    merged: nn.Parameter
    version: int

    @property
    def untouched(self) -> bool:
        """Whether what was put there lies there as it was."""
        if self.holder._parameters.get(self.name) is not self.merged:
            return False
        return self.merged.is_inference() or self.merged._version == self.version


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
                    f"Adapter '{later.name}' was merged after '{name}' into the same weights; unmerge it first."
                )
        if edit.undo is None:
            raise AdapterError(
                f"Adapter '{name}' was merged with keep=False, so the original weights are gone; load the base "
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
    def bare(self) -> Iterator[None]:
        """Let weights be the base's own for a while, so that what is derived from the base is right."""
        changed: list[tuple[nn.Module, str, Tensor | None]] = []
        overwritten = [e for e in reversed(self._edits) if e.again is not None and e.undo is not None]
        for edit in overwritten:
            assert edit.undo is not None
            edit.undo()
        for edit in reversed(self._edits):
            for item in edit.exchanged:
                if item.original is not None and item.untouched:
                    changed.append((item.holder, item.name, item.holder._parameters[item.name]))
                    item.holder._parameters[item.name] = item.original
        try:
            yield
        finally:
            for holder, name, merged in reversed(changed):
                holder._parameters[name] = merged  # type: ignore[assignment]
            for edit in reversed(overwritten):
                assert edit.again is not None
                edit.again()

    def _of(self, name: str) -> Edit:
        found = next((e for e in self._edits if e.name == name), None)
        if found is None:
            raise AdapterError(f"Adapter '{name}' is not merged: nothing of it is in the base.")
        return found
