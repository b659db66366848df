"""One training example of a client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Datum:
    """Tokens, and what the loss needs for them.

    Attributes
    ----------
    tokens
        Int64 ``(L,)``.
    inputs
        Name -> ``(L,)`` or ``(L, K)``: entry t belongs to what the model says after token t.
    """

    tokens: Tensor
    inputs: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.tokens)
