"""HRA: the input of a layer reflected at trained hyperplanes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lorry.core.method.registry import register
from lorry.core.method.spec import Tensors, TensorSpec
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.methods.parts.rotation import Rotation


def in_pairs(tensor: Tensor, generator: Generator) -> None:
    """Fill ``(rank, in)`` with random rows of which each stands twice, so that the reflections cancel."""
    half = torch.empty((len(tensor) + 1) // 2, tensor.shape[-1]).normal_(generator=generator)
    tensor.copy_(half.repeat_interleave(2, dim=0)[: len(tensor)])


@register("hra", paper="arXiv 2405.17484", kinds=("linear", "conv"))
@dataclass(frozen=True)
class HRA(Rotation):
    """``W' = W H_1 ... H_r`` with ``H_i = I - 2 u_i u_iᵀ / ‖u_i‖²`` (equation 3).

    With `orthogonal` the u_i are made orthonormal first (Gram and Schmidt), which makes it ``W (I - 2 U Uᵀ)``. The u_i
    start in equal pairs, so that an even rank leaves the layer as it is; orthogonal ones start nowhere near it.

    Use it where the change should turn the weight and keep its lengths, with few values.
    """

    rank: int = option(8, "Number of reflections; even, so that it can start at the identity.", at_least=1)
    orthogonal: bool = option(False, "Make the directions orthonormal first.")

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return the directions u as rows ``(rank, in)``."""
        return {"u": TensorSpec((self.rank, site.in_features), in_pairs)}

    def turned(self, rows: Tensor, tensors: Tensors, site: Site, *, transposed: bool = False) -> Tensor:
        """Return ``rows (H_r ... H_1 - I)``, or ``rows (H_1 ... H_r - I)``."""
        u = tensors["u"]
        directions = list(u / u.norm(dim=-1, keepdim=True)) if not self.orthogonal else _orthonormal(list(u))
        change = torch.zeros_like(rows)
        for direction in directions if transposed else reversed(directions):
            unit = direction.to(rows.dtype)
            change = change - 2 * ((rows + change) @ unit).unsqueeze(-1) * unit
        return change


def _orthonormal(rows: list[Tensor]) -> list[Tensor]:
    """Return the rows made orthonormal, one after another."""
    found: list[Tensor] = []
    for row in rows:
        for other in found:
            row = row - (other @ row) * other
        found.append(row / row.norm())
    return found
