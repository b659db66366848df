"""MiSS: one small trained block that every part of the input shares; Bat, in which it multiplies the base weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorry.core.errors import SiteError
from lorry.core.method.families import Bottleneck, WeightDelta, check_rank
from lorry.core.method.registry import register
from lorry.core.method.spec import Tensors, TensorSpec
from lorry.core.options import option
from lorry.core.sites.site import Site


@register("miss", paper="arXiv 2409.15371", kinds=("linear",))
@dataclass(frozen=True)
class MiSS(Bottleneck):
    """``ΔW x = D Σ_n x_n`` with x cut into parts x_n of width `rank` and D ``(out, rank)`` zero at the start (section
    3.1): a LoRA whose A adds up every `rank`-th input.

    Use it where a LoRA's two factors cost too much: it trains one, and a step is cheaper.
    """

    rank: int = option(64, "Width of the parts of the input.", at_least=1)
    width: int | None = option(
        None, "Rows of D that are trained and repeated over the outputs; all of them if not given.", at_least=1
    )
    dropout: float = option(0.0, "Fraction of the update's input that is dropped in training.", at_least=0, below=1)

    def check_site(self, site: Site) -> None:
        """Refuse parts wider than the input, and rows that do not fill the outputs."""
        if self.rank > site.in_features:
            raise SiteError(f"'{site.path}' has {site.in_features} inputs: rank must not be larger, found {self.rank}.")
        if site.out_features % self._width(site):
            raise SiteError(
                f"'{site.path}' has {site.out_features} outputs, of which width must be a divisor; found {self.width}."
            )

    def _width(self, site: Site) -> int:
        return site.out_features if self.width is None else self.width

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return D, or the part of its rows that is repeated: ``(width, rank)``."""
        return {"D": TensorSpec((self._width(site), self.rank))}

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return the matrix that adds up every `rank`-th input, and D."""
        d = tensors["D"]
        one = torch.eye(self.rank, dtype=d.dtype, device=d.device)
        a = one.repeat(1, -(-site.in_features // self.rank))[:, : site.in_features]
        return a, d.repeat(site.out_features // len(d), 1)


@register("bat", paper="arXiv 2409.15371", kinds=("linear",))
@dataclass(frozen=True)
class Bat(WeightDelta):
    """``ΔW_mn = W_mn D_m + D_m`` with W cut into square blocks of width `rank` and D_m zero at the start, one for each
    row of blocks (the form of Bone that depends on the weight).

    Use it where MiSS is too weak at the same size and the update may depend on the weight.
    """

    rank: int = option(16, "Width of the blocks; it must divide both widths of the layer.", at_least=1)

    def check_site(self, site: Site) -> None:
        """Refuse blocks that do not fill the weight."""
        check_rank(site, self.rank)
        if site.out_features % self.rank or site.in_features % self.rank:
            raise SiteError(
                f"'{site.path}' is {site.out_features} x {site.in_features}: rank must divide both, found {self.rank}."
            )

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return D ``(out / rank, rank, rank)``."""
        return {"D": TensorSpec((site.out_features // self.rank, self.rank, self.rank))}

    def delta(self, tensors: Tensors, site: Site) -> Tensor:
        """Return the update of every block, for the base weight as it is now."""
        d = tensors["D"]
        blocks = site.matrix().to(d.dtype).reshape(len(d), self.rank, -1, self.rank).movedim(2, 0)
        return (blocks @ d + d).movedim(0, 2).reshape(site.shape)
