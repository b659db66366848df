"""Learning rates that differ by tensor, as LoRA+ has them (Hayou et al. 2024, arXiv 2402.12354)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorry.core.errors import OptionError
from lorry.core.options import option
from lorry.training.hooks import Dynamic, Moment, register_dynamic


@register_dynamic("rate-factors")
@dataclass(frozen=True)
class RateFactors(Dynamic):
    """Multiplies the learning rate of the tensors that match a pattern: ``{"*.B": 16}`` is LoRA+ for any method.

    A factor of the method's own stays, and is multiplied; of several patterns that match, each counts.
    """

    factors: Mapping[str, float] | None = option(None, "Shell pattern on PATH.TENSOR -> factor.")

    def check(self) -> None:
        """Refuse factors that are not positive numbers."""
        given = self.factors or {}
        wrong = {p: f for p, f in given.items() if isinstance(f, bool) or not isinstance(f, int | float) or f <= 0}
        if wrong:
            raise OptionError(f"RateFactors: factors must be above 0, found {wrong}.")

    def begin(self, at: Moment) -> None:
        """Put the parameters into groups of their own rate."""
        for pattern, factor in (self.factors or {}).items():
            names = at.groups.names(pattern)
            if not names:
                raise OptionError(
                    f"RateFactors: '{pattern}' matches no trained tensor of adapter '{at.adapter.name}'; the first is "
                    f"'{next(iter(at.groups.names()), None)}'."
                )
            for name in names:
                at.groups.move([name], factor=at.groups.options(name)["factor"] * factor)
