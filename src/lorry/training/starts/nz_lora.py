"""NZ-LoRA's start: both factors are random."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lorry.core.forward.entry import Entry
from lorry.core.method.spec import Observed
from lorry.core.options import option
from lorry.training.starts import LowRankStart, low_rank, register_start


@register_start("nz-lora", paper="arXiv 2505.23194")
@dataclass(frozen=True)
class NonZero(LowRankStart):
    """A and B are both uniform in ``±√(c / in)``, and the frozen pair takes their product back, so that both have a
    gradient from the first step on.
    """

    variance: float = option(1.0, "c; 1 is LoRA's usual bound for A.", above=0)

    def factors(self, entry: Entry, seen: Mapping[str, Observed], generator: Generator) -> tuple[Tensor, Tensor]:
        """Draw A and B."""
        bound = math.sqrt(self.variance / entry.site.in_features)
        a, b = (torch.empty(t.shape).uniform_(-bound, bound, generator=generator) for t in low_rank(entry, self))
        return a, b
