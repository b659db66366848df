"""One micro-batch of every job at a time, rows padded to the longest of their pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorry.core.options import option
from lorry.training.joint import Share, grouped
from lorry.training.pass_planner import PassPlanner, register_planner


@register_planner("joined")
@dataclass(frozen=True)
class Joined(PassPlanner):
    """Every job's next micro-batch, in as few passes as padding and memory allow."""

    max_pad_ratio: float | None = option(
        2.0, "Most tokens of a pass, padding included, as a multiple of those alone; null joins all.", at_least=1
    )
    max_tokens: int | None = option(None, "Most tokens of a pass, padding included.", at_least=1)

    def passes(self, shares: Sequence[Share]) -> list[list[Share]]:
        """Return the shares in passes of one family each."""
        return grouped(shares, self.max_pad_ratio, self.max_tokens)
