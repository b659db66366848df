"""Masks of branches from their attention maps, and predictions that are put together by them (CLoRA)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lorry.core.errors import OptionError

MORPHOLOGY = ("none", "dilate", "erode", "opening", "closing")


def branch_masks(
    maps: Sequence[Tensor], tokens: Sequence[Sequence[int]], threshold: float = 0.3, morphology: str = "none"
) -> Tensor:
    """Return where each branch is seen; the first branch has what no other one claims.

    Parameters
    ----------
    maps
        For each branch ``(height, width, tokens)``.
    tokens
        For each branch the positions of its words; none for a branch that claims nothing.
    threshold
        θ: a word claims the places where its map is above this share of its largest value.
    morphology
        What is done to the masks of claims: one of `MORPHOLOGY`, by squares of 3 x 3.

    Returns
    -------
    Zeros and ones ``(branches, height, width)``; at each place at least one of them is 1.
    """
    masks = torch.stack([_claimed(m.detach(), places, threshold) for m, places in zip(maps, tokens, strict=True)])
    masks = shaped(masks, morphology)
    return torch.cat([(masks[:1] + (masks.sum(0, keepdim=True) == 0).to(masks.dtype)).clamp_max(1), masks[1:]])


def _claimed(maps: Tensor, tokens: Sequence[int], threshold: float) -> Tensor:
    if not tokens:
        return maps.new_zeros(maps.shape[:2])
    chosen = maps[:, :, list(tokens)]
    return (chosen > threshold * chosen.amax((0, 1))).any(-1).to(maps.dtype)


def shaped(masks: Tensor, morphology: str) -> Tensor:
    """Return masks ``(branches, height, width)`` grown, shrunk, or both.

    Raises
    ------
    OptionError
        There is no such operation.
    """
    if morphology not in MORPHOLOGY:
        raise OptionError(f"Masks may be shaped by {', '.join(MORPHOLOGY)}; found '{morphology}'.")
    for each in {"opening": ("erode", "dilate"), "closing": ("dilate", "erode")}.get(morphology, (morphology,)):
        if each == "dilate":
            masks = F.max_pool2d(masks[None], 3, 1, 1)[0]
        elif each == "erode":
            masks = 1 - F.max_pool2d(1 - masks[None], 3, 1, 1)[0]
    return masks


def enlarged(masks: Tensor, height: int, width: int) -> Tensor:
    """Return masks ``(..., height, width)`` of another size, by the nearest place."""
    flat = masks.reshape(1, -1, *masks.shape[-2:])
    return F.interpolate(flat, size=(height, width), mode="nearest").reshape(*masks.shape[:-2], height, width)


def blended(predictions: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """Return ``Σ m_j eps_j / Σ m_j``.

    Parameters
    ----------
    predictions
        For each branch ``(..., channels, height, width)``.
    masks
        For each branch ``(height, width)``; at each place at least one is not zero.
    """
    whole = torch.stack(list(masks)).sum(0)
    return weighted(predictions, [mask / whole for mask in masks])


def weighted(predictions: Sequence[Tensor], weights: Sequence[Tensor | float]) -> Tensor:
    """Return the weighted sum of predictions, added in their order."""
    total = predictions[0] * weights[0]
    for prediction, weight in zip(predictions[1:], weights[1:], strict=True):
        total = total + prediction * weight
    return total
