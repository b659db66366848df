"""Experts that are other adapters, side by side in one pair of factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorry.core.method.spec import Tensors


def side_by_side(tensors: Tensors, experts: Sequence[tuple[Tensor, Tensor, float]]) -> None:
    """Copy the factors of experts into A ``(Σ ranks, in)`` and B ``(out, Σ ranks)`` in place, and their scales into
    ``scales``.
    """
    tensors["A"].copy_(torch.cat([a for a, _, _ in experts]))
    tensors["B"].copy_(torch.cat([b for _, b, _ in experts], 1))
    tensors["scales"].copy_(torch.tensor([scale for _, _, scale in experts]))
