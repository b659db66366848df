"""SineLoRA: the sine of a low-rank product, which has full rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lorry.core.method.families import WeightDelta, check_rank
from lorry.core.method.registry import register
from lorry.core.method.spec import Tensors, TensorSpec, kaiming
from lorry.core.options import option
from lorry.core.sites.site import Site


@register("sinelora", paper="arXiv 2403.19243")
@dataclass(frozen=True)
class SineLoRA(WeightDelta):
    """``ΔW = sin(ω · B A) / √out`` with A ``(rank, in)`` random and B ``(out, rank)`` zero at the start (section 3.2).

    The sine is that of the weight's update, as in the paper, so it fuses exactly. A public program takes the sine of
    the layer's output and fuses as if it had not; that is another function, and it has no weight.

    Use it at very small ranks: the sine gives the update full rank at no further value. The rate must fall as ω
    rises.
    """

    rank: int = option(8, "Rank of the product under the sine.", at_least=1)
    frequency: float = option(200.0, "Frequency ω.", above=0)
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
        """Return the sine of the product, in float32 or better: ω multiplies its rounding errors."""
        a, b = tensors["A"], tensors["B"]
        exact = torch.promote_types(a.dtype, torch.float32)
        return torch.sin(self.frequency * (b.to(exact) @ a.to(exact))) / math.sqrt(site.out_features)
