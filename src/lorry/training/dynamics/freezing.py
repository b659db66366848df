"""Tensors that are trained for a part of the run only."""

from __future__ import annotations

from dataclasses import dataclass

from lorry.core.errors import OptionError
from lorry.core.options import option
from lorry.training.hooks import Dynamic, Moment, register_dynamic


@register_dynamic("freezing")
@dataclass(frozen=True)
class Freezing(Dynamic):
    """Freezes the tensors that match a pattern when a stage of the job begins, and thaws them at another."""

    tensors: str = option("*.A", "Shell pattern on PATH.TENSOR.")
    stage: str = option("freeze", "Stage at which they are frozen (`stages` of the job says when it begins).")
    until: str = option("thaw", "Stage at which they are trained again, if there is one.")

    def at_stage(self, at: Moment, stage: str) -> None:
        """Freeze or thaw."""
        if stage == self.stage:
            names = at.groups.names(self.tensors)
            if not names:
                raise OptionError(f"Freezing: '{self.tensors}' matches no trained tensor of '{at.adapter.name}'.")
            at.groups.freeze(names)
        elif stage == self.until:
            at.groups.thaw(list(at.groups.resting))
