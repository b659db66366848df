"""One composition at a time: how a server schedules that switches or merges adapters (S-LoRA's PEFT baseline)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lorry.core.options import option
from lorry.serving.request import Request
from lorry.serving.scheduling.policy import Policy, View, register_policy


@register_policy("single")
@dataclass
class Single(Policy):
    """Admits what has the batch's composition, until too many others were passed over; then the batch runs empty."""

    passed: int = option(30, "Older requests with other adapters that may be passed over.", at_least=1)

    def next(self, view: View) -> Iterator[Request]:
        """Yield those with the composition of the batch, or of the oldest if nothing runs."""
        if not self.waiting:
            return
        first = view.running[0] if view.running else next(iter(self.waiting.values()))
        passed = 0
        for request in list(self.waiting.values()):
            if dict(request.composition) == dict(first.composition):
                yield request
                if request.id in self.waiting:
                    return
            else:
                passed += 1
                if passed >= self.passed:
                    return
