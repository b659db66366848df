"""RandLoRA: an update of full rank from fixed random bases that trained diagonals weigh."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Generator, Tensor

from lorry.core.method.families import Bottleneck
from lorry.core.method.registry import register
from lorry.core.method.spec import Layout, Tensors, TensorSpec, constant
from lorry.core.options import option
from lorry.core.sites.site import Site


def normed(tensor: Tensor, generator: Generator) -> None:
    """Fill with random values of zero mean and deviation one."""
    tensor.normal_(generator=generator)
    tensor.sub_(tensor.mean()).div_(tensor.std().clamp_min(1e-6))


@register("randlora", paper="arXiv 2502.00987", kinds=("linear",))
@dataclass(frozen=True)
class RandLoRA(Bottleneck):
    """``ΔW = alpha/rank · Σ_n B_n Λ_n A Γ_n`` (equation 4) with A and all B_n random, frozen and shared by all sites;
    the diagonals Λ are zero and Γ constant at the start, and there are enough bases n for full rank.

    A lies on the narrower side of the layer. `rank` is that of one basis.

    Use it where LoRA's rank is too low for the task and its full-rank update must cost few trained values.
    """

    rank: int = option(32, "Rank of one basis.", at_least=1)
    alpha: float | None = option(None, "Numerator of the scale alpha/rank; 20 times the rank if not given.", above=0)
    dropout: float = option(0.0, "Fraction of the update's input that is dropped in training.", at_least=0, below=1)
    save_projection: bool = option(
        False,
        "Write the shared bases to the checkpoint instead of drawing them again from the seed when loading.",
    )

    def _bases(self, site: Site) -> int:
        return math.ceil(min(site.shape) / self.rank)

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return Λ ``(rank, bases)`` and Γ ``(bases, narrow)``."""
        count = self._bases(site)
        return {
            "lambda": TensorSpec((self.rank, count)),
            "gamma": TensorSpec((count, min(site.shape)), constant(1 / max(site.shape))),
        }

    def layout(self, sites: Sequence[Site]) -> Layout:
        """Return each site's diagonals and the shared bases: A ``(rank, narrow)``, B ``(wide, bases, rank)``."""
        narrow, wide = max(min(s.shape) for s in sites), max(max(s.shape) for s in sites)
        shapes = {"basis_A": (self.rank, narrow), "basis_B": (wide, max(map(self._bases, sites)), self.rank)}
        shared = {n: TensorSpec(s, normed, trained=False, saved=self.save_projection) for n, s in shapes.items()}
        return Layout({site.path: self.tensors(site) for site in sites}, shared)

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return all weighed bases side by side: rank times their number of units."""
        count, narrow, wide = self._bases(site), min(site.shape), max(site.shape)
        a = tensors["basis_A"][:, None, :narrow] * tensors["lambda"].unsqueeze(-1) * tensors["gamma"]
        inner, outer = a.flatten(0, 1), tensors["basis_B"][:wide, :count].flatten(1)
        return (inner, outer) if site.in_features == narrow else (outer.mT, inner.mT)

    def scale(self, site: Site) -> float:
        """Return alpha/rank."""
        return 20.0 if self.alpha is None else self.alpha / self.rank
