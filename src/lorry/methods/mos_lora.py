"""MoSLoRA: a trained mixer between the two factors of a LoRA."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lorry.core.method.registry import register
from lorry.core.method.spec import Init, Tensors, TensorSpec, kaiming
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.methods.lora import LoRA


def identity(tensor: Tensor, generator: Generator) -> None:
    """Fill square matrices with the identity."""
    tensor.copy_(torch.eye(tensor.shape[-1]))


def orthogonal(tensor: Tensor, generator: Generator) -> None:
    """Fill square matrices with random orthogonal ones."""
    q, r = torch.linalg.qr(torch.empty(tensor.shape).normal_(generator=generator))
    tensor.copy_(q * torch.diagonal(r, dim1=-2, dim2=-1).sign().unsqueeze(-2))


STARTS: dict[str, Init] = {"kaiming": kaiming, "orthogonal": orthogonal, "identity": identity}


@register("mos-lora", paper="arXiv 2406.11909")
@dataclass(frozen=True)
class MoSLoRA(LoRA):
    """``ΔW = scale · B M A`` with a trained mixer M ``(rank, rank)`` of the rank-one subspaces; with M the
    identity it is LoRA.

    Use it in LoRA's place for rank squared further values at each site; as a plain product it fuses and is exported
    all the same.
    """

    mixer: str = option("orthogonal", "Start of the mixer.", choices=tuple(STARTS))

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return A, B and the mixer."""
        return {
            **super().tensors(site),
            "mixer": TensorSpec((*site.lead, self.rank, self.rank), STARTS[self.mixer]),
        }

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return the pair with the mixer multiplied into the thinner factor."""
        a, b, mixer = tensors["A"], tensors["B"], tensors["mixer"]
        return (a, b @ mixer) if site.out_features <= site.in_features else (mixer @ a, b)
