"""OFT: the input of a layer turned by a block-diagonal orthogonal matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lorry.core.errors import OptionError
from lorry.core.method.registry import register
from lorry.core.method.spec import Tensors, TensorSpec
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.methods.parts.rotation import Rotation, by_blocks, divisor


@register("oft", paper="arXiv 2306.07280", kinds=("linear", "conv"))
@dataclass(frozen=True)
class OFT(Rotation):
    """``y = W (x R)`` with R block-diagonal, each block the Cayley transform ``(I - S)⁻¹ (I + S)`` of a skew-symmetric
    S that is zero at the start (section 3.2).

    With `terms` the inverse is a Neumann series that is cut off (OFTv2, arXiv 2506.19847), so blocks are orthogonal
    only for small S: ``I + 2S + 2S² + ... + S^(terms-1)``.

    Use it for diffusion models and wherever what the base knows should be turned and not overwritten.
    """

    block_size: int = option(32, "Width of a block; the divisor of the layer's input width nearest to it.", at_least=2)
    share: bool = option(False, "Use one block for all.")
    terms: int = option(5, "Terms of the Neumann series; 0 inverts exactly.", at_least=0)
    limit: float | None = option(None, "Largest norm of S over all blocks, times the root of their number.", above=0)

    def check(self) -> None:
        """Refuse a series without S."""
        if self.terms == 1:
            raise OptionError("OFT: terms must be 0 or at least 2, found 1, with which nothing turns.")

    def size(self, site: Site) -> int:
        """Return the width of a block at a site."""
        return divisor(site.in_features, self.block_size)

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return the entries of S above its diagonal, row after row: ``(blocks, size (size - 1) / 2)``."""
        size = self.size(site)
        return {"skew": TensorSpec((1 if self.share else site.in_features // size, size * (size - 1) // 2))}

    def blocks(self, tensors: Tensors, site: Site) -> Tensor:
        """Return the blocks of R - I as ``(blocks, size, size)``."""
        size, upper = self.size(site), tensors["skew"]
        rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
        skew = upper.new_zeros(len(upper), size, size).index_put(
            (torch.arange(len(upper), device=upper.device)[:, None], rows, columns), upper
        )
        skew = self._limited(skew - skew.mT)
        one = torch.eye(size, dtype=skew.dtype, device=skew.device)
        if self.terms == 0:
            exact = torch.promote_types(skew.dtype, torch.float32)
            # (I - S)(I + S)⁻¹ - I = -2S (I + S)⁻¹
            return torch.linalg.solve((one + skew).to(exact), (-2 * skew).to(exact), left=False).to(skew.dtype)
        total, power = torch.zeros_like(skew), one.expand_as(skew)
        for order in range(1, self.terms):
            power = power @ skew
            # the last term is the rest of the series' inverse and counts once, but the linear one always twice
            total = total + (1 if order == self.terms - 1 and order > 1 else 2) * power
        return total

    def _limited(self, skew: Tensor) -> Tensor:
        """Return S with the norm of each block cut to the limit; the gradient passes as if it were not cut."""
        if self.limit is None:
            return skew
        most = self.limit / math.sqrt(len(skew))
        norm = torch.linalg.matrix_norm(skew.detach(), keepdim=True)
        cut = torch.where(norm > most, skew.detach() * (most / norm), skew.detach())
        return skew + (cut - skew).detach()

    def turned(self, rows: Tensor, tensors: Tensors, site: Site, *, transposed: bool = False) -> Tensor:
        """Return ``rows (R - I)`` or ``rows (Rᵀ - I)``."""
        blocks = self.blocks(tensors, site)
        return by_blocks(rows, (blocks.mT if transposed else blocks).to(rows.dtype))
