"""RaSA: part of each layer's rank goes into a pool that all layers of a type use whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from lorry.core.errors import OptionError
from lorry.core.method.registry import register
from lorry.core.method.spec import Layout, Tensors, TensorSpec
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.methods.lora import LoRA
from lorry.methods.parts.sharing import by_type, of_type


@register("rasa", paper="arXiv 2503.12576")
@dataclass(frozen=True)
class RaSA(LoRA):
    """``ΔW = scale · [B, B_s] diag(e) [A; A_s]``: A and B of rank ``rank - shared_rank`` are the site's own, A_s and
    B_s of rank ``shared_rank · L`` belong to all L sites of its type, and e is trained for each site (section 3.1).

    There are as many values as in L LoRAs, but for e. At the start e gives both parts half of the weight that LoRA's
    units have together. With nothing shared there is no e, and it is LoRA.

    Use it in LoRA's place in deep models: each layer's update has a much higher rank at the same count of values.
    """

    shared_rank: int = option(1, "Rank that each site gives to the pool.", at_least=0)

    def check(self) -> None:
        """Refuse to give more than there is."""
        if self.shared_rank >= self.rank:
            raise OptionError(
                f"RaSA: shared_rank must be below rank, found shared_rank {self.shared_rank} and rank {self.rank}."
            )

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return what a site of its own type has."""
        return self._own(site, 1)

    def _own(self, site: Site, count: int) -> dict[str, TensorSpec]:
        private, pool = self.rank - self.shared_rank, self.shared_rank * count
        specs = self._pair(site, private)
        if not pool:
            return specs

        def halves(tensor: Tensor, generator: Generator) -> None:
            tensor[..., :private] = self.rank / private / 2
            tensor[..., private:] = self.rank / pool / 2

        return {**specs, "e": TensorSpec((*site.lead, private + pool), halves)}

    def _pair(self, site: Site, rank: int) -> dict[str, TensorSpec]:
        a, b = super().tensors(site).values()
        inner, outer = (*site.lead, rank, site.in_features), (*site.lead, site.out_features, rank)
        return {"A": replace(a, shape=inner), "B": replace(b, shape=outer)}

    def layout(self, sites: Sequence[Site]) -> Layout:
        """Return each site's own part, and the pool of each type."""

        def shared(site: Site, count: int) -> dict[str, TensorSpec]:
            return self._pair(site, self.shared_rank * count) if self.shared_rank else {}

        return by_type(sites, self._own, shared)

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return both parts side by side, with the weights in A."""
        a, b = tensors["A"], tensors["B"]
        if not self.shared_rank:
            return a, b
        whole = torch.cat([a, of_type(tensors, site, "A")], -2)
        return tensors["e"].unsqueeze(-1) * whole, torch.cat([b, of_type(tensors, site, "B")], -1)
