"""Block-LoRA: the down-projections of all blocks of a LoRA are one.

The paper's formulas were not available; both readings below fit its abstract and are a reconstruction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Generator, Tensor

from lorry.core.errors import OptionError, SiteError
from lorry.core.method.families import Bottleneck, check_rank
from lorry.core.method.registry import register
from lorry.core.method.spec import Tensors, TensorSpec, kaiming
from lorry.core.options import option
from lorry.core.sites.site import Site


@register("block-lora", paper="arXiv 2501.16720")
@dataclass(frozen=True)
class BlockLoRA(Bottleneck):
    """LoRA cut into n blocks that share the down-projection.

    ``partition="rank"``: ``ΔW = s · (B_1 + … + B_n) A`` with A ``(rank/n, in)`` and B_i ``(out, rank/n)``.
    All B_i get the same gradient, so from equal starts they stay equal: training is that of LoRA of rank
    ``rank/n`` with n times the learning rate for B. ``partition="input"``: ``ΔW = s · B [A A … A]`` with A
    ``(rank, in/n)``; the rank of the update stays `rank`. Either way ``rank · out + (rank/n) · in`` values
    are trained.

    Use it where the count of trained values or the size of the file matters more than the last bit of accuracy;
    compare it with LoRA of half the rank and a higher rate for B.
    """

    rank: int = option(2, "Rank of all blocks together.", at_least=1)
    blocks: int = option(2, "Number n of blocks; it divides the rank, or the input width.", at_least=1)
    partition: str = option("rank", "What is cut into blocks.", choices=("rank", "input"))
    alpha: float = option(1.0, "Numerator of the scale alpha/sqrt(r), as in CLIP-LoRA.", above=0)
    scale_rank: str = option(
        "total", "Which rank r the scale has: of all blocks together or of one.", choices=("total", "block")
    )
    b_std: float = option(
        0.0, "Deviation of a random start of the B_i, whose sum is zero; 0 starts them at zero.", at_least=0
    )
    dropout: float = option(0.0, "Fraction of the update's input that is dropped in training.", at_least=0, below=1)

    def check(self) -> None:
        """Refuse blocks that do not divide the rank, and a random start where it would not cancel."""
        if self.partition == "rank" and self.rank % self.blocks:
            raise OptionError(f"BlockLoRA: blocks must divide rank, found rank {self.rank} and blocks {self.blocks}.")
        if self.b_std and (self.partition == "input" or self.blocks == 1):
            raise OptionError(
                "BlockLoRA: b_std needs at least two blocks along the rank; their starts cancel in the sum."
            )

    def check_site(self, site: Site) -> None:
        """Refuse widths that the options do not fit."""
        if self.partition == "input" and site.in_features % self.blocks:
            raise SiteError(
                f"'{site.path}' has {site.in_features} inputs: blocks must divide them, found {self.blocks}."
            )
        check_rank(site, self.width, "rank of a block" if self.partition == "rank" else "rank")

    @property
    def width(self) -> int:
        """Number of rank units: of one block where the rank is cut, else all."""
        return self.rank // self.blocks if self.partition == "rank" else self.rank

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return the shared A, and all B_i ``(n, out, rank/n)``; one B for blocks along the input."""
        along_rank = self.partition == "rank"
        inner = site.in_features if along_rank else site.in_features // self.blocks
        arms = self.blocks if along_rank else 1
        return {
            "A": TensorSpec((*site.lead, self.width, inner), kaiming),
            "B": TensorSpec((*site.lead, arms, site.out_features, self.width), self._start),
        }

    def _start(self, tensor: Tensor, generator: Generator) -> None:
        tensor.normal_(0.0, self.b_std, generator=generator)
        tensor.sub_(tensor.mean(-3, keepdim=True))

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return A once and the sum of the B_i, or A repeated along the input."""
        a, b = tensors["A"], tensors["B"].sum(-3)
        return (a, b) if self.partition == "rank" else (a.repeat(*[1] * (a.ndim - 1), self.blocks), b)

    @property
    def alpha_rank(self) -> None:
        """None: its scale is alpha over the root of one of two ranks, by an option of its own."""
        return None

    def scale(self, site: Site) -> float:
        """Return alpha/sqrt(r)."""
        return self.alpha / math.sqrt(self.rank if self.scale_rank == "total" else self.rank / self.blocks)
