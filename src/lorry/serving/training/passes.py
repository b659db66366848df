"""Requests of several clients in joint passes, each with the result that it would have alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
    outputs
        Filled in: for each example the log-probabilities of its targets, and its loss.
    error
        Filled in: why it failed.
    """

    adapter: str
    data: Sequence[Datum]
    kind: Loss
    config: dict[str, float]
    forward_only: bool = False
    outputs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    error: LorryError | None = None

    @property
    def logprobs(self) -> list[Tensor]:
        """The log-probabilities of all examples in their order."""
        return [self.outputs[place][0] for place in range(len(self.data))]

    @property
    def loss(self) -> float:
        """The sum over all examples."""
        return float(torch.stack([self.outputs[place][1].double() for place in range(len(self.data))]).sum())


def together(works: Sequence[Work], most: int) -> Iterator[list[tuple[Work, list[int]]]]:
    """Yield passes over all examples of requests: rows of like length beside each other, padded to at most `most`.

    Each pass is a list of requests with the places of their examples that take part. Forward passes go before those
    that keep a graph.
    """
    for only in (True, False):
        rows = [(len(d), n, place) for n, w in enumerate(works) if w.forward_only == only
                for place, d in enumerate(w.data)]  # fmt: skip
        rows.sort(key=lambda row: (-row[0], row[1], row[2]))
        while rows:
            count = max(1, most // rows[0][0])
            chosen, rows = rows[:count], rows[count:]
            parts: dict[int, list[int]] = {}
            for _, number, place in chosen:
                parts.setdefault(number, []).append(place)
            yield [(works[number], places) for number, places in sorted(parts.items())]


class Passes:
    """Runs joint passes.

    Parameters
    ----------
    base
        The model with the adapters of all clients.
    most
        Tokens of a pass with their padding, at most.
    """

    def __init__(self, base: Base, most: int) -> None:
        self.base, self.most = base, most
        self.count = 0

    def plan(self, works: Sequence[Work]) -> Iterable[Callable[[], None]]:
        """Return the passes over requests, to be run one after another."""
        return ((lambda parts=parts: self._run(parts)) for parts in together(works, self.most))  # type: ignore[misc]

    def _run(self, parts: list[tuple[Work, list[int]]]) -> None:
        """Run one pass; a request that fails does not touch the others."""
        live = [(work, places) for work, places in parts if work.error is None]
        if not live:
            return
        self.count += 1
        shares = [_share(work, places) for work, places in live]
        if live[0][0].forward_only:
            self._look(shares)
        else:
            train_pass(self.base, shares, seed=0)
        for (work, places), share in zip(live, shares, strict=True):
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
