"""Where the tensors of one adapter lie now, and getting them from one place to another."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from lorry.core.errors import CheckpointError
from lorry.core.forward.entry import TensorHome
from lorry.core.life.adapter import Adapter
from lorry.core.life.disk_folder import DiskFile, DiskFolder
from lorry.core.life.images import ALIGNED, Image, Plan, Values, on_device, plan_of, rounded
from lorry.core.life.page_pool import PagedImage, PagePool, pages_for

#: Where an adapter lies.
Place = Literal["device", "host", "disk"] | PagePool
#: Where it is brought when it is needed.
Top = Literal["device"] | PagePool
_CLOCK = itertools.count(1)


@dataclass
class Statistics:
    """What a placement has done.

    Attributes
    ----------
    hits, misses
        How often the first site of an adapter asked for its tensors, and found them ready or not.
    evictions
        How often an adapter had to leave a place.
    to_device, to_host, to_disk, from_disk
        Bytes that were moved; pages of a pool count as device.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    to_device: int = 0
    to_host: int = 0
    to_disk: int = 0
    from_disk: int = 0


class Fetching(Protocol):
    """What a holding asks its placement."""

    statistics: Statistics
    lock: threading.RLock

    def fetch(self, holding: Holding, home: TensorHome) -> dict[str, Tensor]:
        """Return tensors that are not ready."""

    def warm(self, holding: Holding) -> None:
        """Bring an adapter from disk to the host, if there is room."""


