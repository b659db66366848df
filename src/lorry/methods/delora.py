"""DeLoRA: rank units of unit length, with one trained strength for all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lorry.core.method.families import Bottleneck, check_rank
from lorry.core.method.registry import register
from lorry.core.method.spec import Tensors, TensorSpec, constant, kaiming, ones
from lorry.core.options import option
from lorry.core.sites.site import Site

#: Shortest length by which a unit is divided.
_SHORTEST = 1e-4


@register("delora", paper="arXiv 2503.18225", kinds=("linear", "conv"))
@dataclass(frozen=True)
class DeLoRA(Bottleneck):
    """``ΔW = λ/rank · Σ_i b_i a_iᵀ / (‖b_i‖ ‖a_i‖) · diag(‖W_:,j‖)`` with λ trained (equation 7), B zero at the start.

    The norms of the base weight's columns are taken once and kept with the adapter.

    Use it where long training or high rates make a LoRA run away: the length of the update is bounded by λ.
    """

    rank: int = option(8, "Rank of the update.", at_least=1)
    strength: float = option(15.0, "Start of λ, which bounds the update.", above=0)
    dropout: float = option(0.0, "Fraction of the update's input that is dropped in training.", at_least=0, below=1)

    def check_site(self, site: Site) -> None:
        """Refuse a rank above the width of the layer."""
        check_rank(site, self.rank)

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return A, B, λ ``(1,)`` and the norms of the columns ``(in,)``."""
        return {
            "A": TensorSpec((self.rank, site.in_features), kaiming),
            "B": TensorSpec((site.out_features, self.rank)),
            "strength": TensorSpec((1,), constant(self.strength)),
            "columns": TensorSpec((site.in_features,), ones, trained=False),
        }

    def setup(self, tensors: dict[str, Tensor], site: Site, generator: Generator) -> None:
        """Take the norms of the base weight's columns."""
        tensors["columns"].copy_(site.matrix().float().norm(dim=-2))

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return the factors with lengths, strength and norms folded in."""
        a, b = tensors["A"], tensors["B"]
        exact = torch.promote_types(b.dtype, torch.float32)  # short lengths and their inverses leave half precision
        lengths = a.to(exact).norm(dim=-1).clamp_min(_SHORTEST) * b.to(exact).norm(dim=-2).clamp_min(_SHORTEST)
        return a * tensors["columns"], (b * (tensors["strength"] / self.rank / lengths)).to(b.dtype)
