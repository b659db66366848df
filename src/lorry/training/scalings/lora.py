"""LoRA's scaling: alpha over the rank."""

from __future__ import annotations

from dataclasses import dataclass

from lorry.core.method.base import Method
from lorry.training.scalings import Scaling, register_scaling


@register_scaling("lora", paper="arXiv 2106.09685")
@dataclass(frozen=True)
class ByRank(Scaling):
    """``alpha / rank``: it is what methods with these options do by themselves; alpha is often twice the rank."""

    def factor(self, alpha: float, rank: int) -> float:
        """Return alpha over the rank."""
        return alpha / rank

    def of(self, method: Method) -> Method:
        """Return the method as it is, after a check that alpha over the rank is what scales it."""
        self._rank(method)
        return method
