"""OLoRA's start: the QR decomposition of the weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lorry.core.forward.entry import Entry
from lorry.core.method.spec import Observed
from lorry.training.starts import LowRankStart, rank_of, register_start


@register_start("olora", paper="arXiv 2406.01775")
@dataclass(frozen=True)
class OLoRAStart(LowRankStart):
    """B starts at the first columns of Q and A at the first rows of R of ``W = Q R`` (algorithm 1); on LoRA it is the
    method `olora`.
    """

    def factors(self, entry: Entry, seen: Mapping[str, Observed], generator: Generator) -> tuple[Tensor, Tensor]:
        """Decompose the weight."""
        q, r = torch.linalg.qr(entry.site.matrix().float())
        rank = rank_of(entry)
        return r[..., :rank, :], q[..., :rank]
