"""In which order waiting requests are tried: the protocol, and the registry of its members.

A policy holds the requests that wait. The engine tells it who arrives and leaves, and asks it whom to try next::

    for request in policy.drop(now):                     # they wait no longer
        ...                                              # tell their clients
    for request in policy.next(View(now, running)):
        if there is room for request:
            policy.leave(request.id)
            policy.charge(request, len(request.prompt), 0)
            ...                                          # admit it

A request that is still with the policy when the loop comes back to it was refused; whether the policy then goes on with
others or ends is its own business. A request that was preempted comes back in front of
those who wait (`again`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeVar

from lorry.core.options import check_options, from_options
from lorry.core.registry import Registry
from lorry.serving.request import Request

from . import policies


@dataclass(frozen=True)
class View:
    """What a policy sees of the engine.

    Attributes
    ----------
    now
        Seconds, on the clock of `Request.arrival`.
    running
        The requests of the batch, before anything is admitted in this round.
    """

    now: float
    running: Sequence[Request] = ()

    @cached_property
    def adapters(self) -> frozenset[str]:
        """The adapters that the batch uses."""
        return frozenset(name for request in self.running for name in request.composition)


class Policy(ABC):
    """Requests that wait, by id in the order in which they arrived. A subclass is a dataclass of its options."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        """Check every option against its declared range, and begin with nobody waiting."""
        check_options(self)
        self.waiting: dict[str, Request] = {}

    def __len__(self) -> int:
        """Return how many wait."""
        return len(self.waiting)

    def arrive(self, request: Request, now: float) -> None:
        """Put a request into the queue."""
        self.waiting[request.id] = request

    def again(self, request: Request, now: float) -> None:
        """Put a request that was preempted in front of those of its queue."""
        self.arrive(request, now)
        to_front(self.waiting, request.id)

    def leave(self, id: str) -> None:
        """Take a request out of the queue, since it was admitted or cancelled; unknown ones are ignored."""
        self.waiting.pop(id, None)

    @abstractmethod
    def next(self, view: View) -> Iterator[Request]:
        """Yield waiting requests in the order in which they are to be tried, each at most once."""

    def charge(self, request: Request, input_tokens: int, output_tokens: int) -> None:
        """Note what a request cost: its prompt when it is admitted, its answer as it grows."""
        return

    def drop(self, now: float) -> list[Request]:
        """Take out and return the requests that it gives up."""
        return []

    def in_turn(self, requests: Iterator[Request]) -> Iterator[Request]:
        """Yield requests up to the first that is refused."""
        for request in requests:
            yield request
            if request.id in self.waiting:
                return

    def oldest(self) -> Iterator[Request]:
        """Yield the request that waits longest, again and again as they leave."""
        while self.waiting:
            yield self.waiting[next(iter(self.waiting))]


def to_front(queue: dict[str, Request], id: str) -> None:
    """Make a request the first of a queue."""
    others = [other for other in queue if other != id]
    for other in others:
        queue[other] = queue.pop(other)


P = TypeVar("P", bound=type[Policy])
POLICIES: Registry[type[Policy]] = Registry("scheduling policy")
POLICIES.source(policies.__name__, policies.__path__)


def register_policy(name: str) -> Callable[[P], P]:
    """Return a decorator that registers a policy under a name."""
    return POLICIES.named(name)


def policy_from(value: str | Mapping[str, Any] = "fcfs") -> Policy:
    """Return a new policy from its name, or from ``{"policy": name, **options}``.

    Raises
    ------
    OptionError
        An unknown name or option, with near misses, or a value out of its range.
    """
    options = {"policy": value} if isinstance(value, str) else dict(value)
    return from_options(POLICIES.find(str(options.pop("policy", "fcfs"))), options)
