"""The adapters that requests may name: loaded while requests run, each version kept until its last request ends."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from lorry.core.errors import AdapterError, OptionError, near_misses, some
from lorry.core.life.adapter import Adapter
from lorry.core.life.api import adapters as attached
from lorry.core.receipt import Receipt
from lorry.formats.file import AdapterFile
from lorry.formats.load import load
from lorry.formats.reader import open_adapter
from lorry.serving.heap import Heap
from lorry.serving.paging.factors import Factors
from lorry.serving.paging.pool import Pool
from lorry.serving.paging.resident import Resident
from lorry.serving.paging.shelf import Shelf
from lorry.serving.results import Served

#: Versions with their weights, in the order of their serial numbers: what pages of keys and values belong to.
Resolved = tuple[tuple["Version", float], ...]


@dataclass(eq=False)
class Version:
    """One adapter as it was loaded under a name.

    Attributes
    ----------
    name, number
        The name that requests use, and how often it was loaded.
    adapter
        On the model, under a name of its own.
    resident
        Keeps its tensors.
    serial
        Unique among all versions.
    path, pinned
        As in `Served`.
    users
        Requests that use it.
    retired
        Whether another one has its name now, or none.
    """

    name: str
    number: int
    adapter: Adapter
    resident: Resident
    serial: int
    path: Path | None = None
    pinned: bool = False
    users: int = 0
    retired: bool = False
    #: Whether tokens of one batch may have it beside others.
    by_token: bool = field(init=False)
    rank: int = field(init=False)
    #: Its plain updates, for batches in which it lies beside others.
    factors: Factors = field(init=False)

    def __post_init__(self) -> None:
        """Look at its sites once."""
        kinds = {entry.site.kind for entry in self.adapter.entries.values()}
        self.by_token = all(kind.additive and kind.positionwise for kind in kinds)
        self.factors = Factors(self.resident)
        ranks = (getattr(entry.method, "rank", 0) for entry in self.adapter.entries.values())
        self.rank = max((rank for rank in ranks if isinstance(rank, int)), default=0)


def check_positions(model: nn.Module) -> None:
    """Raise `OptionError` if a token's rotary angles depend on the longest position of its batch.

    transformers recomputes the frequencies of ``dynamic`` and ``longrope`` scaling from the positions of the whole
    batch, so that a request would depend on its company, and its pages on that in which they were written.
    """
    for path, module in model.named_modules():
        given = getattr(module, "rope_type", None)
        for kind in given.values() if isinstance(given, Mapping) else [given]:
            if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
                raise OptionError(
                    f"The engine serves models whose rotary angles depend on a token's own position alone; '{path}' "
                    f"scales them as '{kind}', by the longest position of a batch. Load the model with another "
                    "rope_type in its config's rope_parameters, such as 'default', 'linear', 'yarn' or 'llama3'."
                )


class Catalogue:
    """Names of adapters and the versions behind them.

    Methods may be called from any thread; those that change the model wait for `passes`, which is held while it runs.

    Parameters
    ----------
    model
        Adapters that it carries already can be named from the start.
    passes
        Held while the model runs.
    pool, shelf
        Where adapters lie.
    """

    def __init__(self, model: nn.Module, passes: threading.RLock, pool: Pool, shelf: Shelf) -> None:
        self.model = model
        self.pool = pool
        self.shelf = shelf
        self._passes = passes
        self._lock = threading.RLock()
        self._heap = Heap()
        check_positions(model)
        self._serial = itertools.count(1)
        self._numbers: dict[str, int] = {}
        self._current: dict[str, Version] = {}
        self._retired: list[Version] = []
        for name, adapter in attached(model).items():
            if adapter.in_base:
                raise AdapterError(f"Adapter '{name}' is in the base weights. Unfuse it before the model is served.")
            adapter.train(False)
            self._add(Version(name, 1, adapter, pool.adopt(adapter), next(self._serial)))

    def load(self, name: str, source: Path | str | AdapterFile, pinned: bool = False) -> Receipt:
        """Load an adapter under a name; see `Engine.load`."""
        file = source if isinstance(source, AdapterFile) else open_adapter(source)
        try:
            file.read_all()  # outside of the lock: passes go on meanwhile
            with self._passes, self._lock:
                serial = next(self._serial)
                adapter = load(self.model, file, name=f"{name[:100]}.{serial}", activate=False)
                try:
                    self._add(self._version(name, adapter, serial, file.path, pinned))
                except BaseException:
                    adapter.detach()
                    raise
        finally:
            if file is not source:
                file.close()
        receipt = adapter.receipt
        assert receipt is not None
        self._heap.tidy()  # passes and requests go on meanwhile
        return receipt

    def _version(self, name: str, adapter: Adapter, serial: int, path: Path | None, pinned: bool) -> Version:
        resident = self.pool.adopt(adapter)
        if pinned:
            self.pool.pin(resident)
        return Version(name, self._numbers.get(name, 0) + 1, adapter, resident, serial, path, pinned)

    def unload(self, name: str) -> None:
        """Let a name be known no more; see `Engine.unload`."""
        with self._passes, self._lock:
            self._retire(self._of(name))
            del self._current[name]
        self._heap.tidy()

    def acquire(self, composition: Mapping[str, float]) -> Resolved:
        """Return the present versions of a composition's adapters, in use from now on.

        Raises
        ------
        AdapterError
            An unknown name.
        OptionError
            A weight that is no finite number.
        """
        with self._lock:
            found: dict[str, float] = {}
            for name, weight in composition.items():
                if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                    raise OptionError(f"The weight of adapter '{name}' must be a finite number, found {weight!r}.")
                self._of(name)
                if weight:
                    found[name] = float(weight)
            versions = sorted(((self._current[n], w) for n, w in found.items()), key=lambda pair: pair[0].serial)
            for version, _ in versions:
                version.users += 1
            return tuple(versions)

    def give_back(self, resolved: Resolved) -> None:
        """Take note that a request uses its versions no more."""
        with self._passes, self._lock:
            for version, _ in resolved:
                version.users -= 1
                if version.retired and not version.users:
                    self._drop(version)

    def list(self) -> list[Served]:
        """Return all adapters that can be named, by name, and versions that only requests under way still use."""
        with self._lock:
            versions = sorted([*self._current.values(), *self._retired], key=lambda v: (v.name, v.number))
            return [self._served(version) for version in versions]

    def _served(self, version: Version) -> Served:
        size, place = version.resident.nbytes, version.resident.place
        return Served(
            version.name, version.number, version.path, version.rank, size, place, version.users, version.pinned
        )

    def _of(self, name: str) -> Version:
        found = self._current.get(name)
        if found is None:
            loaded = some(self._current, 6) if self._current else "none"
            raise AdapterError(
                f"No adapter '{name}' is served.{near_misses(name, self._current)} Loaded: {loaded}. Load it first, or "
                "ask for the base."
            )
        return found

    def _add(self, version: Version) -> None:
        before = self._current.get(version.name)
        if before is not None:
            self._retire(before)
        self._numbers[version.name] = version.number
        self._current[version.name] = version
        self.shelf.keep(version.resident)

    def close(self) -> None:
        """Give all adapters their tensors back; they stay on the model under their names there."""
        with self._passes, self._lock:
            for version in (*self._current.values(), *self._retired):
                self.pool.drop(version.resident)
                version.resident.take_back()
                self.shelf.forget(version.resident)

    def _retire(self, version: Version) -> None:
        version.retired = True
        if version.users:
            self._retired.append(version)
        else:
            self._drop(version)

    def _drop(self, version: Version) -> None:
        if version in self._retired:
            self._retired.remove(version)
        self.pool.drop(version.resident)
        self.shelf.forget(version.resident)
        version.adapter.detach()
        version.resident.remove()
        self._heap.left()
