"""Memory that adapters leave behind, given back to the system.

An adapter is thousands of small objects. glibc keeps what is freed for the threads that allocated it, each of which has
a heap of its own, and gives back by itself only what lies at a heap's end. Where each thread that serves HTTP loads
adapters in turn, every exchange leaves a hole in one heap and fills up another.
"""

from __future__ import annotations

import ctypes
import sys
import threading

#: Adapters that are let go of between two times. It takes milliseconds, and what they leave meanwhile is a few MB.
EVERY = 16


class Heap:
    """Counts the adapters that were let go of, and returns their memory now and then."""

    def __init__(self) -> None:
        self._left = 0
        self._lock = threading.Lock()
        # other C libraries give memory back by themselves, or not at all
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None

    def left(self) -> None:
        """Take note that an adapter was let go of."""
        with self._lock:
            self._left += 1

    def tidy(self) -> None:
        """Give the system what is free, if many adapters were let go of; to be called where nobody waits for it."""
        with self._lock:
            due, self._left = self._left >= EVERY, self._left % EVERY
        if due and self._trim is not None:
            self._trim(0)
