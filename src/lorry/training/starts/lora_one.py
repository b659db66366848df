"""LoRA-One's start: the first singular triples of one full gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from lorry.core.forward.entry import Entry
from lorry.core.method.spec import Observed
from lorry.core.options import option
from lorry.methods.parts.decompose import truncated_svd
from lorry.training.starts import LowRankStart, rank_of, register_start
from lorry.training.starts._gradients import gradient_at


@register_start("lora-one", paper="arXiv 2502.01235")
@dataclass(frozen=True)
class LoRAOne(LowRankStart):
    """A and B start at the first r singular vectors of -G, each times ``√(s_i / s_1) / √γ``: the product points along
    the first step of full fine-tuning.
    """

    probes: ClassVar[tuple[str, ...]] = ("gradient",)

    gamma: float = option(128.0, "γ, by which the start is divided; smaller starts larger.", above=0)
    iterations: int = option(4, "Subspace iterations of a randomised SVD; 0 computes the exact one.", at_least=0)

    def factors(self, entry: Entry, seen: Mapping[str, Observed], generator: Generator) -> tuple[Tensor, Tensor]:
        """Decompose the gradient."""
        rank = rank_of(entry)
        gradient = gradient_at(entry, seen, self.name)
        u, s, vt = truncated_svd(-gradient, rank, self.iterations, generator, oversampled=4 * rank)
        root = (s / s[..., :1].clamp_min(1e-30)).sqrt() / math.sqrt(self.gamma)
        return root.unsqueeze(-1) * vt, u * root.unsqueeze(-2)
