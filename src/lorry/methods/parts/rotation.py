"""Updates that multiply the base weight from its input side by a matrix near the identity."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from lorry.core.method.families import WeightDelta
from lorry.core.method.spec import Tensors
from lorry.core.sites.site import Site


class Rotation(WeightDelta):
    """``W' = W Rᵀ``, so ``y = W (x R)``: a method gives the product of rows with R or its transpose."""

    @abstractmethod
    def turned(self, rows: Tensor, tensors: Tensors, site: Site, *, transposed: bool = False) -> Tensor:
        """Return ``rows (R - I)``, or ``rows (Rᵀ - I)``, for rows ``(..., in)``, in their type."""

    def delta(self, tensors: Tensors, site: Site) -> Tensor:
        """Return ``W (Rᵀ - I)`` for the base weight as it is now."""
        exact = next(t.dtype for t in tensors.values() if t.is_floating_point())
        return self.turned(site.matrix().to(exact), tensors, site, transposed=True)

    def bypass(self, x: Tensor, tensors: Tensors, site: Site) -> Tensor:
        """Return ``W (x (R - I))``; only inputs are turned where the layer is a plain product."""
        if not site.kind.plain_product:
            return super().bypass(x, tensors, site)
        return site.kind.dense(site, self.turned(x, tensors, site), site.matrix().to(x.dtype))


def by_blocks(rows: Tensor, blocks: Tensor) -> Tensor:
    """Return ``rows diag(blocks)`` for rows ``(..., count * size)`` and blocks ``(count or 1, size, size)``."""
    size = blocks.shape[-1]
    parts = rows.unflatten(-1, (-1, size)).unsqueeze(-2)
    return (parts @ blocks).squeeze(-2).flatten(-2)


def divisor(width: int, size: int) -> int:
    """Return the divisor of `width` above 1 that is nearest to `size`, of two equally near ones the smaller."""
    return min((d for d in range(min(2, width), width + 1) if width % d == 0), key=lambda d: (abs(d - size), d))
