"""The memory of an engine: pages of keys and values, and the adapters that are computed with.

Two ways behind one interface. In a unified pool both take pages of one memory, so whichever needs more has more
(S-LoRA, arXiv 2311.03285, section 5.1). With slots, the memory is split: so many slots of a fixed size for adapters,
and the rest for keys and values, as most servers do.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from operator import attrgetter

import torch

from lorry.core.errors import AdapterError
from lorry.core.life.adapter import Adapter
from lorry.core.life.images import ALIGNED
from lorry.core.life.page_pool import PagePool
from lorry.serving.options import EngineOptions
from lorry.serving.paging.blocks import Block, Blocks
from lorry.serving.paging.resident import Resident


class Pool(ABC):
    """Memory for keys, values and adapters.

    Parameters
    ----------
    tokens
        Pages of keys and values.
    adapters
        Pages of adapters; may be the same.
    page_tokens, keep
        As for `Blocks`.

    Attributes
    ----------
    blocks
        The pages of keys and values.
    held, pinned
        The adapters in pages, and those that never leave them.
    dropped
        Called when an adapter leaves its pages: whoever reads them must let go of them.
    """

    def __init__(self, tokens: PagePool, adapters: PagePool, page_tokens: int, keep: bool) -> None:
        self.tokens = tokens
        self.adapters = adapters
        self.blocks = Blocks(tokens, page_tokens, keep)
        self.held: set[Resident] = set()
        self.pinned: set[Resident] = set()
        self.dropped: Callable[[Resident], None] = lambda resident: None
        self._clock = itertools.count(1)

    @abstractmethod
    def capacity(self, used: Iterable[Resident]) -> int:
        """Return how many pages keys and values may take beside adapters in use, -1 if these do not fit together."""

    @abstractmethod
    def adopt(self, adapter: Adapter) -> Resident:
        """Take over the tensors of an adapter.

        Raises
        ------
        AdapterError
            It can never be paged in.
        """

    @abstractmethod
    def _make_room(self, pages: int) -> None:
        """Let go of what is not in use until so many pages are free for an adapter, or nothing is left to go."""

    #: Where adapters have a memory of their own: how many of its pages there are; None where all is one memory.
    apart: int | None = None

    def cost(self, resident: Resident) -> int:
        """Return the pages that an adapter takes."""
        return resident.pages

    @property
    def in_use(self) -> set[Resident]:
        """The adapters that running requests use."""
        return {resident for resident in self.held if resident.users}

    @property
    def free(self) -> int:
        """Pages that keys and values could take now, with all adapters gone that are not in use."""
        return self.blocks.free + (0 if self.tokens is not self.adapters else sum(r.pages for r in self._idle()))

    def pin(self, resident: Resident) -> None:
        """Page an adapter in for good; raises as `use` does."""
        self.use(resident)
        self.pinned.add(resident)

    def use(self, resident: Resident) -> None:
        """Page an adapter in, and keep it there until `leave` is called as often.

        Raises
        ------
        AdapterError
            There is no room.
        CheckpointError
            Its file on disk is missing or damaged.
        """
        if resident.lease is None:
            self._make_room(resident.pages)
            resident.page_in()
            self.held.add(resident)
        resident.users += 1

    def leave(self, resident: Resident) -> None:
        """Take note that one request uses an adapter no more."""
        resident.users -= 1
        resident.used = next(self._clock)

    def drop(self, resident: Resident) -> None:
        """Give up an adapter's pages."""
        resident.give_up()
        self.dropped(resident)
        self.pinned.discard(resident)
        self.held.discard(resident)

    def take(self, count: int) -> list[Block]:
        """Return fresh pages for keys and values; adapters and pages that are not in use make room.

        Raises
        ------
        AdapterError
            There is no room.
        """
        if count and self.tokens.free < count and self.tokens is self.adapters:
            self._make_room(count)
        return self.blocks.take(count)

    def release(self, blocks: list[Block]) -> None:
        """Give pages of keys and values back."""
        self.blocks.release(blocks, next(self._clock))

    def prefetch(self, resident: Resident) -> bool:
        """Page an adapter in if nothing has to go for it; returns whether it is in."""
        if resident.lease is None and self.adapters.free >= resident.pages:
            resident.page_in()
            self.held.add(resident)
        return resident.lease is not None

    def _idle(self) -> list[Resident]:
        return [resident for resident in self.held if not resident.users]

    def check(self) -> None:
        """Raise `AssertionError` unless every page is free or taken once, by whom it should be."""
        self.tokens.check()
        self.adapters.check()
        self.blocks.check()
        assert all(resident.lease is not None for resident in self.held), "an adapter is held without pages"
        pages = [page for resident in self.held if resident.lease for page in resident.lease.pages]
        assert len(pages) == sum(resident.pages for resident in self.held), "an adapter has too few pages"
        if self.tokens is self.adapters:
            pages += [block.page for block in self.blocks.all]
            assert len(pages) == len(set(pages)) == self.tokens.used, "a page is taken twice, or by nobody"


