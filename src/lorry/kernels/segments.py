"""The rows of a batch that use one adapter, and what they multiply with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Rows = slice | Tensor | None


@dataclass(frozen=True)
class Segment:
    """Rows of a batch that use one adapter.

    Attributes
    ----------
    rows
        None for all rows, a slice, or indices into the first dimension of x.
    scale
        Factor of the update.
    p, seed
        Dropout of the update's input, and the seed of its mask.
    weights
        A further factor for each row of the segment ``(rows,)``, the same tensor at every layer; None for 1.
    """

    rows: Rows
    scale: float
    p: float = 0.0
    seed: int = 0
    weights: Tensor | None = None

    def factor(self, dtype: torch.dtype) -> float | Tensor:
        """Return scale and weights together: a number, or one for each row."""
        if self.weights is None:
            return self.scale
        exact = torch.promote_types(dtype, self.weights.dtype)
        return (self.weights.to(exact) * self.scale).to(dtype)


@dataclass(frozen=True)
class LowRankPair:
    """What a segment multiplies with: A ``(rank, in)``, B ``(out, rank)``, and a gain ``(out,)`` of base and update
    together.
    """

    a: Tensor
    b: Tensor
    gain: Tensor | None = None


def take(x: Tensor, rows: Rows) -> Tensor:
    """Return the rows of x: a view for a slice, a copy for indices."""
    if rows is None:
        return x
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)
