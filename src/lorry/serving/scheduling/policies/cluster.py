"""Adapter clustering (S-LoRA, 2311.03285, section 5): a batch that has enough adapters is filled with those it has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lorry.core.options import option
from lorry.serving.request import Request
from lorry.serving.scheduling.policy import Policy, View, register_policy, to_front


@register_policy("cluster")
@dataclass
class Cluster(Policy):
    """First those whose adapters run already, once `adapters` different ones do, then in the order of arrival.

    More throughput than first come, first served, at the price of latency: a rare adapter may be overtaken for long.
    """

    adapters: int = option(8, "Different adapters in the batch from which on others wait.", at_least=1)

    def __post_init__(self) -> None:
        """Begin with nobody waiting."""
        super().__post_init__()
        self._alike: dict[frozenset[str], dict[str, Request]] = {}

    def arrive(self, request: Request, now: float) -> None:
        """Put a request into the queue, and beside those with its adapters."""
        super().arrive(request, now)
        self._alike.setdefault(frozenset(request.composition), {})[request.id] = request

    def again(self, request: Request, now: float) -> None:
        """Put a request that was preempted in front."""
        super().again(request, now)
        to_front(self._alike[frozenset(request.composition)], request.id)

    def leave(self, id: str) -> None:
        """Take a request out of both."""
        request = self.waiting.pop(id, None)
        if request is not None:
            names = frozenset(request.composition)
            del self._alike[names][id]
            if not self._alike[names]:
                del self._alike[names]

    def next(self, view: View) -> Iterator[Request]:
        """Yield those whose adapters run, also past one that is refused, then the oldest while they are admitted."""
        tried: set[str] = set()
        if len(view.adapters) >= self.adapters:
            for names, requests in list(self._alike.items()):
                if names <= view.adapters:
                    for request in list(requests.values()):
                        tried.add(request.id)
                        yield request
        yield from self.in_turn(iter([r for r in self.waiting.values() if r.id not in tried]))
