"""The requests of one model, in their order."""

from __future__ import annotations

from dataclasses import dataclass, field

from lorry.serving.training.passes import Work
from lorry.serving.training.store import Entry

#: The kind of requests that go through the base.
PASS = "pass"


@dataclass
class Queue:
    """The requests of one model that are not done.

    Attributes
    ----------
    next
        The number of the request that comes next; a later one waits for it.
    waiting
        Those that came, by number.
    works
        Those of them that go through the base now, by number; None for one that is answered already.
    """

    next: int = 0
    waiting: dict[int, Entry] = field(default_factory=dict)
    works: dict[int, Work | None] = field(default_factory=dict)

    def fresh_passes(self) -> list[Entry]:
        """Return the requests for passes that came and are not begun, before anything else does."""
        found: list[Entry] = []
        seq = self.next
        while (entry := self.waiting.get(seq)) is not None and entry.kind == PASS:
            if seq not in self.works:
                found.append(entry)
            seq += 1
        return found

    @property
    def head(self) -> Entry | None:
        """What can be done now."""
        return self.waiting.get(self.next)

    @property
    def under_way(self) -> list[tuple[Entry, Work]]:
        """The requests whose passes are not all done."""
        return [(self.waiting[seq], work) for seq, work in self.works.items() if work is not None]

    def answered(self, entry: Entry) -> None:
        """Go on, past this request and those behind it that were answered before."""
        self.works[entry.seq] = None
        while self.next in self.works and self.works[self.next] is None:
            del self.works[self.next]
            self.waiting.pop(self.next, None)
            self.next += 1
