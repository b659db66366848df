"""MoRA: a square matrix of high rank between a fixed compression of the input and a fixed expansion of the output."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lorry.core.method.families import Bottleneck
from lorry.core.method.registry import register
from lorry.core.method.spec import Tensors, TensorSpec
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.methods.melora import on_diagonal


@register("mora", paper="arXiv 2405.12130")
@dataclass(frozen=True)
class MoRA(Bottleneck):
    """``ΔW = D M C`` with M ``(r̂, r̂)`` trained, zero at the start, and ``r̂ = ⌊√((in + out) · rank)⌋``: as many values
    as a LoRA of rank `rank` has (section 4.1).

    With ``form="sharing"`` C adds up the inputs whose indices are equal modulo r̂, and D repeats M's outputs, so the
    rank of the update is up to r̂. With ``form="rotation"`` the input is cut into pieces of r̂ values, each is rotated
    by angles of its own (as RoPE does for positions), and M gives the piece of the output at the same place: full rank,
    at the cost of a product of the layer's own size. Both are constant, so the update fuses exactly; the published
    program refuses to.

    Use it where new knowledge is to be learned by heart and a LoRA's rank is too low.
    """

    rank: int = option(8, "Rank of the LoRA that has as many values.", at_least=1)
    form: str = option("sharing", "How inputs are compressed.", choices=("sharing", "rotation"))
    dropout: float = option(0.0, "Fraction of the update's input that is dropped in training.", at_least=0, below=1)

    def size(self, site: Site) -> int:
        """Return r̂: not above the narrower side, and even where pairs are rotated."""
        size = min(math.isqrt((site.in_features + site.out_features) * self.rank), site.in_features, site.out_features)
        return size if self.form == "sharing" else max(size - size % 2, 2)

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return M."""
        return {"M": TensorSpec((*site.lead, self.size(site), self.size(site)))}

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return C and D M, or the rotations of all pieces and M for each of them."""
        m, size = tensors["M"], self.size(site)
        pieces = -(-site.in_features // size)
        repeats = -(-site.out_features // (size if self.form == "sharing" else size * pieces))
        if self.form == "sharing":
            a = torch.eye(size, dtype=m.dtype, device=m.device).repeat(1, pieces)
            b = m.repeat(*[1] * len(site.lead), repeats, 1)
        else:
            a = on_diagonal(rotations(pieces, size).to(m))
            same = m.unsqueeze(-3).expand(*site.lead, pieces, size, size)
            b = on_diagonal(same).repeat(*[1] * len(site.lead), repeats, 1)
        a = a[:, : site.in_features].expand(*site.lead, -1, -1)
        return a, b[..., : site.out_features, :]


def rotations(pieces: int, size: int) -> Tensor:
    """Return the rotation of each piece ``(pieces, size, size)``: value j pairs with j + size/2, and piece i turns the
    pair by ``i · 10000^(-2j/size)``.
    """
    half = size // 2
    speed = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(pieces, dtype=torch.float64)[:, None] * speed
    cos, sin = torch.diag_embed(angle.cos()), torch.diag_embed(angle.sin())
    return torch.cat([torch.cat([cos, -sin], -1), torch.cat([sin, cos], -1)], -2)
