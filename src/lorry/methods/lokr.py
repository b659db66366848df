"""LoKr: the Kronecker product of a small matrix and a low-rank one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from lorry.core.errors import OptionError
from lorry.core.method.families import WeightDelta
from lorry.core.method.registry import register
from lorry.core.method.spec import Tensors, TensorSpec, kaiming
from lorry.core.options import option
from lorry.core.sites.site import Site


@register("lokr", paper="arXiv 2309.14859")
@dataclass(frozen=True)
class LoKr(WeightDelta):
    """``ΔW = scale · C ⊗ D``, D being dense or ``D_b D_a`` of rank `rank`, C dense or factored likewise
    (LyCORIS, section 3.2).

    The widths are cut as ``out = a·b``, ``in = c·d`` with C ``(a, c)`` and D ``(b, d)``; of a convolution the
    channels are cut and D has the kernel. D is dense where its rank would reach half of its larger side, as
    in LyCORIS and peft. C starts at zero.

    Use it for very small files, with layers whose widths have good divisors; common for diffusion models.
    """

    rank: int = option(8, "Rank of the factored matrices.", at_least=1)
    alpha: float | None = option(None, "Numerator of the scale alpha/rank; the rank itself if not given.", above=0)
    factor: int = option(
        -1,
        "Size of C in each direction, or the nearest divisor below; -1 cuts near the square root.",
        at_least=-1,
    )
    decompose_both: bool = option(False, "Factor C too where its rank would be below half of its larger side.")
    dropout: float = option(0.0, "Fraction of the update's input that is dropped in training.", at_least=0, below=1)

    def check(self) -> None:
        """Refuse a factor of zero."""
        if self.factor == 0:
            raise OptionError("LoKr: factor must be -1 or at least 1, found 0.")

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return C or C_b, C_a, and D or D_b, D_a."""
        (a, b), (c, d), kernel = self._cut(site)
        low_c = self.decompose_both and self.rank < max(a, c) / 2
        return {
            **self._matrix("C", site.lead, a, c, low_c, zero=True),
            **self._matrix("D", site.lead, b, d * kernel, self.rank < max(b, d) / 2, zero=False),
        }

    def _matrix(
        self, name: str, lead: tuple[int, ...], rows: int, columns: int, low: bool, zero: bool
    ) -> dict[str, TensorSpec]:
        first = TensorSpec((*lead, rows, self.rank if low else columns))
        if not zero:
            first = TensorSpec(first.shape, kaiming)
        return (
            {f"{name}_b": first, f"{name}_a": TensorSpec((*lead, self.rank, columns), kaiming)}
            if low
            else {name: first}
        )

    def _cut(self, site: Site) -> tuple[tuple[int, int], tuple[int, int], int]:
        kernel = math.prod(site.kind.kernel(site))
        return cut(site.out_features, self.factor), cut(site.in_features // kernel, self.factor), kernel

    @property
    def _scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def delta(self, tensors: Tensors, site: Site) -> Tensor:
        """Return the Kronecker product."""
        left, right = _whole("C", tensors) * self._scale, _whole("D", tensors)
        return (left[..., :, None, :, None] * right[..., None, :, None, :]).reshape(site.shape)

    def bypass(self, x: Tensor, tensors: Tensors, site: Site) -> Tensor:
        """Return ``ΔW x`` by ``C X Dᵀ`` with x as a matrix X ``(c, d)``; the product is never built."""
        if not site.kind.plain_product:
            return super().bypass(x, tensors, site)
        small = (_whole("C", tensors) * self._scale).to(x.dtype)
        h = x.unflatten(-1, (small.shape[-1], -1))
        for name in ("D",) if "D" in tensors else ("D_a", "D_b"):
            h = h @ tensors[name].to(x.dtype).mT
        update: Tensor = (small @ h).flatten(-2)
        return update


def _whole(name: str, tensors: Tensors) -> Tensor:
    return tensors[name] if name in tensors else tensors[f"{name}_b"] @ tensors[f"{name}_a"]


def cut(width: int, factor: int) -> tuple[int, int]:
    """Return two factors of `width`: `factor` first if it divides it, else the largest divisor up to it and
    to the square root.
    """
    if factor > 0 and width % factor == 0:
        return factor, width // factor
    most = math.isqrt(width) if factor < 1 else min(math.isqrt(width), factor)
    first = next(m for m in range(most, 0, -1) if width % m == 0)
    return first, width // first