class UnifiedPool(Pool):
    """One memory in which adapters and keys and values take pages alike.

    Parameters
    ----------
    pages
        The memory.
    page_tokens, keep
        As for `Blocks`.
    """

    def __init__(self, pages: PagePool, page_tokens: int, keep: bool = True) -> None:
        super().__init__(pages, pages, page_tokens, keep)

    def capacity(self, used: Iterable[Resident]) -> int:
        """Return the pages that are left beside adapters."""
        return max(self.tokens.pages - sum(resident.pages for resident in used), -1)

    def adopt(self, adapter: Adapter) -> Resident:
        """Take over the tensors of an adapter that leaves room for a page of keys and values."""
        resident = Resident(adapter, self.adapters)
        if resident.pages >= self.adapters.pages:
            raise _too_large(resident, f"the pool has {self.adapters.pages}, one of which a request needs")
        return resident

    def _make_room(self, pages: int) -> None:
        """Let go of whatever was used longest ago: an adapter, or a kept page."""
        if self.adapters.free >= pages:
            return
        idle = sorted(self._idle(), key=attrgetter("used"), reverse=True)
        while self.adapters.free < pages:
            oldest = self.blocks.oldest
            if idle and (oldest is None or idle[-1].used <= oldest):
                self.drop(idle.pop())
            elif oldest is not None:
                self.blocks.drop_oldest()
            else:
                return


class SlotPool(Pool):
    """Slots of one size for adapters, and pages for keys and values beside them.

    Parameters
    ----------
    pages
        For keys and values.
    slots
        For adapters; its pages are the slots.
    page_tokens, keep
        As for `Blocks`.
    """

    def __init__(self, pages: PagePool, slots: PagePool, page_tokens: int, keep: bool = True) -> None:
        super().__init__(pages, slots, page_tokens, keep)
        self.apart = slots.pages

    def capacity(self, used: Iterable[Resident]) -> int:
        """Return the pages for keys and values if there are slots enough."""
        return self.tokens.pages if len(set(used)) <= self.adapters.pages else -1

    def adopt(self, adapter: Adapter) -> Resident:
        """Take over the tensors of an adapter that fits a slot."""
        resident = Resident(adapter, self.adapters)
        if resident.pages > 1:
            raise _too_large(resident, f"a slot has {self.adapters.page_bytes} bytes")
        return resident

    def _make_room(self, pages: int) -> None:
        """Let go of the adapter that was used longest ago."""
        idle = sorted(self._idle(), key=lambda resident: -resident.used)
        while self.adapters.free < pages and idle:
            self.drop(idle.pop())


def _too_large(resident: Resident, why: str) -> AdapterError:
    resident.take_back()
    return AdapterError(
        f"Adapter '{resident.adapter.name}' takes {resident.nbytes} bytes, {resident.pages} pages of "
        f"{resident.pool.page_bytes}, but {why}. Give the engine more memory, or make the adapter smaller."
    )


def made_pool(options: EngineOptions, page_bytes: int, device: torch.device) -> Pool:
    """Return the pool that options ask for.

    Raises
    ------
    OptionError
        It has no room for a page.
    """
    pages = options.pages if options.pages is not None else options.pool_bytes // page_bytes
    size, keep = options.page_tokens, options.prefix_cache
    if options.pool == "unified":
        return UnifiedPool(PagePool(pages, page_bytes, device), size, keep)
    slot_bytes = int(pages * page_bytes * options.slot_share) // options.slots // ALIGNED * ALIGNED
    left = pages - -(-slot_bytes * options.slots // page_bytes)
    return SlotPool(PagePool(left, page_bytes, device), PagePool(options.slots, slot_bytes, device), size, keep)
