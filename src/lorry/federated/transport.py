"""How messages get from the server to clients and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class Transport(Protocol):
    """How messages get to clients."""

    def names(self) -> Sequence[str]:
        """Return the clients that can be reached now; others may come later."""
        ...

    def exchange(self, messages: Mapping[str, bytes]) -> Mapping[str, bytes | Exception]:
        """Send each client its message; return the answers, an exception or nothing where a client failed."""
        ...


@dataclass
class InProcess:
    """Clients in this process: the simulation. Each has its own data and shares the base with all others.

    Attributes
    ----------
    answers
        Client -> what answers a message (`Client.answer`); clients may be added and removed between rounds.
    """

    answers: dict[str, Callable[[bytes], bytes]] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Return all clients."""
        return list(self.answers)

    def exchange(self, messages: Mapping[str, bytes]) -> dict[str, bytes | Exception]:
        """Let each client answer, one after the other."""
        found: dict[str, bytes | Exception] = {}
        for name, message in messages.items():
            try:
                found[name] = self.answers[name](message)
            except Exception as failure:  # a client that breaks must not take the round with it
                found[name] = failure
        return found
