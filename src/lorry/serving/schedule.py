"""Which requests run, and what each of them computes in the next pass."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from lorry.core.errors import AdapterError, LorryError
from lorry.serving.options import EngineOptions
from lorry.serving.paging.blocks import Block
from lorry.serving.paging.pool import Pool
from lorry.serving.paging.shelf import Shelf
from lorry.serving.request import Output
from lorry.serving.scheduling.admission import Admission, Held, peak
from lorry.serving.scheduling.policy import View, policy_from
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
    preemptions: int = 0


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
    waiting
        By id, those that the policy orders.
    running
        In the order in which they were admitted.
    """

    def __init__(self, pool: Pool, shelf: Shelf, options: EngineOptions) -> None:
        self.pool = pool
        self.shelf = shelf
        self.options = options
        self.policy = policy_from(options.policy)
        self.waiting: dict[str, Sequence] = {}
        self.running: list[Sequence] = []
        self.counts = Counts()
        #: Tokens of prompts that a pass computes at least, if there are so many.
        self._chunk = max(options.max_batch_tokens - options.max_running, 1)
        self._changed = False  # since nobody could be admitted

    def arrive(self, sequence: Sequence) -> None:
        """Let a request wait for its turn."""
        self.waiting[sequence.request.id] = sequence
        self.policy.arrive(sequence.request, time.monotonic())
        self._changed = True

    def shares(self) -> tuple[list[Share], list[tuple[Sequence, Output]]]:
        """Return what the next pass computes: a token of each request that decodes, and as much of prompts as fits; and
        requests that are not going to run, with what is to be said to their clients.
        """
        ended = [(self.waiting[request.id], _dropped(request.id)) for request in self.policy.drop(time.monotonic())]
        shares, room = [], self.options.max_batch_tokens
        for decodes in (True, False):
            for sequence in tuple(self.running):
                if sequence in self.running and (sequence.missing == 1) == decodes and room > 0:
                    share = Share(sequence, min(sequence.missing, room))
                    if self._cover(share):
                        shares.append(share)
                        room -= share.count
        shares = [share for share in shares if share.sequence in self.running]  # others may have had to make way
        if self.waiting and self._changed and room > 0 and len(self.running) < self.options.max_running:
            ended += self._admit_some(shares, room)
        self._prefetch()
        return shares, ended

    def used(self, sequence: Sequence) -> None:
        """Take note of a token that was generated."""
        self.policy.charge(sequence.request, 0, 1)

    def need(self, sequence: Sequence) -> int:
        """Return the pages that a request needs by itself, without its adapters."""
        return peak([Held(len(sequence.tokens), sequence.left - 1)], self.options.page_tokens)

    def leave(self, sequence: Sequence) -> None:
        """Let a request go that ran or waited."""
        self._changed = True
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        elif self.waiting.pop(sequence.request.id, None) is not None:
            self.policy.leave(sequence.request.id)

    # -- admission

    def _admit_some(self, shares: list[Share], room: int) -> list[tuple[Sequence, Output]]:
        """Admit waiting requests in the order of the policy as long as they fit."""
        failed = []
        self._changed = False
        view = View(time.monotonic(), [sequence.request for sequence in self.running])
        for request in self.policy.next(view):
            if room <= 0 or len(self.running) >= self.options.max_running:
                self._changed = True
                break
            sequence = self.waiting[request.id]
            try:
                if not self._admitted(sequence):
                    if self.running:
                        continue
                    raise AdapterError("The pool has no room for it beside the adapters that were pinned since.")
            except LorryError as error:
                failed.append((sequence, Output(request.id, finish="error", error=f"It cannot run. {error}")))
                self.policy.leave(request.id)
                continue
            del self.waiting[request.id]
            self.policy.leave(request.id)
            self.policy.charge(request, len(request.prompt), 0)
            share = Share(sequence, min(sequence.missing, room))
            if self._cover(share):
                shares.append(share)
                room -= share.count
        return failed

    def _admitted(self, sequence: Sequence) -> bool:
        """Let a request run if all can run to their ends beside it, and return whether it does."""
        known = sequence.swapped is None and not sequence.reads_prompt
        found = self.pool.blocks.match(sequence.root, sequence.tokens[:-1]) if known else []
        brought = []
        try:
            fits = self._fits(sequence, found)
            for resident in sequence.residents if fits else ():
                self.pool.use(resident)
                brought.append(resident)
                self.shelf.keep(resident)
        except BaseException:
            for resident in brought:
                self.pool.leave(resident)
            self.pool.release(found)
            raise
        if not fits:
            self.pool.release(found)
            return False
        self.running.append(sequence)
        sequence.blocks, fresh = found, not sequence.answered
        sequence.stored = len(found) * self.options.page_tokens
        if sequence.swapped is not None:
            self._swap_in(sequence, sequence.swapped)
        elif fresh:
            sequence.cached = sequence.stored
            self.counts.hits += bool(sequence.cached)
            self.counts.misses += not sequence.cached
            self.counts.cached += sequence.cached
            self.counts.prefilled += len(sequence.request.prompt) - sequence.cached
        return True

    def _fits(self, sequence: Sequence, found: list[Block]) -> bool:
        """Whether a request may run beside the others, where it shares the pages that were found for it."""
        sequences, size = (*self.running, sequence), self.options.page_tokens
        if self.pool.apart is None:
            # enough without a closer look: what all hold at their ends, as if these came at once and nothing was shared
            used = self.pool.pinned.union(*(each.residents for each in sequences))
            ends = sum(-(-(len(each.request.prompt) + each.request.sampling.max_tokens) // size) for each in sequences)
            if ends + sum(self.pool.cost(resident) for resident in used) <= self.pool.tokens.pages:
                return True
        blocks = [block for each in self.running for block in each.blocks] + found
        shared = {block.serial for block in blocks if block.users > 1}
        held, missing = [], 0
        for each in sequences:
            own = found if each is sequence else each.blocks
            chunks = 0
            left = each.missing - (len(found) * self.options.page_tokens if each is sequence else 0)
            if left > 1:
                missing += left
                chunks = -(-missing // self._chunk) - 1
            # on trust, only what it holds after its next pass counts
            further = 0 if self.options.overcommit else each.left - 1 + chunks
            names = tuple(str(id(resident)) for resident in each.residents)
            held.append(Held(len(each.tokens), further, sum(block.serial in shared for block in own), names))
        pinned = self.pool.pinned
        sizes = {str(id(r)): 0 if r in pinned else self.pool.cost(r) for each in sequences for r in each.residents}
        apart = self.pool.apart
        taken = sum(self.pool.cost(resident) for resident in pinned)
        return Admission(
            held[:-1],
            self.pool.tokens.pages - len(shared) - (taken if apart is None else 0),
            page=self.options.page_tokens,
            adapter_pages=sizes,
            adapters_apart=None if apart is None else apart - taken,
        ).admit(held[-1])

    # -- pages

    def _cover(self, share: Share) -> bool:
        """Take the pages that a share needs, and let those be found that get full; whether that went.

        Where there is less than was promised, requests that were admitted later make way, at the worst this one: the
        engine admits on trust, or an adapter was pinned meanwhile.
        """
        sequence, size = share.sequence, self.options.page_tokens
        stop = sequence.stored + share.count
        count = -(-stop // size) - len(sequence.blocks)
        while count > 0:
            try:
                sequence.blocks += self.pool.take(count)
                break
            except AdapterError:
                last = self.running[-1]
                self._preempt(last)
                if last is sequence:
                    return False
        for place in range(sequence.stored // size, stop // size):
            before = sequence.blocks[place - 1] if place else None
            tokens = sequence.tokens[place * size : (place + 1) * size]
            self.pool.blocks.publish(sequence.root, before, sequence.blocks[place], tokens)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Let a running request give its pages back and wait again."""
        self.counts.preemptions += 1
        self.running.remove(sequence)
        if self.options.preemption == "swap" and sequence.stored:
            pages = [block.page for block in sequence.blocks[: -(-sequence.stored // self.options.page_tokens)]]
            sequence.swapped = self.pool.tokens.memory[torch.tensor(pages)].cpu()
        # pages that were to be filled in this pass are not going to be
        self.pool.blocks.withdraw(sequence.blocks[sequence.stored // self.options.page_tokens :])
        self._release(sequence)
        sequence.stored = sequence.stored if sequence.swapped is not None else 0
        self.waiting[sequence.request.id] = sequence
        self.policy.arrive(sequence.request, time.monotonic())
        self._changed = False  # what is free now is for those that run

    def _swap_in(self, sequence: Sequence, swapped: torch.Tensor) -> None:
        """Put back what lay on the pages of a request."""
        sequence.blocks = self.pool.take(len(swapped))
        pages = torch.tensor([block.page for block in sequence.blocks])
        self.pool.tokens.memory[pages] = swapped.to(self.pool.tokens.device)
        sequence.swapped = None

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        for resident in sequence.residents:
            self.pool.leave(resident)

    def _prefetch(self) -> None:
        """Bring adapters of the next waiting requests, as far as nothing has to go for them."""
        first = islice(self.waiting.values(), self.options.prefetch)
        coming = [resident for sequence in first for resident in sequence.residents]
        self.shelf.fetch(coming)
        for resident in coming:
            if resident.place == "host":
                self.pool.prefetch(resident)


def _dropped(id: str) -> Output:
    text = "It waited longer than its first token could be of use. Send it again when the server has less to do."
    return Output(id, finish="dropped", error=text)


def passes(shares: list[Share]) -> Iterator[list[Share]]:
    """Yield the shares of each pass: one for all that may lie side by side, and one for each other composition."""
    groups: dict[object, list[Share]] = {}
    for share in shares:
        groups.setdefault(None if share.sequence.by_token else share.sequence.root, []).append(share)
    yield from groups.values()
