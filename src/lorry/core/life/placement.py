"""Where the tensors of a model's adapters lie: on its device, in host memory, on disk, or in pages of a pool.

A model may carry thousands of adapters of which a few are needed at a time. Wherever an adapter lies, it works, and
gives the same bits: when a layer asks for its tensors they are brought to the device, those that were not needed for
longest make room, and where there is no room the tensors of one site at a time are lent. Nothing else in Lorry has to
know.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from lorry.core.errors import AdapterError, CheckpointError, OptionError
from lorry.core.forward.active import Active
from lorry.core.forward.compose import unknown_adapter
from lorry.core.forward.entry import Member, TensorHome
from lorry.core.life.adapter import Adapter
from lorry.core.life.disk_folder import DiskFolder
from lorry.core.life.holding import Holding, Place, Statistics, streamed
from lorry.core.life.images import Image
from lorry.core.life.page_pool import PagePool
from lorry.core.life.room import Room, amount
from lorry.core.life.state import ModelState, keep_state, open_state


class _Same(Enum):
    SAME = "as before"


class Pin:
    """What `Placement.pin` returns; in a ``with`` statement the adapter is pinned until the block ends."""

    def __init__(self, placement: Placement, holding: Holding) -> None:
        self._placement = placement
        self._holding = holding

    def __enter__(self) -> None:
        """Nothing more to do."""

    def __exit__(self, *error: object) -> None:
        """Take the pin away, unless the adapter was detached or all its pins were taken away."""
        with self._placement.lock:
            self._holding.pins = max(self._holding.pins - 1, 0)


class Placement:
    """Where the tensors of a model's adapters lie. See `placement`.

    Attributes
    ----------
    room
        Limits, and what lies where. Adapters in training, or in the base, count but never leave the device.
    statistics
        What was done so far.
    """

    def __init__(self, state: ModelState) -> None:
        self.room = Room(state)
        self.statistics = Statistics()
        self.lock = threading.RLock()
        self._state = state
        self._side: ThreadPoolExecutor | None = None
        for adapter in state.adapters.values():
            self._hold(adapter)

    # -- what a user asks for

    def place(self, name: str, where: Place) -> None:
        """Put an adapter somewhere; others make room for it there.

        When it is needed it is brought to the model's device, or to the pool in which it was placed last.

        Parameters
        ----------
        name
            Of the adapter.
        where
            ``"device"`` (that of the model), ``"host"``, ``"disk"``, or a `PagePool` on the model's device.

        Raises
        ------
        AdapterError
            An unknown name; the adapter is pinned, in training, in the base or in a pass under way; no room, or no
            folder.
        CheckpointError
            The disk refuses, or the file of the adapter is damaged.
        """
        with self.lock:
            holding = self._of(name)
            if not isinstance(where, PagePool) and where not in ("device", "host", "disk"):
                raise OptionError(
                    f"An adapter is placed on 'device', 'host', 'disk' or in a PagePool, found {where!r}."
                )
            if holding.place == where:
                return
            self.room.check_free(holding, upwards=where == "device" or isinstance(where, PagePool))
            if isinstance(where, PagePool):
                self.room.check_device(holding, where)
            if where == "disk" and self.room.folder is None:
                raise AdapterError(_NO_FOLDER)
            if where != "disk" and not self._make_room(where, holding):
                raise self.room.no_room(holding, where)
            self._move(holding, where)
            if where == "device" or isinstance(where, PagePool):
                holding.top = where

    def where(self, name: str) -> Place:
        """Return ``"device"``, ``"host"``, ``"disk"`` or the pool in which an adapter lies."""
        return self._of(name).place

    def nbytes(self, name: str) -> int:
        """Return how many bytes an adapter takes, each of its tensors beginning at a multiple of 64."""
        with self.lock:
            return self._of(name).size

    def used(self, where: Place) -> int:
        """Return how many bytes all adapters take somewhere."""
        with self.lock:
            return self.room.used(where)

    def pages(self, name: str) -> dict[str, tuple[tuple[int, ...], int]]:
        """Return where the tensors of an adapter lie in its pool, for kernels that read by page number.

        Pin the adapter while such a kernel may run.

        Returns
        -------
        dict
            ``PATH.TENSOR`` -> the pages in order, and the tensor's first byte in the first of them; a tensor that is
            larger than a page begins with one. Memory order is that of the tensor.

        Raises
        ------
        AdapterError
            An unknown name, or the adapter lies in no pool.
        """
        with self.lock:
            holding = self._of(name)
            if holding.paged is None:
                raise AdapterError(f"Adapter '{name}' lies in no page pool; place it in one first.")
            homes = holding.adapter.homes()
            return {f"{at}.{n}": where for at, home in homes for n, where in holding.paged.pages(home).items()}

    def pin(self, name: str) -> Pin:
        """Bring an adapter to where it is used, and keep it there until it was unpinned as often as pinned.

        Raises
        ------
        AdapterError
            An unknown name, or no room.
        CheckpointError
            The file of the adapter is damaged.
        """
        holding = self._of(name)
        self._wait(holding)
        with self.lock:
            if not self._bring(holding):
                raise self.room.no_room(holding, holding.top)
            holding.pins += 1
        return Pin(self, holding)

    def unpin(self, name: str) -> None:
        """Take one pin away.

        Raises
        ------
        AdapterError
            An unknown name, or the adapter is not pinned.
        """
        with self.lock:
            holding = self._of(name)
            if not holding.pins:
                raise AdapterError(f"Adapter '{name}' is not pinned, so there is no pin to take away.")
            holding.pins -= 1

    def evict(self, name: str) -> None:
        """Move an adapter one place down: from the device or a pool to the host, from there to disk.

        Raises
        ------
        AdapterError
            As for `place`.
        CheckpointError
            The disk refuses.
        """
        with self.lock:
            holding = self._of(name)
            if holding.place != "disk":
                self.room.check_free(holding)
                self._down(holding)

    def prefetch(self, names: str | Iterable[str]) -> None:
        """Begin to bring adapters to where they are used, on a side thread.

        The first use of an adapter waits for it, and raises what went wrong. Where there is no room it stays as it is.

        Raises
        ------
        AdapterError
            An unknown name.
        """
        chosen = [self._of(name) for name in ([names] if isinstance(names, str) else names)]
        with self.lock:
            for holding in chosen:
                if holding.place == holding.top or holding.coming is not None:
                    continue
                if self._side is None:
                    self._side = ThreadPoolExecutor(1, "lorry-prefetch")
                ticket = holding.ticket = object()
                stream = torch.cuda.current_stream() if torch.cuda.is_available() else None
                holding.coming = self._side.submit(self._prefetched, holding, ticket, stream)

    def limit(
        self, device_bytes: int | None | _Same, host_bytes: int | None | _Same, folder: Path | None | _Same
    ) -> None:
        """Change limits; see `placement`."""
        for name, value in (("device_bytes", device_bytes), ("host_bytes", host_bytes)):
            given = value is not None and not isinstance(value, _Same)
            if given and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise OptionError(f"{name} is a number of bytes, or None for no limit; found {value!r}.")
        with self.lock:
            if not isinstance(folder, _Same) and folder != (
                None if self.room.folder is None else self.room.folder.path
            ):
                present = self.room.folder
                if present is not None and present.files:
                    raise OptionError(
                        f"{len(present.files)} files of adapters lie in '{present.path}'. Detach or change these "
                        "adapters before giving another folder."
                    )
                self.room.folder = None if folder is None else DiskFolder(folder)
                if self.room.folder is not None:
                    weakref.finalize(self, _remove, self.room.folder.files)
            self.room.device_bytes = self.room.device_bytes if isinstance(device_bytes, _Same) else device_bytes
            self.room.host_bytes = self.room.host_bytes if isinstance(host_bytes, _Same) else host_bytes
            for place in ("device", "host"):
                self._make_room(cast(Place, place), None)

    # -- what the model and the homes of tensors ask for

    def took(self, adapter: Member) -> None:
        """Take charge of an adapter that the model gets."""
        with self.lock:
            holding = self._hold(adapter)
            try:
                if not self._make_room("device", holding):
                    self._down(holding)
            except BaseException:
                del self.room.holdings[adapter.name]
                holding.release(False)
                raise

    def lost(self, adapter: Member) -> None:
        """Let go of an adapter that the model had; its pages are free again, and its file is removed."""
        with self.lock:
            holding = self.room.holdings.pop(adapter.name, None)
            if holding is not None:
                holding.release(adapter.name in self.room.busy())

    def fetch(self, holding: Holding, home: TensorHome) -> dict[str, Tensor]:
        """Return tensors that are not ready: bring the adapter, or lend what the site needs."""
        self._wait(holding)
        with self.lock:
            values = home.resident
            if values is not None:  # another thread was faster
                return values
            if home is holding.lead:
                self.statistics.misses += 1
            if self.room.holdings.get(holding.adapter.name) is not holding:  # detached
                return streamed(holding, home)
            if not self._bring(holding, here=True):
                self.warm(holding)
            values = home.resident
            return streamed(holding, home) if values is None else values

    def warm(self, holding: Holding, image: Image | None = None) -> None:
        """Bring an adapter from disk to the host, if there is room."""
        attached = self.room.holdings.get(holding.adapter.name) is holding
        if attached and holding.place == "disk" and self._make_room("host", holding):
            self._move(holding, "host", image)

    # -- moving

    def _bring(
        self, holding: Holding, *, here: bool = False, image: Image | None = None, stream: object = None
    ) -> bool:
        """Bring an adapter to where it is used, and return whether there was room."""
        if holding.place != holding.top:
            if not self._make_room(holding.top, holding, here=here):
                return False
            self._move(holding, holding.top, image, stream)
        return True

    def _down(self, holding: Holding) -> None:
        """Move an adapter one place down."""
        if holding.place != "host" and self._make_room("host", holding):
            self._move(holding, "host")
        elif self.room.folder is not None:
            self._move(holding, "disk")
        else:
            raise AdapterError(_NO_FOLDER if holding.place == "host" else self.room.no_room(holding, "host").args[0])
        self.statistics.evictions += 1

    def _move(self, holding: Holding, where: Place, image: Image | None = None, stream: object = None) -> None:
        leaves = holding.place == "device" or isinstance(holding.place, PagePool)
        holding.move(where, self.room.folder, image, stream)
        holding.ticket = holding.coming = None
        if leaves:
            self._forget_copies(holding.adapter.name)

    def _make_room(self, where: Place, holding: Holding | None, *, here: bool = False) -> bool:
        """Let adapters leave a place until one more fits there, those that were needed long ago first.

        Parameters
        ----------
        where
            The place.
        holding
            What is to fit; None for what lies there already.
        here
            Whether a pass of this thread asks: what it computes with stays.

        Returns
        -------
        bool
            Whether it fits. If it cannot, nothing leaves.
        """
        short = self.room.short(where, holding)
        if short <= 0:
            return True
        leaving = self.room.candidates(where, holding, here)
        if holding is not None and sum(amount(h, where) for h in leaving) < short:
            return False
        for victim in leaving:
            try:
                self._down(victim)
            except AdapterError:  # there is no room further down either
                return False
            except CheckpointError as error:
                warnings.warn(f"Adapter '{victim.adapter.name}' could not make room: {error}", stacklevel=2)
                return False
            if self.room.short(where, holding) <= 0:
                return True
        return False

    # -- the side thread

    def _prefetched(self, holding: Holding, ticket: object, stream: torch.cuda.Stream | None) -> None:
        with self.lock:
            if holding.ticket is not ticket:
                return
            file = holding.file if holding.place == "disk" else None
        image = None if file is None else file.read()  # passes go on meanwhile
        with self.lock, nullcontext() if stream is None else torch.cuda.stream(stream):
            if holding.ticket is not ticket:
                return
            self.statistics.from_disk += 0 if image is None else holding.size
            if not self._bring(holding, image=image, stream=stream):
                self.warm(holding, image)
            holding.ticket = holding.coming = None

    def _wait(self, holding: Holding) -> None:
        """Wait for the side thread, and raise what it ran into."""
        coming = holding.coming
        if coming is None:
            return
        try:
            coming.result()
        finally:
            with self.lock:
                if holding.coming is coming:
                    holding.ticket = holding.coming = None

    # -- the rest

    def _hold(self, adapter: Member) -> Holding:
        holding = self.room.holdings[adapter.name] = Holding(cast(Adapter, adapter), self)
        for _, home in holding.adapter.homes():
            home.keeper = holding
        return holding

    def _of(self, name: str) -> Holding:
        found = self.room.holdings.get(name)
        if found is None:
            raise unknown_adapter(name, self._state.adapters)
        return found

    def _forget_copies(self, name: str) -> None:
        """Let go of what compositions made of an adapter's tensors."""
        for active in self._state.drop_composed(name):
            active.forget()
        for active in self._compositions():
            if name in active.members:
                active.forget()

    def _compositions(self) -> Iterator[Active]:
        """Yield every composition that somebody may come back to."""
        for runtime in self._state.runtimes.every():
            found = [runtime.active, runtime.inside, *runtime.actives()]
            found += [moment.active for moment in list(runtime.history._what)]
            yield from (active for active in found if active is not None)


