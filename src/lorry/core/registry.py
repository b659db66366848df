"""One registry for all that is found by name: methods, merges, formats, claims, benches, optimizers, schedules.

A thing registers itself in a file of its own; no list names it. The files of a package are imported at the first
look-up, so that a registry costs nothing until somebody asks.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from lorry.core.errors import LorryError, OptionError, near_misses

T = TypeVar("T")
C = TypeVar("C")
_FIRST: list[str] = []
_FOR: dict[str, list[str]] = {}


def import_first(module: str) -> None:
    """Import `module` before the first look-up in any registry, since what it imports registers things or sources."""
    _FIRST.append(module)


def import_for(what: str, module: str) -> None:
    """Import `module` before the first look-up in the registry of this sort, since it registers something there."""
    _FOR.setdefault(what, []).append(module)


class Registry(Mapping[str, T], Generic[T]):
    """Things of one sort by name, in the order of their names.

    Parameters
    ----------
    what
        What the things are called in errors, e.g. ``method``.
    hint
        A sentence on where the names are listed, for errors.
    error
        The error that an unknown name raises.
    """

    def __init__(self, what: str, hint: str = "", error: type[LorryError] = OptionError) -> None:
        self.what = what
        self.hint = hint
        self.error = error
        self._items: dict[str, T] = {}
        self._sources: list[tuple[str, Iterable[str]]] = []

    def source(self, package: str, path: Iterable[str]) -> None:
        """Import the modules of `package` (its ``__name__`` and ``__path__``) at the first look-up; they register."""
        self._sources.append((package, path))

    def add(self, name: str, item: T) -> T:
        """Register `item`; the same definition may come twice (a module that is run and imported).

        Raises
        ------
        LorryError
            Another thing has the name.
        """
        found = self._items.get(name)
        if found is not None and _origin(found) != _origin(item):
            raise self.error(f"Two {self.what}s are called '{name}': {_origin(found)} and {_origin(item)}.")
        self._items[name] = item
        return item

    def named(self, name: str, **more: Any) -> Callable[[C], C]:
        """Return a decorator that gives a class its ``name``, and other attributes, and registers it."""

        def add(cls: C) -> C:
            for attribute, value in {"name": name, **more}.items():
                setattr(cls, attribute, value)
            self.add(name, cls)  # type: ignore[arg-type]  # each registry's own decorator says what it takes
            return cls

        return add

    def discover(self) -> None:
        """Import what has not been imported yet."""
        while _FIRST:
            importlib.import_module(_FIRST.pop())
        while _FOR.get(self.what):
            importlib.import_module(_FOR[self.what].pop())
        while self._sources:
            package, path = self._sources.pop()
            for module in pkgutil.iter_modules(path):
                if not module.ispkg:
                    importlib.import_module(f"{package}.{module.name}")

    def find(self, name: str, also: Iterable[str] = ()) -> T:
        """Return the thing of this name; `also` are names that near misses may propose besides.

        Raises
        ------
        LorryError
            There is none, with near misses.
        """
        self.discover()
        if name not in self._items:
            names = [*self, *also]
            hint = f" {self.hint}" if self.hint else f" There are: {', '.join(names) or 'none'}."
            raise self.error(f"There is no {self.what} '{name}'.{near_misses(str(name), names)}{hint}")
        return self._items[name]

    def __getitem__(self, name: str) -> T:
        """Return the thing of this name; `KeyError` if there is none."""
        self.discover()
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        """Yield the names in alphabetical order."""
        self.discover()
        return iter(sorted(self._items))

    def __len__(self) -> int:
        """Return the number of things."""
        self.discover()
        return len(self._items)


def _origin(item: object) -> str:
    """Return where a thing was defined, as text; of plain data, which is defined nowhere, what it says."""
    cls = getattr(item, "cls", None)
    item = cls if isinstance(cls, type) else item
    return f"{item.__module__}.{item.__qualname__}" if hasattr(item, "__qualname__") else repr(item)
