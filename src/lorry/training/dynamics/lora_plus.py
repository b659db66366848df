"""LoRA+: B learns faster than A (Hayou et al. 2024, arXiv 2402.12354)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lorry.core.errors import OptionError
from lorry.core.options import option
from lorry.training.hooks import Dynamic, Moment, register_dynamic


@register_dynamic("lora-plus")
@dataclass(frozen=True)
class LoRAPlus(Dynamic):
    """Multiplies the learning rate of each B, for any method that has one; `rate-factors` does so for other tensors.

    A factor of the method's own (the preset lora-plus has one) stays, and is multiplied.
    """

    neutral: ClassVar = {"ratio": 1.0}

    ratio: float = option(16.0, "Learning rate of B relative to A.", above=0)

    def begin(self, at: Moment) -> None:
        """Put every B into a group of its own rate."""
        names = at.groups.names("*.B")
        if not names:
            raise OptionError(
                f"LoRA+ gives the tensors B another rate, and adapter '{at.adapter.name}' "
                f"({at.adapter.method.info.slug}) trains none; name tensors with rate-factors."
            )
        for name in names:
            at.groups.move([name], factor=at.groups.options(name)["factor"] * self.ratio)
