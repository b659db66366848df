"""First come, first served."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lorry.serving.request import Request
from lorry.serving.scheduling.policy import Policy, View, register_policy


@register_policy("fcfs")
@dataclass
class FirstCome(Policy):
    """In the order of arrival, up to the first that does not fit: nobody is overtaken."""

    def next(self, view: View) -> Iterator[Request]:
        """Yield the oldest as long as they are admitted."""
        yield from self.in_turn(self.oldest())
