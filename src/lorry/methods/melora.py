"""MELoRA: several small LoRAs along the diagonal of the update."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorry.core.errors import OptionError, SiteError
from lorry.core.method.registry import register
from lorry.core.method.spec import Tensors, TensorSpec, kaiming
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.methods.lora import LoRA


# blocks of a vocabulary mean nothing, and its size seldom divides: no embeddings
@register("melora", paper="arXiv 2402.17263", kinds=lambda kind: not (kind.whole or kind.indexed))
@dataclass(frozen=True)
class MELoRA(LoRA):
    """``ΔW = scale · diag(B_1 A_1, …, B_k A_k)`` with A_i ``(rank/k, in/k)`` and B_i ``(out/k, rank/k)``
    (section 3.2).

    The rank of the update is `rank`, at ``rank · (in + out) / k`` trained values. With one block it is LoRA.

    Use it for a higher rank of the update at the same count of values, where inputs and outputs may be cut into
    groups.
    """

    blocks: int = option(2, "Number k of small LoRAs; it divides the rank and both widths of every layer.", at_least=1)

    def check(self) -> None:
        """Refuse a rank that does not divide into blocks."""
        if self.rank % self.blocks:
            raise OptionError(f"MELoRA: blocks must divide rank, found rank {self.rank} and blocks {self.blocks}.")

    def check_site(self, site: Site) -> None:
        """Refuse widths that do not divide into blocks."""
        super().check_site(site)
        if site.in_features % self.blocks or site.out_features % self.blocks:
            raise SiteError(
                f"'{site.path}' is {site.out_features} x {site.in_features}: MELoRA's blocks must divide both, found "
                f"{self.blocks}."
            )

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return all A_i ``(k, rank/k, in/k)`` and all B_i ``(k, out/k, rank/k)``."""
        k, rank = self.blocks, self.rank // self.blocks
        return {
            "A": TensorSpec((*site.lead, k, rank, site.in_features // k), kaiming),
            "B": TensorSpec((*site.lead, k, site.out_features // k, rank)),
        }

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return the block-diagonal A and B."""
        return on_diagonal(tensors["A"]), on_diagonal(tensors["B"])


def on_diagonal(blocks: Tensor) -> Tensor:
    """Return the block-diagonal matrix ``(*, k·m, k·n)`` of blocks ``(*, k, m, n)``."""
    *lead, k, m, n = blocks.shape
    eye = torch.eye(k, dtype=blocks.dtype, device=blocks.device)
    return (blocks.unsqueeze(-2) * eye.view(k, 1, k, 1)).reshape(*lead, k * m, k * n)
