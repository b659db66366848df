"""DenseLoRA: one encoder and one decoder for all layers of a type, and a small dense core for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lorry.core.method.call import Call
from lorry.core.method.registry import register
from lorry.core.method.spec import Layout, Tensors, TensorSpec, kaiming
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.methods.lora import LoRA
from lorry.methods.parts.sharing import by_type, of_type


@register("dense-lora", paper="arXiv 2505.23808", kinds=lambda kind: kind.additive)
@dataclass(frozen=True)
class DenseLoRA(LoRA):
    """``y = W x + scale · gelu(B M gelu(A x))`` with A and B shared by the sites of one type, and a core M ``(rank,
    rank)`` for each site (section 3).

    Sites are of one type if their paths differ in numbers of layers only. B is zero at the start.

    Use it in deep models for a fraction of LoRA's values at a higher rank, where fusing is no matter.
    """

    rank: int = option(16, "Rank of the core.", at_least=1)

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return the core; A and B belong to all sites of its type."""
        return {"core": TensorSpec((self.rank, self.rank), kaiming)}

    def layout(self, sites: Sequence[Site]) -> Layout:
        """Return the cores, and A and B of each type."""
        return by_type(sites, lambda site, _: self.tensors(site), lambda site, _: LoRA.tensors(self, site))

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return the pair of the site's type."""
        return of_type(tensors, site, "A"), of_type(tensors, site, "B")

    def mid(self, h: Tensor, call: Call, tensors: Tensors) -> Tensor:
        """Apply the core to the bent code."""
        return F.linear(F.gelu(h), tensors["core"].to(h.dtype))

    def bend(self, update: Tensor, call: Call, tensors: Tensors) -> Tensor:
        """Bend what the decoder gives."""
        return F.gelu(update)
