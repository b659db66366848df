"""HiRA: a low-rank modulation of the base weight, whose update has full rank."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lorry.core.method.families import WeightDelta, check_rank
from lorry.core.method.registry import register
from lorry.core.method.spec import Tensors, TensorSpec, kaiming
from lorry.core.options import option
from lorry.core.sites.site import Site


@register("hira", paper="ICLR 2025, openreview.net/forum?id=TwJrTz9cRS")
@dataclass(frozen=True)
class HiRA(WeightDelta):
    """``ΔW = W ⊙ (scale · B A)`` with A ``(rank, in)`` random and B ``(out, rank)`` zero at the start
    (equation 2).

    Use it where a low-rank update is too narrow (much new knowledge) and the base weight is a good pattern for the
    change.
    """

    rank: int = option(32, "Rank of the modulation.", at_least=1)
    alpha: float | None = option(None, "Numerator of the scale alpha/rank; the rank itself if not given.", above=0)
    dropout: float = option(0.0, "Fraction of the update's input that is dropped in training.", at_least=0, below=1)

    def check_site(self, site: Site) -> None:
        """Refuse a rank above the width of the layer."""
        check_rank(site, self.rank)

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return A and B."""
        return {
            "A": TensorSpec((*site.lead, self.rank, site.in_features), kaiming),
            "B": TensorSpec((*site.lead, site.out_features, self.rank)),
        }

    def delta(self, tensors: Tensors, site: Site) -> Tensor:
        """Return ``W ⊙ (scale · B A)`` for the base weight as it is now."""
        scale = 1.0 if self.alpha is None else self.alpha / self.rank
        modulation = (tensors["B"] * scale) @ tensors["A"]
        return site.matrix().to(modulation.dtype) * modulation
