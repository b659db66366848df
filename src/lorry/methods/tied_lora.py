"""Tied-LoRA: one trained pair for all layers of a type, and two trained vectors for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lorry.core.method.registry import register
from lorry.core.method.spec import Layout, Tensors, TensorSpec, ones
from lorry.core.sites.site import Site
from lorry.methods.lora import LoRA
from lorry.methods.parts.sharing import by_type, of_type


@register("tied-lora", paper="arXiv 2311.09578")
@dataclass(frozen=True)
class TiedLoRA(LoRA):
    """``ΔW = scale · diag(u) B diag(v) A`` with A and B trained and shared by the sites of one type, and u ``(out,)``
    and v ``(rank,)``, one at the start, for each site (the form "vBuA" of section 3).

    It is VeRA's formula with a pair that learns. Sites are of one type if their paths differ in numbers of layers only.

    Use it in deep models where a LoRA's values are too many: a further layer costs ``out + rank`` of them.
    """

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return the vectors; A and B belong to all sites of the type."""
        return {
            "u": TensorSpec((*site.lead, site.out_features), ones),
            "v": TensorSpec((*site.lead, self.rank), ones),
        }

    def layout(self, sites: Sequence[Site]) -> Layout:
        """Return the vectors, and A and B of each type."""
        return by_type(sites, lambda site, _: self.tensors(site), lambda site, _: LoRA.tensors(self, site))

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return the type's pair with the site's vectors."""
        a, b = of_type(tensors, site, "A"), of_type(tensors, site, "B")
        return tensors["v"].unsqueeze(-1) * a, tensors["u"].unsqueeze(-1) * b
