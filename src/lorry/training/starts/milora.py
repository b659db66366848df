"""MiLoRA's start: the bottom singular triples of the weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lorry.core.forward.entry import Entry
from lorry.core.method.spec import Observed
from lorry.methods.parts.decompose import split_evenly
from lorry.training.starts import LowRankStart, rank_of, register_start, scale_of


@register_start("milora", paper="arXiv 2406.09044")
@dataclass(frozen=True)
class MiLoRA(LowRankStart):
    """A and B start at the bottom singular triples of W (section 3.2): what pretraining used least is trained, and what
    it used most stays.
    """

    def factors(self, entry: Entry, seen: Mapping[str, Observed], generator: Generator) -> tuple[Tensor, Tensor]:
        """Decompose the weight."""
        u, s, vt = torch.linalg.svd(entry.site.matrix().float(), full_matrices=False)
        rank = rank_of(entry)
        return split_evenly(u[..., -rank:], s[..., -rank:], vt[..., -rank:, :], scale_of(entry))
