"""ShareLoRA: the layers of a type share A, B, or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lorry.core.method.registry import register
from lorry.core.method.spec import Layout, Tensors, TensorSpec
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.methods.lora import LoRA
from lorry.methods.parts.sharing import by_type, of_type

SHARES = {"A": ("A",), "B": ("B",), "both": ("A", "B")}


@register("share-lora", paper="arXiv 2406.10785")
@dataclass(frozen=True)
class ShareLoRA(LoRA):
    """``ΔW = scale · B A`` where the sites of one type have one A, one B, or one of both (section 3).

    Sites are of one type if their paths differ in numbers of layers only.

    Use it with A shared for about half of LoRA's values; in the paper that keeps more of the base's skills.
    """

    share: str = option("A", "Which factor is shared.", choices=tuple(SHARES))

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return the factors that are the site's own."""
        return {n: spec for n, spec in super().tensors(site).items() if n not in SHARES[self.share]}

    def layout(self, sites: Sequence[Site]) -> Layout:
        """Return the sites' factors, and those of each type."""

        def shared(site: Site, _: int) -> dict[str, TensorSpec]:
            return {n: spec for n, spec in LoRA.tensors(self, site).items() if n in SHARES[self.share]}

        return by_type(sites, lambda site, _: self.tensors(site), shared)

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return the pair."""
        a, b = (of_type(tensors, site, n) if n in SHARES[self.share] else tensors[n] for n in "AB")
        return a, b
