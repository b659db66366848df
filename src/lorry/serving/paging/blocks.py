"""Pages with keys and values, counted by who uses them, and found again by what lies on them.

A page whose tokens are known is kept after its last user for the next request that begins with the same tokens under
the same composition of the same versions. The page is looked up by the page before it and its own tokens, so a page
stands for all that came before, and two compositions never share one.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Hashable, Sequence

import torch

from lorry.core.life.page_pool import PagePool

_SERIAL = itertools.count()


class Block:
    """One page of keys and values.

    Attributes
    ----------
    page
        Its number in the pool.
    users
        How many sequences have it.
    used
        When its last user left it.
    serial
        Unique among all blocks there ever are.
    key
        Under which it can be found; None while it cannot.
    """

    __slots__ = ("key", "page", "serial", "used", "users")

    def __init__(self, page: int) -> None:
        self.page = page
        self.users = 1
        self.used = 0
        self.serial = next(_SERIAL)
        self.key: tuple[Hashable, tuple[int, ...]] | None = None


class Blocks:
    """The pages of keys and values in a pool.

    Parameters
    ----------
    pool
        Where pages come from.
    page_tokens
        Tokens of a page.
    keep
        Whether pages that nobody uses any more are kept to be found again.

    Attributes
    ----------
    all
        The pages that are taken.
    clean
        Whether fresh pages are all zero; needed where what lies behind a sequence's last token is read and masked.
    """

    def __init__(self, pool: PagePool, page_tokens: int, keep: bool = True) -> None:
        self.pool = pool
        self.page_tokens = page_tokens
        self.keep = keep
        self.clean = True
        self.all: set[Block] = set()
        self._found: dict[tuple[Hashable, tuple[int, ...]], Block] = {}
        self._idle: OrderedDict[int, Block] = OrderedDict()  # by serial, those that were used long ago first

    @property
    def free(self) -> int:
        """Pages that can be taken now, those that are only kept among them."""
        return self.pool.free + len(self._idle)

    @property
    def oldest(self) -> int | None:
        """When the kept page was left that was used longest ago; None if no page is kept."""
        return next(iter(self._idle.values())).used if self._idle else None

    @property
    def kept(self) -> int:
        """Pages that nobody uses and that may be found again."""
        return len(self._idle)

    def take(self, count: int) -> list[Block]:
        """Return fresh pages; kept ones are given up for them.

        Raises
        ------
        AdapterError
            The pool has fewer.
        """
        while self._idle and self.pool.free < count:
            self.drop_oldest()
        pages = self.pool.take_loose(count)
        if pages and self.clean:
            # what lay there may be no numbers, and no mask hides these
            self.pool.memory.index_fill_(0, torch.tensor(pages, device=self.pool.device), 0)
        taken = [Block(page) for page in pages]
        self.all.update(taken)
        return taken

    def drop_oldest(self) -> None:
        """Give up the kept page that was used longest ago."""
        _, block = self._idle.popitem(last=False)
        self._forget(block)
        self._give_back(block)

    def clear(self) -> None:
        """Give up all kept pages."""
        while self._idle:
            self.drop_oldest()

    def match(self, root: Hashable, tokens: Sequence[int]) -> list[Block]:
        """Return the known pages with which tokens begin, in order; they are used from now on."""
        found: list[Block] = []
        before: Hashable = root
        for stop in range(self.page_tokens, len(tokens) + 1, self.page_tokens):
            block = self._found.get((before, tuple(tokens[stop - self.page_tokens : stop])))
            if block is None:
                break
            found.append(block)
            before = block.serial
        for block in found:
            if not block.users:
                del self._idle[block.serial]
            block.users += 1
        return found

    def publish(self, root: Hashable, before: Block | None, block: Block, tokens: Sequence[int]) -> None:
        """Let a page be found whose tokens are going to be stored in this pass."""
        key = (root if before is None else before.serial, tuple(tokens))
        if self.keep and block.key is None and key not in self._found:
            block.key = key
            self._found[key] = block

    def withdraw(self, blocks: Sequence[Block]) -> None:
        """Let pages be found no more: what should have been stored on them was not."""
        for block in blocks:
            self._forget(block)

    def release(self, blocks: Sequence[Block], now: int = 0) -> None:
        """Take note that a sequence uses its pages no more; `now` tells when, for whoever compares ages."""
        for block in reversed(blocks):  # the end of a sequence is of less use to others than its beginning
            block.users -= 1
            block.used = now
            if block.users:
                continue
            if block.key is None:
                self._give_back(block)
            else:
                self._idle[block.serial] = block

    def check(self) -> None:
        """Raise `AssertionError` unless what is kept agrees with what can be found."""
        assert all(block.key == key for key, block in self._found.items()), "a page is found under another key"
        assert all(not block.users and block.key in self._found for block in self._idle.values()), "a kept page is lost"
        assert all(block.users > 0 or block.serial in self._idle for block in self.all), "a page is used by nobody"

    def _give_back(self, block: Block) -> None:
        self.all.remove(block)
        self.pool.give_loose([block.page])

    def _forget(self, block: Block) -> None:
        if block.key is not None and self._found.get(block.key) is block:
            del self._found[block.key]
        block.key = None
