"""Requests of several clients in joint passes, each with the result that it would have alone."""

from __future__ import annotations

import heapq
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorry.core.errors import LorryError
from lorry.serving.training.datum import Datum
from lorry.serving.training.errors import Refused
from lorry.serving.training.losses import Loss
from lorry.serving.training.task import DatumTask
from lorry.training.joint import Base, Share, forward, train_pass
from lorry.training.task import Examples, PlainReport, Prepared

_log = logging.getLogger(__name__)

#: Padding of a pass, at most: as many tokens as it has anyway, or this.
_PADDING = 256


@dataclass(eq=False)
class Work:
    """A request for a pass.

    Attributes
    ----------
    adapter
        The name of its model's adapter.
    data, kind, config
        The examples, the loss and its numbers.
    forward_only
        Whether no gradient is wanted.
    owner
        Whose model it is.
    outputs
        Filled in: for each example the log-probabilities of its targets, and its loss.
    error
        Filled in: why it failed.
    left
        The examples that had no pass yet, the longest last.
    """

    adapter: str
    data: Sequence[Datum]
    kind: Loss
    config: dict[str, float]
    forward_only: bool = False
    owner: str = ""
    outputs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    error: LorryError | None = None
    left: list[int] = field(init=False)

    def __post_init__(self) -> None:
        """Order the examples."""
        self.left = sorted(range(len(self.data)), key=lambda place: (len(self.data[place]), -place))

    @property
    def done(self) -> bool:
        """Whether there is nothing more to do for it."""
        return self.error is not None or not self.left

    @property
    def logprobs(self) -> list[Tensor]:
        """The log-probabilities of all examples in their order."""
        return [self.outputs[place][0] for place in range(len(self.data))]

    @property
    def loss(self) -> float:
        """The sum over all examples."""
        return float(torch.stack([self.outputs[place][1].double() for place in range(len(self.data))]).sum())


class Turns:
    """Who comes next: the owner with the fewest tokens so far, and of its models the one with the fewest.

    One that comes, or comes again, begins where the one with the fewest of those that wait is, so that nobody saves
    turns up.
    """

    def __init__(self) -> None:
        self._owners: dict[str, int] = {}
        self._models: dict[str, int] = {}

    def wait(self, works: Sequence[Work]) -> None:
        """Say who waits."""
        self._owners = _entered(self._owners, {work.owner for work in works})
        self._models = _entered(self._models, {work.adapter for work in works})

    def place(self, work: Work) -> tuple[int, int]:
        """Return a request's place; the least comes first."""
        return self._owners[work.owner], self._models[work.adapter]

    def take(self, work: Work, tokens: int) -> None:
        """Count tokens of a request."""
        self._owners[work.owner] += tokens
        self._models[work.adapter] += tokens


def _entered(counts: Mapping[str, int], names: set[str]) -> dict[str, int]:
    least = min((counts[name] for name in names if name in counts), default=0)
    return {name: counts.get(name, least) for name in sorted(names)}


def together(works: Sequence[Work], turns: Turns, most: int) -> list[tuple[Work, list[int]]]:
    """Choose the examples of the next pass: in fair turns, with rows of like length beside each other.

    Parameters
    ----------
    works
        Requests that are not done, those of a model in their order.
    turns
        Who comes next; notes who came.
    most
        Tokens of the pass with its padding, at most; a longer row goes alone.

    Returns
    -------
    list
        Requests with the places of their examples that take part; all of them forward only, or none.
    """
    turns.wait(works)
    ahead: dict[str, deque[Work]] = {}
    for work in works:
        ahead.setdefault(work.adapter, deque()).append(work)
    waiting = [(*turns.place(queue[0]), number, queue) for number, queue in enumerate(ahead.values())]
    heapq.heapify(waiting)
    chosen: dict[Work, list[int]] = {}
    count = longest = tokens = 0
    while waiting:
        *place, number, queue = heapq.heappop(waiting)
        work = queue[0]
        if turns.place(work) > tuple(place):  # its owner took others since
            heapq.heappush(waiting, (*turns.place(work), number, queue))
            continue
        length = len(work.data[work.left[-1]])
        padded = max(longest, length) * (count + 1)
        room = padded <= most and padded - tokens - length <= max(tokens + length, _PADDING)
        if chosen and not (room and work.forward_only == next(iter(chosen)).forward_only):
            continue
        count, longest, tokens = count + 1, max(longest, length), tokens + length
        chosen.setdefault(work, []).append(work.left.pop())
        turns.take(work, length)
        if not work.left:
            queue.popleft()
        if queue:
            heapq.heappush(waiting, (*turns.place(queue[0]), number, queue))
    return list(chosen.items())


class Passes:
    """Runs joint passes.

    Parameters
    ----------
    base
        The model with the adapters of all clients.
    most
        Tokens of a pass with their padding, at most.

    Attributes
    ----------
    count
        How many there were.
    """

    def __init__(self, base: Base, most: int) -> None:
        self.base, self.most = base, most
        self.count = 0
        self._turns = Turns()

    def next(self, works: Sequence[Work]) -> list[Work]:
        """Run the next pass over requests that are not done, and return those that took part."""
        parts = together(works, self._turns, self.most)
        self._run(parts)
        return [work for work, _ in parts]

    def _run(self, parts: list[tuple[Work, list[int]]]) -> None:
        """Run one pass; a request that fails does not touch the others."""
        self.count += 1
        shares = [_share(work, places) for work, places in parts]
        try:
            if parts[0][0].forward_only:
                self._look(shares)
            else:
                train_pass(self.base, shares, seed=0)
        except Exception as error:
            _log.exception("A joint pass failed.")
            for share in shares:
                share.error = f"the server failed ({type(error).__name__}); its log says more"
        for (work, places), share in zip(parts, shares, strict=True):
            if share.error is not None:
                work.error = Refused(f"The pass failed: {share.error}. Its gradient is not used.")
                continue
            assert isinstance(share.task, DatumTask)
            work.outputs.update(zip(places, share.task.found, strict=True))

    def _look(self, shares: list[Share]) -> None:
        """Run shares forward only; if they fail together, each alone."""
        try:
            with torch.no_grad(), forward(self.base, shares) as outcome:
                for share, (own, targets) in zip(shares, outcome.parts, strict=True):
                    share.task.losses(own, targets)
        except (ValueError, RuntimeError, IndexError, TypeError, KeyError) as error:
            if len(shares) == 1:
                shares[0].error = f"{type(error).__name__}: {error}"
                return
            for share in shares:
                self._look([share])


def _share(work: Work, places: list[int]) -> Share:
    data = [work.data[place] for place in places]
    task = DatumTask(data, work.kind, work.config)
    return Share(work.adapter, Prepared(task, Examples((), PlainReport(0, 0))), data)
