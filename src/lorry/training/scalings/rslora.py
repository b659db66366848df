"""rsLoRA's scaling: alpha over the root of the rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from lorry.core.method.base import Method
from lorry.training.scalings import STABILIZED, Scaling, register_scaling, takes_stabilized


@register_scaling("rslora", paper="arXiv 2312.03732")
@dataclass(frozen=True)
class ByRoot(Scaling):
    """``alpha / sqrt(rank)``: the size of the update's steps does not fall as the rank grows (theorem 3.2)."""

    stabilizes: ClassVar[bool] = True

    def factor(self, alpha: float, rank: int) -> float:
        """Return alpha over the root of the rank."""
        return alpha / math.sqrt(rank)

    def of(self, method: Method) -> Method:
        """Return the method with its own option for this scale, where it has one: PEFT's format carries that."""
        if takes_stabilized(method):
            self._rank(method)
            return method.with_options(**{STABILIZED: True})
        return super().of(method)
