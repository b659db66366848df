"""Early abort under overload (S-LoRA, 2311.03285, section 5 and its released scheduler)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lorry.core.options import option
from lorry.serving.request import Request
from lorry.serving.scheduling.policy import Policy, View, register_policy

#: Weight of what was seen last in the running averages.
RECENT = 0.7


@register_policy("abort")
@dataclass
class EarlyAbort(Policy):
    """Gives up who cannot have a first token in time, and serves the newest first while more arrive than are admitted.

    The oldest are served first while the queue does not grow. A request's own deadline counts before the option.
    """

    deadline: float = option(6.0, "Seconds within which a first token is of use.", above=0)
    margin: float = option(0.5, "Seconds that the first token takes once a request is admitted.", at_least=0)

    def __post_init__(self) -> None:
        """Begin with nobody waiting and averages of nothing."""
        super().__post_init__()
        self._growth, self._batch, self._length = 0, 1, 0

    def drop(self, now: float) -> list[Request]:
        """Take out and return those who waited too long."""
        late = [r for r in self.waiting.values() if now - r.arrival + self.margin >= self._limit(r)]
        for request in late:
            self.leave(request.id)
        return late

    def next(self, view: View) -> Iterator[Request]:
        """Yield the newest or the oldest, up to the first that is refused."""
        before = len(self)
        self._growth = int(RECENT * (before - self._length) + (1 - RECENT) * self._growth)
        self._length = before
        order = self._newest() if self._growth >= self._batch else self.oldest()
        try:
            yield from self.in_turn(order)
        finally:
            admitted = before - len(self)
            self._batch = max(int(RECENT * admitted + (1 - RECENT) * self._batch), 1)

    def _newest(self) -> Iterator[Request]:
        while self.waiting:
            yield self.waiting[next(reversed(self.waiting))]

    def _limit(self, request: Request) -> float:
        return self.deadline if request.deadline is None else request.deadline