_NO_FOLDER = (
    "There is no folder for adapters on disk. Give one: lorry.placement(model, folder=PATH). The files in it are this "
    "process's own, and are removed when they are no longer needed."
)


def _remove(files: set[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def placement(
    model: nn.Module,
    *,
    device_bytes: int | None | _Same = _Same.SAME,
    host_bytes: int | None | _Same = _Same.SAME,
    folder: str | os.PathLike[str] | None | _Same = _Same.SAME,
) -> Placement:
    """Return the model's placement: where the tensors of its adapters lie.

    Without limits everything stays where it is until it is moved. The model keeps its placement until it is gone
    itself, also while it carries no adapters; a copy of the model gets none, and all tensors.

    Parameters
    ----------
    model
        A model, with or without adapters.
    device_bytes
        What adapters may take on the model's device; None for no limit, as before if not given. Those that were not
        needed for longest are moved to the host. Tensors that are lent for one call of a layer, because there was no
        room for the adapter, do not count.
    host_bytes
        The same for host memory; what is too much is moved to disk.
    folder
        Where files of adapters are put. They are this process's own, and are removed when an adapter is changed or
        detached, and when the process ends.

    Raises
    ------
    OptionError
        A limit that is no number of bytes, or another folder while adapters lie in the present one.
    """
    state = open_state(model)
    keep_state(state)
    if state.custodian is None:
        state.custodian = Placement(state)
    found = cast(Placement, state.custodian)
    found.limit(device_bytes, host_bytes, Path(folder) if isinstance(folder, str | os.PathLike) else folder)
    return found
