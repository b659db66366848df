"""To which of many replicas a request goes."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

from lorry.core.registry import Registry


class Router(ABC):
    """Knows how many requests each replica has, and where each adapter was sent.

    Parameters
    ----------
    replicas
        How many there are.
    slack
        By how many requests a replica that has the adapter may be busier than the idlest one.
    seed
        Of what it draws.
    """

    def __init__(self, replicas: int, slack: int = 4, seed: int = 0) -> None:
        self.load = [0] * replicas
        self.slack = slack
        self.draw = random.Random(seed)
        self._by_load: list[dict[int, None]] = [dict.fromkeys(range(replicas))]
        self._least = 0
        self._holders: dict[int, dict[int, None]] = {}

    @abstractmethod
    def choose(self, adapter: int) -> int:
        """Return the replica for a request with this adapter."""

    def began(self, replica: int, adapter: int) -> None:
        """Note that a replica was given a request, and so gets its adapter."""
        self._move(replica, 1)
        self._holders.setdefault(adapter, {})[replica] = None

    def ended(self, replica: int) -> None:
        """Note that a replica is done with a request."""
        self._move(replica, -1)

    def forgot(self, replica: int, adapter: int) -> None:
        """Note that a replica has dropped an adapter."""
        self._holders.get(adapter, {}).pop(replica, None)

    def idlest(self) -> int:
        """Return a replica with the least requests."""
        return next(iter(self._by_load[self._least]))

    def _move(self, replica: int, by: int) -> None:
        before, after = self.load[replica], self.load[replica] + by
        self.load[replica] = after
        del self._by_load[before][replica]
        while after >= len(self._by_load):
            self._by_load.append({})
        self._by_load[after][replica] = None
        self._least = min(self._least, after)
        while not self._by_load[self._least]:
            self._least += 1


R = TypeVar("R", bound=type[Router])
ROUTERS: Registry[type[Router]] = Registry("routing policy")


def _register(name: str) -> Callable[[R], R]:
    return ROUTERS.named(name)


@_register("random")
class Random(Router):
    """To any replica."""

    def choose(self, adapter: int) -> int:
        """Draw one."""
        return self.draw.randrange(len(self.load))


@_register("hash")
class Hashed(Router):
    """An adapter's requests always to the same replica, however busy it is."""

    def choose(self, adapter: int) -> int:
        """Return the replica that the adapter's number gives."""
        return (adapter * 0x9E3779B1 & 0xFFFFFFFF) * len(self.load) >> 32


@_register("affinity")
class Affinity(Router):
    """To the idlest replica that has the adapter, unless it is busier than the idlest of all by more than `slack`."""

    def choose(self, adapter: int) -> int:
        """Return the idlest holder, or the idlest of all."""
        idlest = self.idlest()
        holders = self._holders.get(adapter)
        if not holders:
            return idlest
        best = min(holders, key=self.load.__getitem__)
        return best if self.load[best] <= self.load[idlest] + self.slack else idlest