class Holding:
    """The tensors of one adapter and where they lie; the keeper of its homes.

    Attributes
    ----------
    adapter
        The adapter.
    place
        Where it lies.
    top
        Where it is brought when it is needed: the device, or the pool in which it was placed last.
    pins
        How often it is pinned.
    used
        When it was needed last, by a clock that counts.
    coming
        What a side thread is doing to bring it, and under which ticket.
    host, paged, file
        What holds the tensors when they are not in their homes. A file stays while it says what the adapter is.
    """

    def __init__(self, adapter: Adapter, owner: Fetching) -> None:
        self.adapter = adapter
        self.owner = owner
        self.place: Place = "device"
        self.top: Top = "device"
        self.pins = 0
        self.used = next(_CLOCK)
        self.coming: Future[None] | None = None
        self.ticket: object = None
        self.host: Image | None = None
        self.paged: PagedImage | None = None
        self.file: DiskFile | None = None
        self._written: list[tuple[Tensor, int]] = []
        self._plan: Plan | None = None
        self._size: int | None = None
        self._pages: dict[int, int] = {}
        self._lost: CheckpointError | None = None
        self.lead = next(home for _, home in adapter.homes())

    # -- the keeper of its homes

    def ready(self, home: TensorHome) -> dict[str, Tensor]:
        """Return the tensors of a home on the device where they are needed."""
        self.used = next(_CLOCK)
        values = home.resident
        if values is None and (paged := self.paged) is not None:
            values = paged.ready.get(home)
        if values is None:
            return self.owner.fetch(self, home)
        if home is self.lead:
            self.owner.statistics.hits += 1
        return values

    def lying(self, home: TensorHome) -> dict[str, Tensor]:
        """Return the tensors of a home wherever they lie; from disk they are brought to the host, if there is room.

        What is changed in them in place is kept then. Copies are lent where there is no room, and of what lies on
        scattered pages.
        """
        with self.owner.lock:
            if home.resident is None and self.place == "disk":
                self.owner.warm(self)
            return self._lying(home)

    def _lying(self, home: TensorHome) -> dict[str, Tensor]:
        with self.owner.lock:
            values = home.resident
            if values is None and self.paged is not None:
                values = self.paged.tensors(home)
            if values is None and self.host is not None:
                values = self.host.tensors[home]
            if values is None:
                values = self._on_disk().part(home)
            return values

    def bring(self, home: TensorHome, device: torch.device) -> None:
        """Get the tensors of a home ready; if the model has left the device of the pool, the adapter follows it."""
        if isinstance(self.place, PagePool) and self.place.device != device:
            with self.owner.lock:
                if isinstance(self.place, PagePool):
                    self.top = "device"
                    self.move("device")
        self.ready(home)

    def take_back(self) -> None:
        """Give all homes their tensors back, whatever the limits say."""
        with self.owner.lock:
            self.ticket = self.coming = None
            self.top = "device"
            self.move("device")
            self._forget_file()

    def exchanged(self) -> None:
        """Take note that a tensor of a home is another one now."""
        with self.owner.lock:
            self._plan = self._size = None
            self._pages.clear()

    # -- sizes

    @property
    def trained(self) -> bool:
        """Whether its tensors are parameters of the model."""
        return next(self.adapter.homes())[1].registered

    @property
    def plan(self) -> Plan:
        """How its tensors lie in one piece."""
        if self._plan is None:
            self._plan = plan_of(self.values(), self.adapter.name)
        return self._plan

    @property
    def size(self) -> int:
        """Bytes that its tensors take, each beginning at a multiple of 64 bytes."""
        if self._size is None or (self.place == "device" and self.trained):  # shapes may change from step to step
            self._size = sum(rounded(t.nbytes, ALIGNED) for own in self.values().values() for t in own.values())
        return self._size

    def pages(self, pool: PagePool) -> int:
        """Return how many pages of a pool it needs."""
        found = self._pages.get(id(pool))
        if found is None:
            found = self._pages[id(pool)] = pages_for(self.plan, pool)
        return found

    # -- moving; all of this under the lock of the placement

    def values(self) -> Values:
        """Return all tensors by home, without reading a file."""
        return {home: self._lying(home) for _, home in self.adapter.homes()}

    def move(
        self, place: Place, folder: DiskFolder | None = None, image: Image | None = None, stream: object = None
    ) -> None:
        """Bring all tensors to another place, where there must be room.

        Parameters
        ----------
        place
            Where to.
        folder
            Needed for the disk.
        image
            The tensors in one piece, if they were read from disk already.
        stream
            The CUDA stream that is going to use them, where another one brings them.

        Raises
        ------
        CheckpointError
            The disk refuses, or the file is damaged. The adapter is where it was.
        AdapterError
            A pool has no room, or a tensor cannot be placed.
        """
        if place == self.place and self._whole:
            return
        size, count, written = self.size, self.owner.statistics, self._is_written()
        if place == "disk" and written:
            self._leave()
            self.place, self._written = place, []
            return
        image = self._image() if image is None else image
        paged = file = None
        if place == "device":
            for home, tensors in image.unpacked(self._device, stream).items():
                home.settle(tensors)
            count.to_device += size
        elif isinstance(place, PagePool):
            paged = PagedImage(place, image)
            count.to_device += size
        elif place == "disk":
            assert folder is not None
            file = folder.write(self.adapter.name, image)
            count.to_disk += size
        elif self.place != "disk":
            count.to_host += size
        self._leave(stay=place == "device")
        self.place, self.paged, self._plan = place, paged, image.plan
        self.host = image if place == "host" else None
        if not written:
            self._forget_file()
            self.file = file
        self._written = [] if self.file is None else [(t, t._version) for t in self._sources()]

    def release(self, in_use: bool) -> None:
        """Give the tensors to the homes for good: the adapter was detached. Nothing of it stays in pools or on disk."""
        self.ticket = self.coming = None
        try:
            if self.place != "device":
                image = self._image()
                # a pass under way needs them where they were; later only a handle of the user's can ask for them
                for home, tensors in (image.unpacked(self._device) if in_use else image.tensors).items():
                    home.settle(tensors)
                self._leave(stay=True)
                self.place = "device"
            for _, home in self.adapter.homes():
                home.keeper = None
        except CheckpointError as error:
            self._lost = error  # whoever asks for the tensors is told
        finally:
            self._forget_file()

    @property
    def _whole(self) -> bool:
        """Whether all homes agree with the place; calibration gives an adapter new ones."""
        return all((home.resident is not None) == (self.place == "device") for _, home in self.adapter.homes())

    def _device(self, home: TensorHome) -> torch.device:
        entries = self.adapter.entries.values()
        entry = next((e for e in entries if e.home is home), None) or next(iter(entries))
        return entry.site.device

    def _image(self) -> Image:
        if self._whole and self.host is not None:
            return self.host
        if self._whole and self.place == "disk":
            self.owner.statistics.from_disk += self.size
            return self._on_disk().read()
        values = self.values()
        return Image.packed(values, plan_of(values, self.adapter.name))

    def _on_disk(self) -> DiskFile:
        if self._lost is not None:
            raise self._lost
        assert self.file is not None
        return self.file

    def _leave(self, *, stay: bool = False) -> None:
        """Give up what holds the tensors now; they stay in their homes if these have just got them."""
        for _, home in self.adapter.homes():
            home.keeper = self
            if not stay:
                home.settle(None)
        if self.paged is not None:
            self.paged.give_back()
        self.paged = self.host = None

    def _sources(self) -> Iterator[Tensor]:
        """Yield the tensors in which a change would show."""
        if self.host is not None:
            yield self.host.flat
        elif self.paged is not None:
            yield from (memory for _, memory in self.paged.lease.runs)
        elif self.place == "device":
            for _, home in self.adapter.homes():
                yield from (home.resident or {}).values()

    def _is_written(self) -> bool:
        """Whether the file says what the adapter is now."""
        if self.file is None:
            return False
        now = list(self._sources())
        same = len(now) == len(self._written)
        return same and all(t is k and t._version == v for t, (k, v) in zip(now, self._written, strict=True))

    def _forget_file(self) -> None:
        if self.file is not None:
            self.file.remove()
        self.file, self._written = None, []


def streamed(holding: Holding, home: TensorHome) -> dict[str, Tensor]:
    """Return the tensors of one home where they are needed, without keeping them there."""
    return on_device(holding._lying(home), holding._device(home))
