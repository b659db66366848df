"""LoHa: the elementwise product of two low-rank matrices."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lorry.core.method.families import WeightDelta
from lorry.core.method.registry import register
from lorry.core.method.spec import Tensors, TensorSpec, kaiming
from lorry.core.options import option
from lorry.core.sites.site import Site


@register("loha", paper="arXiv 2108.06098")
@dataclass(frozen=True)
class LoHa(WeightDelta):
    """``ΔW = scale · (B1 A1) ⊙ (B2 A2)``, of rank up to rank² (FedPara, proposition 1; LyCORIS).

    The product is at the same time the LoRA of rank² whose units are the products of a unit of each pair,
    ``(B1_i ⊙ B2_j)(A1_i ⊙ A2_j)ᵀ``. It is applied in that form where rank² is small beside the widths, so no
    dense matrix is built. A2 alone starts at zero: with both B at zero nothing would ever learn.

    Use it for an update of higher rank at LoRA's count of values; common for diffusion models.
    """

    rank: int = option(8, "Rank of each of the two products.", at_least=1)
    alpha: float | None = option(None, "Numerator of the scale alpha/rank; the rank itself if not given.", above=0)
    dropout: float = option(0.0, "Fraction of the update's input that is dropped in training.", at_least=0, below=1)

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return A1, B1, A2, B2."""
        inner, outer = (*site.lead, self.rank, site.in_features), (*site.lead, site.out_features, self.rank)
        return {
            "A1": TensorSpec(inner, kaiming),
            "B1": TensorSpec(outer, kaiming),
            "A2": TensorSpec(inner),
            "B2": TensorSpec(outer, kaiming),
        }

    @property
    def _scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def delta(self, tensors: Tensors, site: Site) -> Tensor:
        """Return the product."""
        return (tensors["B1"] @ tensors["A1"]) * ((tensors["B2"] * self._scale) @ tensors["A2"])

    def bypass(self, x: Tensor, tensors: Tensors, site: Site) -> Tensor:
        """Return ``ΔW x`` by the factors of rank² where they are thin."""
        kind = site.kind
        if not kind.factors_apply(site) or 2 * self.rank**2 > min(site.out_features, site.in_features):
            return super().bypass(x, tensors, site)
        dtype = x.dtype if x.is_floating_point() else tensors["A1"].dtype
        a = (tensors["A1"].unsqueeze(-2) * tensors["A2"].unsqueeze(-3)).flatten(-3, -2).to(dtype)
        b = (tensors["B1"].unsqueeze(-1) * tensors["B2"].unsqueeze(-2)).flatten(-2).to(dtype)
        return kind.up(site, kind.down(site, x, a) * self._scale, b)
