"""Kronecker products ``(B A) ⊗ K`` of a low-rank seed and small square kernels, applied as thin products.

A kernel of size s takes the part of the seed that makes the product as large as the weight: the first ⌈out/s⌉ rows of B
and the first ⌈in/s⌉ columns of A; what is beyond the weight is cut off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lorry.core.sites.site import Site


def seed_part(a: Tensor, b: Tensor, site: Site, size: int) -> tuple[Tensor, Tensor]:
    """Return the columns of A and the rows of B that kernels of this size use."""
    return a[:, : math.ceil(site.in_features / size)], b[: math.ceil(site.out_features / size)]


def product(a: Tensor, b: Tensor, kernel: Tensor, site: Site) -> Tensor:
    """Return ``(B A) ⊗ K`` as ``(out, in)``."""
    right, left = seed_part(a, b, site, len(kernel))
    return torch.kron((left @ right).contiguous(), kernel)[: site.out_features, : site.in_features]


def factors(
    a: Tensor, b: Tensor, site: Site, sizes: Sequence[int], kernels: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``A_s ⊗ I`` ``(Σ rank s, in)`` and ``B_s ⊗ K`` ``(out, Σ rank s)`` of all sizes side by side, K being the
    identity where no kernels are given: short dense products cost less than reshaping the input for each size.
    """
    downs, ups = [], []
    for number, size in enumerate(sizes):
        right, left = seed_part(a, b, site, size)
        eye = torch.eye(size, dtype=a.dtype, device=a.device)
        kernel = eye if kernels is None else kernels[number].to(a.dtype)
        downs.append(torch.kron(right.contiguous(), eye)[:, : site.in_features])
        ups.append(torch.kron(left.contiguous(), kernel)[: site.out_features])
    return torch.cat(downs), torch.cat(ups, 1)


def through_kernels(units: Tensor, weights: Tensor, kernels: Sequence[Tensor]) -> Tensor:
    """Return what units ``(..., rank · s)`` of one size become under a weighted sum of kernels ``(s, s)``, with weights
    ``(..., kernels)`` for each token.
    """
    size = len(kernels[0])
    stacked = torch.stack([kernel.t().flatten() for kernel in kernels]).to(units.dtype)
    own = (weights @ stacked).unflatten(-1, (size, size))  # one kernel for each token
    return (units.unflatten(-1, (-1, size)) @ own).flatten(-2)
