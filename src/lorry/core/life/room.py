"""How much room there is where adapters lie, and which of them may leave."""

from __future__ import annotations

from lorry.core.errors import AdapterError, some
from lorry.core.life.disk_folder import DiskFolder
from lorry.core.life.holding import Holding, Place
from lorry.core.life.page_pool import PagePool
from lorry.core.life.state import ModelState


class Room:
    """The limits of a placement, and what lies where.

    Attributes
    ----------
    device_bytes, host_bytes
        What adapters may take there; None without limit.
    folder
        Where adapters go that find no room in host memory.
    holdings
        The adapters by name.
    """

    def __init__(self, state: ModelState) -> None:
        self.state = state
        self.device_bytes: int | None = None
        self.host_bytes: int | None = None
        self.folder: DiskFolder | None = None
        self.holdings: dict[str, Holding] = {}

    def used(self, where: Place) -> int:
        """Return how many bytes all adapters take in a place."""
        return sum(h.size for h in self.holdings.values() if h.place == where)

    def short(self, where: Place, holding: Holding | None) -> int:
        """Return how much is missing in a place: bytes, or pages of a pool."""
        own = 0 if holding is None or holding.place == where else amount(holding, where)
        if isinstance(where, PagePool):
            return own - where.free
        limit = {"device": self.device_bytes, "host": self.host_bytes}[where]
        return 0 if limit is None else self.used(where) + own - limit

    def candidates(self, where: Place, but: Holding | None, here: bool) -> list[Holding]:
        """Return what may leave a place, first what applies nowhere, then what was needed long ago."""
        busy = self.busy(here)
        active = {name for runtime in self.state.runtimes.every() for a in runtime.actives() for name in a.members}
        found = [
            h
            for name, h in self.holdings.items()
            if h.place == where and h is not but and name not in busy and self.held_by(h) is None
        ]
        return sorted(found, key=lambda h: (h.adapter.name in active, h.used))

    def busy(self, here: bool = False) -> set[str]:
        """Return the adapters that passes under way compute with; those that compiled graphs serve, too."""
        names: set[str] = set()
        current = self.state.runtimes.current()
        for runtime in self.state.runtimes.every():
            if runtime.passing is not None or self.state.compiled or (here and runtime is current):
                for active in (runtime.active, runtime.inside):
                    names |= set() if active is None else active.members
        for name in list(names):
            adapter = self.state.adapters.get(name)
            for entry in () if adapter is None else adapter.entries.values():
                names |= set(entry.method.members)
        return names

    def held_by(self, holding: Holding) -> str | None:
        """Return why an adapter cannot leave, if so."""
        if holding.trained:
            return "is in training; freeze it by adapter.train(False) first"
        if holding.adapter.in_base:
            return "is in the base weights; unfuse it first"
        return "is pinned; unpin it first" if holding.pins else None

    def check_free(self, holding: Holding, *, upwards: bool = False) -> None:
        """Raise `AdapterError` if an adapter cannot be moved; nothing but its limits stops one that is brought up."""
        reason = self.held_by(holding)
        lies_above = holding.place == "device" or isinstance(holding.place, PagePool)
        if reason is None and lies_above and holding.adapter.name in self.busy():
            compiled = "is active on a compiled model; activate another one first"
            reason = compiled if self.state.compiled else "takes part in a pass under way; wait until that has ended"
        if reason is not None and (lies_above or not upwards):
            raise AdapterError(f"Adapter '{holding.adapter.name}' cannot be moved, because it {reason}.")

    def check_device(self, holding: Holding, pool: PagePool) -> None:
        """Raise `AdapterError` unless an adapter computes where the pool lies."""
        wrong = next((e.site for e in holding.adapter.entries.values() if e.site.device != pool.device), None)
        if wrong is not None:
            raise AdapterError(
                f"The pool lies on {pool.device}, but '{wrong.path}' computes on {wrong.device}. Make a pool on that "
                "device; an adapter over several devices cannot lie in one pool."
            )

    def no_room(self, holding: Holding, where: Place) -> AdapterError:
        """Return the error for an adapter that does not fit."""
        name, there = holding.adapter.name, [n for n, h in self.holdings.items() if h.place == where]
        staying = [n for n in there if self.held_by(self.holdings[n]) is not None or n in self.busy()]
        if isinstance(where, PagePool):
            need, limit = f"{holding.pages(where)} pages", f"{where.pages} pages, of which {where.free} are free"
        else:
            need, limit = f"{holding.size:,} bytes", f"{self.device_bytes if where == 'device' else self.host_bytes:,}"
        what = "the pool" if isinstance(where, PagePool) else where
        return AdapterError(
            f"There is no room for adapter '{name}' on {what}: it needs {need}, the limit is {limit}"
            + (f", and {some(staying)} cannot leave" if staying else "")
            + ". Raise the limit, unpin or detach adapters"
            + ("." if self.folder is not None else ", or give lorry.placement a folder for what is evicted.")
        )


def amount(holding: Holding, where: Place) -> int:
    """Return what an adapter takes in a place: bytes, or pages of a pool."""
    return holding.pages(where) if isinstance(where, PagePool) else holding.size
