"""Experts that are other adapters: their factors, and how they lie side by side in one pair."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorry.core.errors import AdapterError
from lorry.core.method.base import Expert
from lorry.core.method.families import Bottleneck
from lorry.core.method.spec import Tensors


def pair(expert: Expert) -> tuple[Tensor, Tensor, float]:
    """Return A ``(rank, in)``, B ``(out, rank)`` and the scale, times the weight, of a plain low-rank adapter.

    Raises
    ------
    AdapterError
        Its update is not a product of two factors.
    """
    method, site = expert.method, expert.site
    if not isinstance(method, Bottleneck) or not method.plain or site.lead:
        raise AdapterError(
            f"Adapter '{expert.name}' ({type(method).__name__}) cannot be an expert: its update at '{site.path}' is "
            "not a product of two factors."
        )
    a, b = method.factors(expert.tensors, site)
    return a.detach(), b.detach(), method.scale(site) * expert.weight


def side_by_side(tensors: Tensors, pairs: Sequence[tuple[Tensor, Tensor, float]]) -> None:
    """Copy factors into A ``(Σ ranks, in)`` and B ``(out, Σ ranks)`` in place, and their scales into ``scales``."""
    tensors["A"].copy_(torch.cat([a for a, _, _ in pairs]))
    tensors["B"].copy_(torch.cat([b for _, b, _ in pairs], 1))
    tensors["scales"].copy_(torch.tensor([scale for _, _, scale in pairs]))
