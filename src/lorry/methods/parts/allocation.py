"""Ranks by what calibration saw: effective ranks, and a budget of values handed out by importance."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorry.core.errors import SiteError
from lorry.core.method.spec import Observed


def effective_rank(matrix: Tensor) -> float:
    """Return ``exp(H(s / Σ s))`` of the singular values s of a matrix ``(*lead, out, in)``, the least over `lead`
    (Roy and Vetterli 2007): r for r equal ones, at least 1.
    """
    values = torch.linalg.svdvals(matrix.double())
    shares = values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return max(1.0, float(torch.special.entr(shares).sum(-1).exp().min()))


def gradient_of(seen: Observed, path: str) -> Tensor:
    """Return the observed gradient of a weight.

    Raises
    ------
    SiteError
        It is zero or not finite, so that it says nothing.
    """
    gradient = seen.gradient
    if gradient is None or not bool(gradient.isfinite().all()) or not bool(gradient.any()):
        raise SiteError(
            f"The gradient of the weight of '{path}' over the calibration batches is zero, not finite or was not "
            "observed, so it decides no rank there. Leave the site out (exclude), or give other data."
        )
    return gradient


def ranks_by_importance(
    importance: Mapping[str, float], shapes: Mapping[str, tuple[int, ...]], rank: int, least: int, most: int
) -> dict[str, int]:
    """Return a rank for each site, such that all of them have about as many values as with `rank` everywhere.

    Parameters
    ----------
    importance
        Site path -> importance, not negative; a site gets values in proportion.
    shapes
        Site path -> shape of the weight ``(*lead, out, in)``.
    rank
        Of every site, if all were as important.
    least, most
        Bounds of each rank; the narrower side of the layer is one, too.
    """
    width = {path: shape[-1] + shape[-2] for path, shape in shapes.items()}
    budget, total = rank * sum(width[path] for path in importance), sum(importance.values())
    ranks = {}
    for path, value in importance.items():
        fair = budget * value / total / width[path] if total else rank
        ranks[path] = min(max(round(fair), least), most, *shapes[path][-2:])
    return ranks
