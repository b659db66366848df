"""GoRA's start: ranks and B from the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from lorry.core.forward.entry import Entry
from lorry.core.method.base import Method
from lorry.core.method.spec import Observed
from lorry.core.options import option
from lorry.training.starts import LowRankStart, low_rank, register_start, scale_of
from lorry.training.starts._gradients import gradient_at
from lorry.training.starts._ranks import allocated


@register_start("gora", paper="arXiv 2502.12171")
@dataclass(frozen=True)
class GoRA(LowRankStart):
    """Ranks go to the layers in proportion to the mean of ``|W ⊙ G|``, G being the mean gradient; A stays random, and B
    starts where ``scale · B A`` is the best approximation of a step against G in A's row space, of the relative size
    `step` (sections 3.2 and 3.3).

    The paper keeps that as a first step of full fine-tuning; here the frozen pair takes it back, unless `first_step` is
    set. The step is as long as G would be with the weight's own norm, times `step`.
    """

    probes: ClassVar[tuple[str, ...]] = ("gradient",)

    step: float = option(0.05, "Norm of the step relative to that of the weight.", above=0)
    first_step: bool = option(False, "Begin with the step taken, which changes the function.")
    least_rank: int = option(1, "Smallest rank of a layer.", at_least=1)
    most_rank: int = option(64, "Largest rank of a layer.", at_least=1)
    keep_scale: bool = option(True, "Change alpha with a layer's rank, so that the scale stays the same.")

    @property
    def keeps_function(self) -> bool:
        """Whether the step is taken back."""
        return not self.first_step

    def allocate(self, entries: Mapping[str, Entry], seen: Mapping[str, Observed]) -> dict[str, Method | None]:
        """Return the layers whose rank changes."""
        return allocated(entries, seen, self.least_rank, self.most_rank, self.keep_scale)

    def factors(self, entry: Entry, seen: Mapping[str, Observed], generator: Generator) -> tuple[Tensor, Tensor]:
        """Return A as it is, and B by the pseudo-inverse of A."""
        a, _ = low_rank(entry, self)
        gradient, weight = gradient_at(entry, seen, self.name), entry.site.matrix().float().cpu()
        own = a.detach().float().cpu()
        towards = gradient @ torch.linalg.pinv(own)  # the nearest B A to the gradient in the row space of A
        length = self.step * weight.norm() / gradient.norm()
        return own, -towards * length / scale_of(entry)
