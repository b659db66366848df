"""LoRA-FA: A stands still (Zhang et al. 2023, arXiv 2308.03303)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lorry.core.errors import OptionError
from lorry.core.options import option
from lorry.training.hooks import Dynamic, Moment, register_dynamic
from lorry.training.schedule import warmup_steps


@register_dynamic("lora-fa")
@dataclass(frozen=True)
class LoRAFA(Dynamic):
    """Freezes each A, for any method that has one, so that its gradient and its moments need no memory.

    The method lora-fa, besides, keeps no input of the layer for the backward pass, and never trains A.
    """

    neutral: ClassVar = {"until": 0}
    apart: ClassVar = {"freezing": "both say when a tensor is trained; name A with freezing alone"}

    until: float | None = option(
        None, "Step at which A is trained after all (a fraction of the run if below 1); never if not given.", at_least=0
    )

    def begin(self, at: Moment) -> None:
        """Freeze A."""
        if self.until is not None and warmup_steps(self.until, at.total) == 0:
            return
        names = at.groups.names("*.A")
        if not names:
            raise OptionError(
                f"LoRA-FA freezes the tensors A, and adapter '{at.adapter.name}' ({at.adapter.method.info.slug}) "
                "trains none."
            )
        at.groups.freeze(names)

    def after_step(self, at: Moment) -> None:
        """Thaw A where the next step is to train it."""
        if self.until and warmup_steps(self.until, at.total) == at.step + 1:
            at.groups.thaw([name for name in at.groups.resting if name.endswith(".A")])
