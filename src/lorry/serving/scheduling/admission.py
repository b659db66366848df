"""Whether a request may join: the exact peak of the pages that a batch comes to hold (S-LoRA, 2311.03285, section 3).

After t more steps a request that holds n tokens holds n + t, until its last step, after which its pages are free. The
sum grows from one end of a request to the next, so its peak lies at one of these ends: with requests in falling order
of steps left, ``max over k of sum over j <= k of pages(tokens_j + left_k)``, which for pages of one token is the
paper's ``left_k * k + sum over j <= k of tokens_j``. The peak is reached if every request runs to its limit, so a batch
that fits never has to be preempted. Adapters take their pages as long as any request uses them; they are counted as
held throughout.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

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
        In any order. A thousand of them take less than a millisecond.
    page
        Tokens in a page.
    """
    most = whole = 0
    # pages of tokens and of `left` apart, and one more where their remainders make a page together
    remainders: list[int] = []
    for number, held in enumerate(sorted(running, key=lambda h: h.left, reverse=True), start=1):
        pages, remainder = divmod(held.tokens + page - 1, page)
        whole += pages - held.shared
        insort(remainders, remainder)
        further, rest = divmod(held.left, page)
        carried = number - bisect_left(remainders, page - rest)
        most = max(most, whole + number * further + carried)
    return most


def fits(held: Sequence[Held], pages: int, *, page: int = 1, adapter_pages: Mapping[str, int] | None = None) -> bool:
    """Whether a pool of `pages` holds these requests to their limits, with the adapters that they use, each once."""
    used = {name for each in held for name in each.adapters}
    sizes = {} if adapter_pages is None else adapter_pages
    return peak(held, page) + sum(sizes[name] for name in used) <= pages


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
        self._adapter_pages = {} if adapter_pages is None else adapter_pages
        self._apart = adapters_apart
        self._held = list(running)
        self._used = {name for each in self._held for name in each.adapters}
        self._adapters = sum(self._adapter_pages[name] for name in self._used)
        #: At least the peak: what the requests hold at their ends, as if these came at the same time.
        self._bound = sum(self._last(each) for each in self._held)

    @property
    def needed(self) -> int:
        """The pages that the batch needs at its peak, adapters included."""
        return peak(self._held, self.page) + self._adapters

    def admit(self, candidate: Held) -> bool:
        """Count a candidate in if it fits, and say whether it did; a refusal changes nothing."""
        new = {name for name in candidate.adapters if name not in self._used}
        adapters = self._adapters + sum(self._adapter_pages[name] for name in new)
        room = self.pages - (adapters if self._apart is None else 0)
        if self._apart is not None and adapters > self._apart:
            return False
        alone = self._last(candidate)
        bound = self._bound + alone
        if alone > room or (bound > room and peak([*self._held, candidate], self.page) > room):
            return False
        self._held.append(candidate)
        self._bound, self._adapters = bound, adapters
        self._used |= new
        return True

    def _last(self, held: Held) -> int:
        return -(-(held.tokens + held.left) // self.page) - held.shared
