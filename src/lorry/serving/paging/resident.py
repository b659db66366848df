"""One adapter's tensors: in host memory or on disk for as long as it is served, and in pages while it is used."""

from __future__ import annotations

import threading
from typing import Literal

import torch
from torch import Tensor

from lorry.core.errors import OptionError
from lorry.core.forward.entry import TensorHome
from lorry.core.life.adapter import Adapter
from lorry.core.life.disk_folder import DiskFile, DiskFolder
from lorry.core.life.images import Image, Slot, arranged, plan_of, rounded, size_of
from lorry.core.life.page_pool import Lease, PagePool, runs_of


class Resident:
    """Keeps the tensors of one frozen adapter; the keeper of its homes.

    What lies in pages is a copy of what lies in host memory or on disk, so that the pages can be given up at any time.

    Parameters
    ----------
    adapter
        Its homes get this keeper.
    pool
        Where it is paged in.

    Attributes
    ----------
    pages
        How many pages it takes there.
    nbytes
        Of its tensors, as they lie.
    users
        How many running requests use it; while there are any it stays.
    used
        When it was used last, by a clock that counts.
    """

    def __init__(self, adapter: Adapter, pool: PagePool) -> None:
        self.adapter = adapter
        self.pool = pool
        self.users = 0
        self.used = 0
        values = {home: dict(home.tensors()) for _, home in adapter.homes()}
        for entry in adapter.entries.values():
            if {"stored", "plain"} <= entry.method.capabilities and values[entry.home]["B"].ndim == 2:
                # every product with B reads a rank unit at a time
                values[entry.home]["B"] = values[entry.home]["B"].t().contiguous().t()
        self.plan = arranged(plan_of(values, adapter.name), pool.page_bytes)
        self.nbytes = size_of(self.plan)
        self.pages = rounded(self.nbytes, pool.page_bytes) // pool.page_bytes
        self.lease: Lease | None = None
        self._host: Image | None = Image.packed(values, self.plan)
        self._file: DiskFile | None = None
        self._lock = threading.RLock()
        self._slots = {home: {slot.name: slot for slot in slots} for home, slots in self.plan.items()}
        self._paged: dict[TensorHome, dict[str, Tensor]] = {}
        for _, home in adapter.homes():
            home.keeper = self
            home.settle(None)

    @property
    def place(self) -> Literal["pool", "host", "disk"]:
        """Where the nearest copy lies."""
        if self.lease is not None:
            return "pool"
        return "disk" if self._host is None else "host"

    # -- the keeper of its homes

    def ready(self, home: TensorHome) -> dict[str, Tensor]:
        """Return the tensors of a home for computing: those in pages, if it has pages."""
        lease = self.lease
        if lease is None:
            values = self.lying(home)
            return values if self.pool.device.type == "cpu" else {n: t.to(self.pool.device) for n, t in values.items()}
        values = self._paged.get(home)  # type: ignore[assignment]
        if values is not None:
            return values
        found = {name: (slot, lease.whole(slot)) for name, slot in self._slots[home].items()}
        if all(tensor is not None for _, tensor in found.values()):
            return self._paged.setdefault(home, {name: t for name, (_, t) in found.items() if t is not None})
        return {name: lease.gathered(slot) if t is None else t for name, (slot, t) in found.items()}

    def lying(self, home: TensorHome) -> dict[str, Tensor]:
        """Return the tensors of a home in host memory."""
        return self._in_host().tensors[home]

    def bring(self, home: TensorHome, device: torch.device) -> None:
        """Refuse another device than the pool's.

        Raises
        ------
        OptionError
            The model was moved.
        """
        if device != self.pool.device:
            raise OptionError(
                f"The model was moved to '{device}', but an engine serves it from a pool on '{self.pool.device}'. "
                "Make a new engine after moving a model."
            )

    def take_back(self) -> None:
        """Give all homes their tensors; they are the adapter's own again."""
        with self._lock:
            image = self._in_host()
            for _, home in self.adapter.homes():
                home.keeper = None
                home.settle({name: tensor.to(self.pool.device) for name, tensor in image.tensors[home].items()})
            self.give_up()

    def exchanged(self) -> None:
        """Nothing to note: a home that exchanges a tensor has taken all of them back before."""

    # -- moving

    def page_in(self) -> None:
        """Copy everything into pages.

        Raises
        ------
        AdapterError
            The pool has too few.
        CheckpointError
            The file on disk is missing or damaged.
        """
        if self.lease is not None:
            return
        flat = self._in_host().flat
        lease = self.pool.take(self.pages, runs_of(self.plan, self.pool.page_bytes, self.pages))
        with torch.inference_mode(False), torch.no_grad():
            lease.write(0, flat)
        self.lease = lease

    def give_up(self) -> None:
        """Give its pages back."""
        lease, self.lease, self._paged = self.lease, None, {}
        if lease is not None:
            lease.give_back()

    def to_disk(self, folder: DiskFolder) -> None:
        """Let go of the copy in host memory, which lies on disk from now on.

        Raises
        ------
        CheckpointError
            The disk refuses; the copy stays.
        """
        with self._lock:
            if self._host is not None:
                self._file = self._file or folder.write(self.adapter.name, self._host)
                self._host = None

    def warm(self) -> bool:
        """Read it from disk, if it lies there; returns whether it did."""
        with self._lock:
            cold = self._host is None
            self._in_host()
            return cold

    def remove(self) -> None:
        """Give up pages and file: nobody is going to use it any more.

        Its homes have what lies in host memory from now on, and no keeper, so that whoever lets go of the adapter frees
        it at once: in a cycle it would lie around until so many objects have come that all of them are searched.
        """
        self.give_up()
        with self._lock:
            image = self._in_host()
            if self._file is not None:
                self._file.remove()
                self._file = None
            for _, home in self.adapter.homes():
                home.settle(image.tensors[home])
                home.keeper = None

    def slot(self, home: TensorHome, name: str) -> Slot:
        """Return where a tensor lies in what is paged in."""
        return self._slots[home][name]

    def address(self, slot: Slot) -> int | None:
        """Return the byte of the pool at which a tensor begins; None if it does not lie in one piece there."""
        lease = self.lease
        if lease is None or not slot.nbytes:
            return None
        first, last = slot.start // self.pool.page_bytes, (slot.stop - 1) // self.pool.page_bytes
        page = lease.pages[first]
        together = lease.pages[last] - page == last - first and (
            last - first < 2 or lease.pages[first : last + 1] == tuple(range(page, page + last - first + 1))
        )
        return page * self.pool.page_bytes + slot.start % self.pool.page_bytes if together else None

    def _in_host(self) -> Image:
        with self._lock:
            if self._host is None:
                assert self._file is not None
                self._host = self._file.read()
            return self._host
