"""BOFT: OFT with a trained scale of each output channel, of one butterfly factor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorry.core.method.registry import register
from lorry.core.method.spec import Tensors, TensorSpec, ones
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.methods.parts.rotation import Rotation, by_blocks, divisor


@register("boft", paper="arXiv 2311.06243", kinds=("linear", "conv"))
@dataclass(frozen=True)
class BOFT(Rotation):
    """``y = s ⊙ W (x R)`` with R block-diagonal of Cayley transforms ``(I - S)(I + S)⁻¹``, S the skew-symmetric part of
    a trained matrix, and s one at the start (section 4, with one factor: products of permuted factors are not here).

    Use it to load and train on what PEFT made; OFT is the simpler choice for something new.
    """

    block_size: int = option(4, "Width of a block; the divisor of the layer's input width nearest to it.", at_least=2)

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return the matrices ``(blocks, size, size)`` and the scale s ``(out,)``."""
        size = divisor(site.in_features, self.block_size)
        return {
            "matrix": TensorSpec((site.in_features // size, size, size)),
            "gain": TensorSpec((site.out_features,), ones),
        }

    def turned(self, rows: Tensor, tensors: Tensors, site: Site, *, transposed: bool = False) -> Tensor:
        """Return ``rows (R - I)`` or ``rows (Rᵀ - I)``."""
        matrix = tensors["matrix"]
        skew = (0.5 * (matrix - matrix.mT)).to(torch.promote_types(matrix.dtype, torch.float32))
        one = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
        blocks = torch.linalg.solve(one + skew, -2 * skew, left=False)  # (I - S)(I + S)⁻¹ - I
        return by_blocks(rows, (blocks.mT if transposed else blocks).to(rows.dtype))

    def delta(self, tensors: Tensors, site: Site) -> Tensor:
        """Return ``diag(s) W Rᵀ - W``."""
        gain = tensors["gain"].unsqueeze(-1)
        return gain * super().delta(tensors, site) + (gain - 1) * site.matrix().to(gain.dtype)

    def bypass(self, x: Tensor, tensors: Tensors, site: Site) -> Tensor:
        """Return ``s ⊙ W (x R) - W x`` where the layer is a plain product."""
        if not site.kind.plain_product:
            return site.kind.dense(site, x, self.delta(tensors, site).to(x.dtype))
        gain = tensors["gain"].to(x.dtype)
        whole = site.kind.dense(site, x, site.matrix().to(x.dtype))
        return gain * super().bypass(x, tensors, site) + (tensors["gain"] - 1).to(x.dtype) * whole
