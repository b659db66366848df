"""What applied when: a checkpointed segment is computed again in the backward pass, after other passes may have run.

Autograd numbers the nodes of its graph, in each thread, in the order in which they are made. What becomes active is
noted with the number that the next node will get; the number of the node whose backward pass asks for the
recomputation then says what applied in its time.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from typing import Generic, TypeVar

import torch

T = TypeVar("T")

#: Changes that are remembered; more of them between a forward pass and its backward pass are not expected.
_MOST = 256


class History(Generic[T]):
    """The last changes of what applies, in one thread."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self._numbers: list[int] = []
        self._what: list[T] = []

    def note(self, what: T) -> None:
        """Note that this applies from now on."""
        thread = threading.get_ident()
        if thread != self.thread:  # numbers of another thread mean nothing here
            self.clear()
            self.thread = thread
        number = sequence_number()
        if self._numbers and self._numbers[-1] >= number:
            # nothing was computed since the last change
            del self._numbers[-1], self._what[-1]
        elif len(self._numbers) >= _MOST:
            del self._numbers[: _MOST // 2], self._what[: _MOST // 2]
        self._numbers.append(number)
        self._what.append(what)

    def at(self, number: int) -> T | None:
        """Return what applied when the node of this number was made; the oldest that is known if it is older."""
        return self._what[max(bisect_right(self._numbers, number) - 1, 0)] if self._what else None

    def covers(self, number: int) -> bool:
        """Whether the node of this number was made since the first change that is known."""
        return bool(self._numbers) and self._numbers[0] <= number

    def copy(self) -> History[T]:
        """Return a history that goes on from here by itself."""
        twin: History[T] = History()
        twin.thread, twin._numbers, twin._what = self.thread, self._numbers.copy(), self._what.copy()
        return twin

    def clear(self) -> None:
        """Forget everything, so that nothing is kept alive."""
        self._numbers.clear()
        self._what.clear()


def sequence_number() -> int:
    """Return the number that the next node of this thread's graphs will get."""
    return int(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]


def running_node() -> int | None:
    """Return the number of the node whose backward pass runs now in this thread."""
    node = torch._C._current_autograd_node()
    return None if node is None else int(node._sequence_nr())
