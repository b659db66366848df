"""Host memory for adapters: up to a limit, and beyond it a folder on disk; a side thread brings them back early."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lorry.core.life.disk_folder import DiskFolder
from lorry.serving.paging.resident import Resident


class Shelf:
    """Which adapters lie in host memory.

    Parameters
    ----------
    limit
        Bytes; None for no limit.
    folder
        Where those lie that were used longest ago, once there are more.

    Attributes
    ----------
    bytes
        What lies in host memory.
    """

    def __init__(self, limit: int | None, folder: Path | None) -> None:
        self.limit = limit
        self.bytes = 0
        self._folder = None if folder is None else DiskFolder(folder)
        self._warm: OrderedDict[Resident, None] = OrderedDict()  # those that were used longest ago first
        self._coming: set[Resident] = set()
        self._lock = threading.Lock()
        self._side: ThreadPoolExecutor | None = None

    def keep(self, resident: Resident) -> None:
        """Take note that an adapter lies in host memory and was just used; others go to disk if there is too much.

        Raises
        ------
        CheckpointError
            The disk refuses.
        """
        if self.limit is None or self._folder is None:
            return
        with self._lock:
            if resident not in self._warm:
                self.bytes += resident.nbytes
                self._warm[resident] = None
            self._warm.move_to_end(resident)
            while self.bytes > self.limit and len(self._warm) > 1:
                oldest = next(iter(self._warm))
                oldest.to_disk(self._folder)
                del self._warm[oldest]
                self.bytes -= oldest.nbytes

    def forget(self, resident: Resident) -> None:
        """Take note that an adapter is served no more."""
        with self._lock:
            if resident in self._warm:
                del self._warm[resident]
                self.bytes -= resident.nbytes

    def fetch(self, residents: Iterable[Resident]) -> None:
        """Begin to read adapters from disk on a side thread; whoever needs one earlier reads it himself."""
        with self._lock:
            cold = [r for r in residents if r.place == "disk" and r not in self._coming]
            if cold and self._side is None:
                self._side = ThreadPoolExecutor(1, "lorry-adapters")
            self._coming.update(cold)
        for resident in cold:
            assert self._side is not None
            self._side.submit(self._fetched, resident)

    def close(self) -> None:
        """End the side thread."""
        with self._lock:
            side, self._side = self._side, None
        if side is not None:
            side.shutdown(wait=True, cancel_futures=True)

    def _fetched(self, resident: Resident) -> None:
        try:
            resident.warm()
            self.keep(resident)
        finally:  # what went wrong is met again, and told, by the request that needs it
            with self._lock:
                self._coming.discard(resident)
