"""Whether a request may join: the exact peak of the pages that a batch comes to hold (S-LoRA, 2311.03285, section 3).

After t more steps a request that holds n tokens holds n + t, until its last step, after which its pages are free. The
sum grows from one end of a request to the next, so its peak lies at one of these ends: with requests in falling order
of steps left, ``max over k of sum over j <= k of pages(tokens_j + left_k)``, which for pages of one token is the
paper's ``left_k * k + sum over j <= k of tokens_j``. The peak is reached if every request runs to its limit, so a batch
that fits never has to be preempted. Adapters take their pages as long as any request uses them; they are counted as
held throughout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch

from lorry.serving.request import Request


@dataclass(frozen=True)
class Held:
    """What a request holds and may come to hold.

    Attributes
    ----------
    tokens
        Tokens in its cache now, those that it shares included; of a candidate, as after its prompt was read.
    left
        Steps until its limit, each of which adds a token. While its prompt is read in further chunks, add their number.
    shared
        Pages of its tokens that it shares with the prefix cache, which somebody else counts.
    adapters
        The adapters that it uses.
    """

    tokens: int
    left: int
    shared: int = 0
    adapters: tuple[str, ...] = ()

    @classmethod
    def of(cls, request: Request, shared: int = 0) -> Self:
        """Return what a candidate would hold: its prompt and its first token."""
        most = request.sampling.max_tokens
        return cls(len(request.prompt) + 1, max(most - 1, 0), shared, tuple(request.composition))


def peak(running: Sequence[Held], page: int = 1) -> int:
    """Return the most pages that these requests hold at any time, if each runs to its limit.

    Parameters
    ----------
    running
        In any order. Takes time in proportion to their number, times its logarithm and `page`.
    page
        Tokens in a page.
    """
    if not running:
        return 0
    rows = torch.tensor([(h.left, h.tokens + page - 1, h.shared) for h in running], dtype=torch.long)
    left, tokens, shared = rows[rows[:, 0].argsort(descending=True)].unbind(1)
    number = torch.arange(1, len(left) + 1)
    # ceil((tokens + left) / page), summed: whole pages of both apart, and one more where their remainders make a page
    whole = (tokens // page - shared).cumsum(0) + number * (left // page)
    if page == 1:
        return int(whole.max())
    at_least = (tokens % page)[:, None] >= torch.arange(page, 0, -1)  # columns: by remainder of `left`
    carried = at_least.cumsum(0).gather(1, (left % page)[:, None])[:, 0]
    return int((whole + carried).max())


def fits(held: Sequence[Held], pages: int, *, page: int = 1, adapter_pages: Mapping[str, int] | None = None) -> bool:
    """Whether a pool of `pages` holds these requests to their limits, with the adapters that they use, each once."""
    used = {name for each in held for name in each.adapters}
    return peak(held, page) + sum((adapter_pages or {})[name] for name in used) <= pages


class Admission:
    """One round of admitting to a batch.

    Parameters
    ----------
    running
        The batch.
    pages
        What the pool has for it: all pages but those that neither the batch nor the cache's eviction can free.
    page
        Tokens in a page.
    adapter_pages
        Pages of each adapter that is used or asked for.
    adapters_apart
        With a number, adapters have these pages of their own, and `pages` are for keys and values alone (fixed parts).
    """

    def __init__(
        self,
        running: Iterable[Held],
        pages: int,
        *,
        page: int = 1,
        adapter_pages: Mapping[str, int] | None = None,
        adapters_apart: int | None = None,
    ) -> None:
        self.pages, self.page = pages, page
        self._adapter_pages = adapter_pages or {}
        self._apart = adapters_apart
        self._held = list(running)
        self._used = {name for each in self._held for name in each.adapters}
        self._adapters = sum(self._adapter_pages[name] for name in self._used)
        self._peak = peak(self._held, page)

    @property
    def needed(self) -> int:
        """The pages that the batch needs at its peak, adapters included."""
        return self._peak + self._adapters

    def admit(self, candidate: Held) -> bool:
        """Count a candidate in if it fits, and say whether it did; a refusal changes nothing."""
        new = {name for name in candidate.adapters if name not in self._used}
        adapters = self._adapters + sum(self._adapter_pages[name] for name in new)
        room = self.pages - (adapters if self._apart is None else 0)
        if self._apart is not None and adapters > self._apart:
            return False
        alone = -(-(candidate.tokens + candidate.left) // self.page) - candidate.shared
        if max(self._peak, alone) > room:
            return False
        both = [*self._held, candidate]
        found = peak(both, self.page)
        if found > room:
            return False
        self._held, self._peak, self._adapters = both, found, adapters
        self._used |= new
        return True
