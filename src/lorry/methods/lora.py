"""LoRA and what differs from it by options: rsLoRA's scale and LoRA+'s rates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from lorry.core.errors import SiteError
from lorry.core.method.families import Bottleneck
from lorry.core.method.forms import PeftForm
from lorry.core.method.registry import preset, register
from lorry.core.method.spec import TensorSpec, kaiming
from lorry.core.options import option
from lorry.core.sites.site import Site


@register("lora", paper="arXiv 2106.09685", default=True)
@dataclass(frozen=True)
class LoRA(Bottleneck):
    """``ΔW = scale · B A`` with A ``(rank, in)`` random, B ``(out, rank)`` zero at the start (section 4.1).

    Use it first: every tool reads it, it fuses exactly, and most other methods must first show that they are better
    on your task.
    """

    peft_form: ClassVar[PeftForm | None] = PeftForm()

    rank: int = option(8, "Rank of the update.", at_least=1)
    alpha: float | None = option(None, "Numerator of the scale; the rank itself if not given.", above=0)
    dropout: float = option(0.0, "Fraction of the update's input that is dropped in training.", at_least=0, below=1)
    rank_stabilized: bool = option(False, "Scale by alpha/sqrt(rank) instead of alpha/rank (rsLoRA, arXiv 2312.03732).")
    rate_ratio: float = option(1.0, "Learning rate of B relative to A (LoRA+, arXiv 2402.12354).", above=0)

    def check_site(self, site: Site) -> None:
        """Refuse a rank above the width of the layer: the product could not use it."""
        most = min(site.out_features, site.in_features)
        if self.rank > most:
            raise SiteError(
                f"'{site.path}' is {site.out_features} x {site.in_features}: rank must be at most "
                f"{most}, found {self.rank}."
            )

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return A and B."""
        return {
            "A": TensorSpec((*site.lead, self.rank, site.in_features), kaiming),
            "B": TensorSpec((*site.lead, site.out_features, self.rank)),
        }

    def scale(self, site: Site) -> float:
        """Return alpha/rank, or alpha/sqrt(rank)."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    @property
    def rate_factors(self) -> Mapping[str, float]:  # type: ignore[override]
        """Return the learning-rate factor of B."""
        return {"B": self.rate_ratio}


preset("rslora", of="lora", paper="arXiv 2312.03732", rank_stabilized=True)
preset("lora-plus", of="lora", paper="arXiv 2402.12354", rate_ratio=16.0)
