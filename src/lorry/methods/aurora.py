"""AuroRA: between the factors of a LoRA a fixed curve and one that is learned as a spline."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from lorry.core.method.call import Call
from lorry.core.method.registry import register
from lorry.core.method.spec import Tensors, TensorSpec, kaiming
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.methods.lora import LoRA


@register("aurora", paper="arXiv 2505.18738", kinds=lambda kind: kind.additive)
@dataclass(frozen=True)
class AuroRA(LoRA):
    """``ΔW x = scale · B (tanh(M u) + s(u))`` with ``u = tanh(A x)`` and s a cubic spline for each rank unit, whose
    coefficients are trained (section 3.2).

    The knots lie evenly on [-1, 1], where u lives. A public program adds up the splines of all units before they are
    mixed, of the values before the tanh, which leave the knots.

    Use it at half of LoRA's rank or less, where fusing is no matter.
    """

    rank: int = option(4, "Rank of the update.", at_least=1)
    pieces: int = option(5, "Pieces of the spline.", at_least=1)
    noise: float = option(0.1, "Size of the spline's coefficients at the start.", at_least=0)

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return A, B, the mixer ``(rank, rank)`` and the coefficients ``(rank, pieces + 3)``."""

        def small(tensor: Tensor, generator: Generator) -> None:
            tensor.uniform_(-self.noise, self.noise, generator=generator)

        mixer = TensorSpec((self.rank, self.rank), kaiming)
        return {**super().tensors(site), "mixer": mixer, "spline": TensorSpec((self.rank, self.pieces + 3), small)}

    def mid(self, h: Tensor, call: Call, tensors: Tensors) -> Tensor:
        """Return the sum of both curves."""
        u = h.tanh()
        fixed = F.linear(u, tensors["mixer"].to(h.dtype)).tanh()
        return fixed + (cubic_basis(u, self.pieces) * tensors["spline"].to(h.dtype)).sum(-1)


def cubic_basis(u: Tensor, pieces: int) -> Tensor:
    """Return the cubic B-splines on ``pieces`` even pieces of [-1, 1] at u: ``(*u.shape, pieces + 3)``, sum 1."""
    at = (u.unsqueeze(-1) + 1) * (pieces / 2)
    centres = torch.arange(-1, pieces + 2, dtype=u.dtype, device=u.device)
    t = (at - centres).abs()
    inner = 2 / 3 - t.square() + t**3 / 2
    outer = (2 - t).clamp_min(0) ** 3 / 6
    return torch.where(t < 1, inner, outer)
