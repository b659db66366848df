"""Figures for the receipt, from small cores only."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorry.merging.factors import Factors, cosines, gram, gram_norm, overlap, rounding_norm, spans
from lorry.merging.inputs import SiteInput


def pair_facts(site: SiteInput) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Return for each pair ``"a|b"`` at a site: cosine, overlap of what is read, overlap of what is written."""
    rows = site.present()
    if len(rows) < 2:
        return {}, {}, {}
    parts = site.joint.parts()
    cosine = cosines(gram(parts))
    found_spans = spans(parts)
    found: tuple[dict[str, float], dict[str, float], dict[str, float]] = ({}, {}, {})
    for i in range(len(rows)):
        for j in range(i + 1, len(rows)):
            pair = f"{rows[i][0]}|{rows[j][0]}"
            found[0][pair] = float(cosine[i, j])
            found[1][pair] = overlap(found_spans[i][1], found_spans[j][1])
            found[2][pair] = overlap(found_spans[i][0], found_spans[j][0])
    return found


def squared_errors(site: SiteInput, result: Factors, stored: Factors) -> dict[str, float]:
    """Return squared norms: of the result, of the exact weighted sum, of their difference, and of what rounding
    changed.
    """
    weights = [w for _, _, w in site.present()]
    exact = float(site.joint.core(weights).norm())
    return {
        "norm": float((result.inside[0] @ result.inside[1]).square().sum())
        if result.inside
        else gram_norm(result) ** 2,
        "exact": exact**2,
        "error": site.joint.distance(result, weights) ** 2,
        "rounding": rounding_norm(result, stored) ** 2,
    }


def ratio(part: float, whole: float) -> float:
    """Return ``√(part / whole)``; infinite for something out of nothing."""
    return (part / whole) ** 0.5 if whole else (0.0 if part == 0 else float("inf"))


def total(values: Sequence[dict[str, float]], key: str) -> float:
    """Return the sum of one figure over sites."""
    return float(torch.tensor([v[key] for v in values], dtype=torch.float64).sum())
