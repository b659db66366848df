"""Orthogonal: A begins with orthogonal rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from lorry.core.forward.entry import Entry
from lorry.core.method.families import check_rank
from lorry.core.method.spec import Observed
from lorry.training.starts import LowRankStart, low_rank, register_start


@register_start("orthogonal", paper="arXiv 1312.6120")
@dataclass(frozen=True)
class Orthogonal(LowRankStart):
    """The rows of A are orthogonal, with the norm that the method's own start has in the mean; B is zero."""

    product: ClassVar[bool] = False

    def factors(self, entry: Entry, seen: Mapping[str, Observed], generator: Generator) -> tuple[Tensor, Tensor]:
        """Draw the rows of A."""
        a, b = low_rank(entry, self)
        check_rank(entry.site, a.shape[-2])
        drawn = torch.linalg.qr(torch.randn(*a.shape[:-2], a.shape[-1], a.shape[-2], generator=generator))[0].mT
        return drawn * a.norm(dim=-1).mean().cpu(), torch.zeros_like(b)
