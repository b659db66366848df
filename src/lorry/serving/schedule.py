"""Which requests run, and what each of them computes in the next pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from lorry.core.errors import LorryError
from lorry.serving.admission import Need, peak_pages
from lorry.serving.options import EngineOptions
from lorry.serving.paging.pool import Pool
from lorry.serving.paging.shelf import Shelf
from lorry.serving.sequence import Sequence


@dataclass(frozen=True)
class Share:
    """What one request computes in a pass.

    Attributes
    ----------
    sequence
        The request.
    count
        How many of its tokens, from the first on that is missing.
    """

    sequence: Sequence
    count: int

    @property
    def whole(self) -> bool:
        """Whether nothing is missing after it, so that the next token can be chosen."""
        return self.count == self.sequence.missing


@dataclass
class Counts:
    """What was scheduled so far; as in `Stats`."""

    prefilled: int = 0
    cached: int = 0
    hits: int = 0
    misses: int = 0


class Scheduler:
    """The queues of an engine, and who may use how much of its pool. Called under the engine's lock of passes.

    Parameters
    ----------
    pool, shelf
        The engine's memory.
    options
        The engine's.

    Attributes
    ----------
    waiting, running
        Requests, in the order in which they came.
    """

    def __init__(self, pool: Pool, shelf: Shelf, options: EngineOptions) -> None:
        self.pool = pool
        self.shelf = shelf
        self.options = options
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.counts = Counts()
        #: Tokens of prompts that a pass computes at least, if there are so many.
        self._chunk = max(options.max_batch_tokens - options.max_running, 1)

    def shares(self) -> tuple[list[Share], list[tuple[Sequence, LorryError]]]:
        """Return what the next pass computes: a token of each request that decodes, and as much of prompts as fits; and
        requests that cannot run, with the reason.
        """
        shares = [Share(sequence, 1) for sequence in self.running if sequence.missing == 1]
        room = self.options.max_batch_tokens - len(shares)
        for sequence in self.running:
            if sequence.missing > 1 and room > 0:
                shares.append(Share(sequence, min(sequence.missing, room)))
                room -= shares[-1].count
        for share in shares:
            self._cover(share)
        failed = []
        while room > 0 and self.waiting and self._fits(self.waiting[0]):
            sequence = self.waiting.popleft()
            try:
                self._admit(sequence)
            except LorryError as error:
                failed.append((sequence, error))
                continue
            shares.append(Share(sequence, min(sequence.missing, room)))
            room -= shares[-1].count
            self._cover(shares[-1])
        self._prefetch()
        return shares, failed

    def need(self, sequence: Sequence) -> int:
        """Return the pages that a request needs by itself."""
        return peak_pages([_need(sequence)], self.options.page_tokens, self._chunk)

    def leave(self, sequence: Sequence) -> None:
        """Let a request go that ran or waited."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def _fits(self, sequence: Sequence) -> bool:
        """Whether a request may run beside the others, so that all can run to their ends."""
        if len(self.running) >= self.options.max_running:
            return False
        needs = [_need(each) for each in (*self.running, sequence)]
        used = self.pool.in_use | set(sequence.residents)
        return peak_pages(needs, self.options.page_tokens, self._chunk) <= self.pool.capacity(used)

    def _admit(self, sequence: Sequence) -> None:
        """Let a request run: its adapters are paged in, and what is known of its prompt is found."""
        brought = []
        try:
            for resident in sequence.residents:
                self.pool.use(resident)
                brought.append(resident)
                self.shelf.keep(resident)
        except BaseException:
            for resident in brought:
                self.pool.leave(resident)
            raise
        self.running.append(sequence)
        sequence.blocks = self.pool.blocks.match(sequence.root, sequence.tokens[:-1])
        sequence.stored = sequence.cached = len(sequence.blocks) * self.options.page_tokens
        self.counts.hits += bool(sequence.cached)
        self.counts.misses += not sequence.cached
        self.counts.cached += sequence.cached
        self.counts.prefilled += len(sequence.request.prompt) - sequence.cached

    def _cover(self, share: Share) -> None:
        """Take the pages that a share needs, and let those be found that get full."""
        sequence, size = share.sequence, self.options.page_tokens
        stop = sequence.stored + share.count
        sequence.blocks += self.pool.take(-(-stop // size) - len(sequence.blocks))
        for place in range(sequence.stored // size, stop // size):
            before = sequence.blocks[place - 1] if place else None
            tokens = sequence.tokens[place * size : (place + 1) * size]
            self.pool.blocks.publish(sequence.root, before, sequence.blocks[place], tokens)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        for resident in sequence.residents:
            self.pool.leave(resident)

    def _prefetch(self) -> None:
        """Bring adapters of the next waiting requests, as far as nothing has to go for them."""
        coming = [r for each in islice(self.waiting, self.options.prefetch) for r in each.residents]
        self.shelf.fetch(coming)
        for resident in coming:
            if resident.place == "host":
                self.pool.prefetch(resident)


def passes(shares: list[Share]) -> Iterator[list[Share]]:
    """Yield the shares of each pass: one for all that may lie side by side, and one for each other composition."""
    groups: dict[object, list[Share]] = {}
    for share in shares:
        groups.setdefault(None if share.sequence.by_token else share.sequence.root, []).append(share)
    yield from groups.values()


def _need(sequence: Sequence) -> Need:
    return Need(len(sequence.tokens), sequence.left - 1, sequence.missing)
