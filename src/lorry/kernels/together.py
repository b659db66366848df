"""Products of all segments of a batch at once, where there is a better way than one segment after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from lorry.kernels.even import EvenRows, shares_evenly
from lorry.kernels.grouped import batch_plan, groupable, grouped_rows
from lorry.kernels.segments import LowRankPair, Segment


class BatchProducts(Protocol):
    """The products of all segments at one layer."""

    def forward(self, out: Tensor, x: Tensor) -> Tensor:
        """Add every segment's update to ``out (tokens, out)`` in place; return the rank units for `backward`."""

    def backward(self, dx: Tensor | None, dy: Tensor, x: Tensor, h: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Add the updates' share to ``dx`` in place, and return the gradients of all A and all B."""


#: Makes the products of a batch from its input ``(rows, ..., in)``, its segments, and A, B and None of each in a row.
Together = Callable[[Tensor, Sequence[Segment], Sequence[Tensor | None]], BatchProducts]


def together(
    x: Tensor, segments: Sequence[Segment], factors: Sequence[LowRankPair], plans: dict[Any, Any]
) -> Together | None:
    """Return how to multiply all segments at once, or None where each goes alone; `plans` keeps what layers share."""
    if len(segments) < 2:
        return None
    if groupable(x, segments, factors):
        plan = batch_plan(x, segments, plans)
        return None if plan is None else partial(grouped_rows, plan)
    return EvenRows if shares_evenly(x, segments, factors) else None
