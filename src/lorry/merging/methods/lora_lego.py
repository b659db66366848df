"""LoRA-LEGO: cluster the rank units of all adapters and rebuild one adapter from the centroids."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from lorry.merging.factors import Factors, decompose
from lorry.merging.inputs import SiteInput
from lorry.merging.registry import Knob, merge_method

Gauge = Literal["none", "norm", "unit", "svd"]
_TINY = 1e-12


def in_gauge(f: Factors, gauge: str) -> Factors:
    """Return the same update in another split: whole factors of one size, each unit balanced, or the singular one."""
    if gauge == "none":
        return f
    if gauge == "svd":
        d = decompose(f)
        singular = d.truncated(f.rank)
        # signs: the largest entry of every row of A is positive, so that the split depends on the update alone
        place = singular.a.abs().argmax(dim=1, keepdim=True)
        sign = singular.a.gather(1, place).sign()
        sign = torch.where(sign == 0, torch.ones_like(sign), sign)
        return Factors(singular.a * sign, singular.b * sign.mT)
    if gauge == "unit":
        na, nb = f.a.norm(dim=1), f.b.norm(dim=0)
        ratio = torch.where((na > 0) & (nb > 0), (nb / na.clamp_min(_TINY)).sqrt(), torch.ones_like(na)).clamp_min(
            _TINY
        )
        return Factors(f.a * ratio[:, None], f.b / ratio)
    return f.balanced()


def k_means(points: Tensor, k: int, iterations: int, generator: torch.Generator | None) -> tuple[Tensor, float]:
    """Return the cluster of each point and the sum of squared distances (Lloyd).

    Parameters
    ----------
    points
        ``(n, d)``, n at least k.
    k, iterations
        Number of clusters, and most steps.
    generator
        Draws the first centres; None starts with the point nearest to the mean and goes on with the farthest one each
        time, which does not depend on the order of the points.
    """
    if generator is None:
        first = int((points - points.mean(0)).square().sum(1).argmin())
        chosen = [first]
        nearest = (points - points[first]).square().sum(1)
        while len(chosen) < k:
            chosen.append(int(nearest.argmax()))
            nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(1))
    else:
        chosen = torch.randperm(len(points), generator=generator)[:k].tolist()
    centres = points[chosen]
    labels = torch.full((len(points),), -1)
    for _ in range(iterations):
        distances = torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist").square()
        fresh = distances.argmin(1)
        own = distances.gather(1, fresh[:, None]).squeeze(1)
        for empty in sorted(set(range(k)) - set(fresh.tolist())):
            counts = torch.bincount(fresh, minlength=k)
            candidates = torch.where(counts[fresh] > 1, own, torch.full_like(own, -1.0))
            farthest = int(candidates.argmax())
            fresh[farthest], own[farthest] = empty, 0.0
        if torch.equal(fresh, labels):
            break
        labels = fresh
        centres = torch.stack([points[labels == j].mean(0) for j in range(k)])
    return labels, float((points - centres[labels]).square().sum())


@merge_method(
    "lora-lego",
    space="factor",
    source="arXiv 2409.16167",
    note="rank units are not unique: sign, scale and mixing within an adapter change the clusters, which the paper "
    "leaves so; gauge=norm or unit takes out the scale, gauge=svd makes them depend on the update alone",
)
def lora_lego(
    site: SiteInput,
    *,
    rank: Annotated[
        int | None,
        Knob("Number of clusters, the rank of the result; the largest of the inputs if not given.", at_least=1),
    ] = None,
    feature: Annotated[
        Literal["raw", "half-normalised"], Knob("Cluster units as they are, or both halves at unit length.")
    ] = "raw",
    unit_norm: Annotated[
        Literal["l2", "linf", "none"], Knob("Norm in which centroids are brought to the mean size of their members.")
    ] = "l2",
    output_norm: Annotated[
        bool, Knob("Scale by √(mean rank of the inputs / rank), against the growth of variance.")
    ] = True,
    gauge: Annotated[
        Gauge,
        Knob("Split of each adapter before: as is (the paper's), equal norms of A and B, units balanced, singular."),
    ] = "none",
    init: Annotated[
        Literal["order-free", "random"], Knob("First centres: by farthest points, or random.")
    ] = "order-free",
    restarts: Annotated[int, Knob("Runs of k-means with random centres; the best is taken.", at_least=1)] = 10,
    iterations: Annotated[int, Knob("Most steps of k-means.", at_least=1)] = 100,
    seed: Annotated[int, Knob("Seed of random centres.", at_least=0)] = 0,
) -> Factors:
    """Cluster all rank units ``[a; b]`` with k-means; the rescaled centroids are the units of the result.

    Weights: the result is scaled by the sum of all ``|w|`` (1 for an average); within it each unit counts by its
    adapter's share.
    """
    units, shares = _units(site, gauge)
    ranks, width = site.ranks(), site.shape[1]
    k = min(rank or max(ranks), len(units))
    points = units
    if feature == "half-normalised":
        halves = [h / h.norm(dim=1, keepdim=True).clamp_min(_TINY) for h in (units[:, :width], units[:, width:])]
        points = torch.cat(halves, dim=1)
    if init == "random":
        generators = [site.generator(seed, f"k-means {run}") for run in range(restarts)]
        labels, inertia = min((k_means(points, k, iterations, g) for g in generators), key=lambda run: run[1])
    else:
        labels, inertia = k_means(points, k, iterations, None)
    centroids = torch.stack(
        [_centroid(units[labels == j], shares[labels == j], width, unit_norm, site) for j in range(k)]
    )
    scale = site.strength * ((sum(ranks) / len(ranks) / k) ** 0.5 if output_norm else 1.0)
    site.facts.update(inertia=inertia, clusters=labels.tolist())
    return Factors(centroids[:, :width], centroids[:, width:].mT * scale)


def _units(site: SiteInput, gauge: str) -> tuple[Tensor, Tensor]:
    """Return all rank units ``(n, in + out)``, those of negative weight turned round, and their relative weights (mean
    1).
    """
    units, shares = [], []
    rows = site.present()
    for (_, f, w), share in zip(rows, site.shares(), strict=True):
        split = in_gauge(f, gauge)
        units.append(torch.cat([split.a, split.b.mT * (1.0 if w >= 0 else -1.0)], dim=1))
        shares.append(torch.full((split.rank,), share * len(rows), dtype=torch.float64))
    return torch.cat(units), torch.cat(shares)


def _centroid(members: Tensor, shares: Tensor, width: int, norm: str, site: SiteInput) -> Tensor:
    """Return the weighted mean of a cluster at the mean size of its members; its output half carries the mean
    weight.
    """
    total = shares.sum()
    if float(total) == 0:
        return torch.zeros_like(members[0])
    weights = (shares / total)[:, None]
    centre = (weights * members).sum(0)
    if norm != "none":
        order = 2 if norm == "l2" else float("inf")
        size, goal = (
            torch.linalg.vector_norm(centre, order),
            (weights[:, 0] * torch.linalg.vector_norm(members, order, dim=1)).sum(),
        )
        if float(size) > 1e-6 * float(goal):
            centre = centre * (goal / size)
        else:
            site.facts["cancelled_clusters"] = site.facts.get("cancelled_clusters", 0) + 1
    half = torch.ones_like(centre)
    half[width:] = shares.mean()
    return centre * half
