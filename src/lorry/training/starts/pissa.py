"""PiSSA's start: the top singular triples of the weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Generator, Tensor

from lorry.core.forward.entry import Entry
from lorry.core.method.spec import Observed
from lorry.core.options import option
from lorry.methods.parts.decompose import split_evenly, truncated_svd
from lorry.training.starts import LowRankStart, rank_of, register_start, scale_of


@register_start("pissa", paper="arXiv 2404.02948")
@dataclass(frozen=True)
class PiSSAStart(LowRankStart):
    """A and B start at the top singular triples of W, split evenly (equations 2 to 4); the frozen pair takes them back.

    On LoRA it is the method `pissa`, on DoRA it is DuDe.
    """

    iterations: int = option(0, "Subspace iterations of a fast randomised SVD; 0 computes the exact one.", at_least=0)

    def factors(self, entry: Entry, seen: Mapping[str, Observed], generator: Generator) -> tuple[Tensor, Tensor]:
        """Decompose the weight."""
        triples = truncated_svd(entry.site.matrix().float(), rank_of(entry), self.iterations, generator)
        return split_evenly(*triples, scale_of(entry))
