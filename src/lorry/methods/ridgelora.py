"""RidgeLoRA: the weight's input is turned by a matrix that is a diagonal and a low-rank product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorry.core.errors import SiteError
from lorry.core.method.families import WeightDelta
from lorry.core.method.registry import register
from lorry.core.method.spec import Tensors, TensorSpec, kaiming, ones
from lorry.core.options import option
from lorry.core.sites.site import Site


@register("ridgelora", paper="NeurIPS 2025, openreview.net/forum?id=0RF80tUWuv")
@dataclass(frozen=True)
class RidgeLoRA(WeightDelta):
    """``W' = W (ρ · diag(d) + scale · B A)``, and so ``ΔW = W (ρ · diag(d) - I + scale · B A)``, with A ``(rank, in)``,
    B ``(in, rank)``, the ridge d ``(in,)`` and its strength ρ trained.

    d and ρ are one and B is zero at the start, so that the layer is unchanged. A public program starts with random
    factors whose product is meant to complete d to the identity and does so in the mean only.

    Use it where the change should go through what the weight knows: the update has the weight's rank, at rank
    twice the input's width of values.
    """

    rank: int = option(8, "Rank of the product.", at_least=1)
    alpha: float | None = option(None, "Numerator of the scale alpha/rank; the rank itself if not given.", above=0)
    dropout: float = option(0.0, "Fraction of the update's input that is dropped in training.", at_least=0, below=1)

    def check_site(self, site: Site) -> None:
        """Refuse a rank above the width of the input."""
        if self.rank > site.in_features:
            raise SiteError(
                f"'{site.path}' has inputs of {site.in_features}: rank must be at most that, found {self.rank}."
            )

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return A, B, d and ρ."""
        return {
            "A": TensorSpec((*site.lead, self.rank, site.in_features), kaiming),
            "B": TensorSpec((*site.lead, site.in_features, self.rank)),
            "ridge": TensorSpec((*site.lead, site.in_features), ones),
            "strength": TensorSpec((*site.lead, 1), ones),
        }

    @property
    def _scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def delta(self, tensors: Tensors, site: Site) -> Tensor:
        """Return the update for the base weight as it is now."""
        a, b = tensors["A"], tensors["B"]
        exact = torch.promote_types(a.dtype, torch.float32)
        weight = site.matrix().to(exact)
        ridge = (tensors["strength"].to(exact) * tensors["ridge"].to(exact) - 1).unsqueeze(-2)
        return weight * ridge + (weight @ b.to(exact)) @ (a.to(exact) * self._scale)

    def bypass(self, x: Tensor, tensors: Tensors, site: Site) -> Tensor:
        """Turn the input, and let the weight have it."""
        if not site.kind.plain_product:
            return super().bypass(x, tensors, site)
        a, b = tensors["A"].to(x.dtype), tensors["B"].to(x.dtype)
        ridge = (tensors["strength"] * tensors["ridge"] - 1).to(x.dtype)
        turned = x * ridge + (x @ a.mT @ b.mT) * self._scale
        return site.kind.dense(site, turned, site.matrix().to(x.dtype))
