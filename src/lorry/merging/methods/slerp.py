"""Spherical interpolation of updates, for any number of them, worked out on their Gram matrix."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from lorry.merging.factors import Factors, cosines, gram, stack
from lorry.merging.inputs import SiteInput
from lorry.merging.registry import Knob, merge_method


def spherical_mean(cosine: Tensor, shares: Tensor, iterations: int) -> Tensor:
    """Return coefficients c so that ``Σ c u`` is the weighted spherical mean of unit vectors u.

    Parameters
    ----------
    cosine
        Their inner products ``(n, n)``.
    shares
        Weights that sum to 1.
    iterations
        Of Karcher's fixed point: the mean moves along the average of the logarithms. For two vectors it is Shoemake's
        slerp.
    """
    c = shares / (shares @ cosine @ shares).clamp_min(1e-300).sqrt()
    for _ in range(iterations):
        along = (cosine @ c).clamp(-1, 1)
        angle = along.arccos()
        stretch = torch.where(angle > 1e-9, angle / angle.sin().clamp_min(1e-12), torch.ones_like(angle))
        tangent = shares * stretch - (shares * stretch * along).sum() * c
        length = float((tangent @ cosine @ tangent).clamp_min(0).sqrt())
        if length < 1e-14:
            break
        c = c * torch.cos(torch.tensor(length, dtype=c.dtype)) + tangent * (
            torch.sin(torch.tensor(length, dtype=c.dtype)) / length
        )
        c = c / (c @ cosine @ c).clamp_min(1e-300).sqrt()
    return c


@merge_method("slerp", space="delta", source="Shoemake 1985; n vectors: Buss and Fillmore 2001")
def slerp(
    site: SiteInput,
    *,
    iterations: Annotated[int, Knob("Steps of the fixed point for more than two adapters.", at_least=1)] = 50,
) -> Factors:
    """Interpolate on the sphere: the mean direction along great circles; weights say how near to each.

    The coefficients apply to the updates as they are, as is usual (``sin((1-t)θ)/sin θ`` and ``sin(tθ)/sin θ`` for
    two), times the sum of all ``|w|``. A negative weight turns its update round. Updates in exactly opposite
    directions have no mean.
    """
    rows = site.present()
    factors = [f if w >= 0 else f.times(-1) for _, f, w in rows]
    cosine = cosines(gram(factors))
    cosine.fill_diagonal_(1.0)
    shares = torch.tensor(site.shares(), dtype=torch.float64)
    if float(shares @ cosine @ shares) < 1e-12:
        coefficients = shares
        site.facts["opposite"] = True
    elif len(rows) == 2:
        coefficients = _two(float(cosine[0, 1]), shares)
    else:
        coefficients = spherical_mean(cosine, shares, iterations)
    weights = [float(c) * site.strength for c in coefficients]
    return stack(factors, weights)


def _two(cosine: float, shares: Tensor) -> Tensor:
    angle = torch.tensor(cosine, dtype=torch.float64).clamp(-1, 1).arccos()
    if float(angle) < 1e-6:
        return shares
    return (shares * angle).sin() / angle.sin()
