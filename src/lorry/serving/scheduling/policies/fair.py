"""A fair queue by counters of tokens (VTC, 2401.00588)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorry.core.errors import OptionError
from lorry.core.options import option
from lorry.serving.request import Request
from lorry.serving.scheduling.policy import Policy, View, register_policy, to_front


@register_policy("fair")
@dataclass
class Fair(Policy):
    """Who has had the least is next; a prompt's tokens count once, an answer's twice, divided by the owner's weight.

    An owner who comes back after a pause starts at the least counter of those who wait: nothing is saved up.
    """

    by: str = option("key", "Whose turn it is.", choices=("key", "adapter"))
    input_price: float = option(1.0, "What a token of a prompt counts.", at_least=0)
    output_price: float = option(2.0, "What a token of an answer counts.", at_least=0)
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Begin with nobody waiting and nothing charged."""
        super().__post_init__()
        for owner, weight in self.weights.items():
            if not weight > 0:
                raise OptionError(f"Fair: the weight of '{owner}' must be above 0, found {weight!r}.")
        self.counters: dict[str, float] = {}
        self._queues: dict[str, dict[str, Request]] = {}

    def owner(self, request: Request) -> str:
        """Return whose turn a request takes: its key's, or that of its adapters together."""
        return request.key if self.by == "key" else "+".join(sorted(request.composition))

    def arrive(self, request: Request, now: float) -> None:
        """Put a request into its owner's queue; who had nothing waiting is raised to the least of the others."""
        super().arrive(request, now)
        owner = self.owner(request)
        if owner not in self._queues:
            least = min((self.counters[other] for other in self._queues), default=0.0)
            self.counters[owner] = max(self.counters.get(owner, 0.0), least)
        self._queues.setdefault(owner, {})[request.id] = request

    def again(self, request: Request, now: float) -> None:
        """Put a request that was preempted in front of its owner's queue."""
        super().again(request, now)
        to_front(self._queues[self.owner(request)], request.id)

    def leave(self, id: str) -> None:
        """Take a request out of its owner's queue."""
        request = self.waiting.pop(id, None)
        if request is not None:
            owner = self.owner(request)
            del self._queues[owner][id]
            if not self._queues[owner]:
                del self._queues[owner]

    def next(self, view: View) -> Iterator[Request]:
        """Yield the oldest of whoever has had the least, up to the first that is refused."""
        yield from self.in_turn(self._turns())

    def _turns(self) -> Iterator[Request]:
        while self._queues:
            owner = min(self._queues, key=self._counter)
            yield next(iter(self._queues[owner].values()))

    def _counter(self, owner: str) -> Any:
        return self.counters[owner]

    def charge(self, request: Request, input_tokens: int, output_tokens: int) -> None:
        """Add to the counter of a request's owner."""
        owner = self.owner(request)
        price = self.input_price * input_tokens + self.output_price * output_tokens
        self.counters[owner] = self.counters.get(owner, 0.0) + price / self.weights.get(owner, 1.0)
