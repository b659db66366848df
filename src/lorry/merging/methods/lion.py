"""Fusion after the principles of LiON-LoRA: norm consistency, orthogonality, and an effect linear in each strength.

The paper (arXiv 2507.05678) states the principles for motion adapters of a video model; no equation of it was
available. These are the simplest data-free forms: the size of an adapter's effect at a site is the Frobenius norm of
its update (the RMS output for white inputs), and two adapters' likeness is the cosine of their updates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from lorry.merging.factors import Factors, cosines, gram, stack
from lorry.merging.inputs import Pool, SiteInput
from lorry.merging.registry import Knob, merge_method

_SOURCE = "after LiON-LoRA, arXiv 2507.05678"
Norm = Annotated[Literal["mean", "min"], Knob("The size that all adapters get: the mean or the smallest of theirs.")]
Threshold = Annotated[
    float, Knob("Cosine from which on two adapters are too alike or opposed to share a site.", above=0, at_most=1)
]


def equalised(norms: list[float], mode: str) -> list[float]:
    """Return the factor of each adapter that gives all of them one size; adapters of size 0 are left out of it."""
    live = [n for n in norms if n > 0]
    goal = (min(live) if mode == "min" else sum(live) / len(live)) if live else 0.0
    return [goal / n if n > 0 else 1.0 for n in norms]


def heirs(site: SiteInput, threshold: float) -> list[int]:
    """Return for each adapter which one stands for it: itself, or a larger one that it is not orthogonal to.

    The largest update goes first; the choice does not depend on the weights, so the result stays linear in each of
    them.
    """
    rows = site.present()
    values = gram([f for _, f, _ in rows])
    likeness = cosines(values)
    order = sorted(range(len(rows)), key=lambda i: (-float(values[i, i]), rows[i][0]))
    kept: list[int] = []
    heir = list(range(len(rows)))
    for i in order:
        against = [k for k in kept if abs(float(likeness[i, k])) >= threshold]
        if against:
            heir[i] = max(against, key=lambda k: abs(float(likeness[i, k])))
        else:
            kept.append(i)
    dropped = [rows[i][0] for i in range(len(rows)) if heir[i] != i]
    if dropped:
        site.facts["not_orthogonal"] = dropped
    return heir


def handed_over(site: SiteInput, heir: list[int]) -> list[float]:
    """Return the weights after each dropped adapter has handed its own to its heir."""
    weights = [0.0] * len(heir)
    for i, (_, _, w) in enumerate(site.present()):
        weights[heir[i]] += w
    return weights


@merge_method("norm-consistent", space="delta", scope="adapter", source=_SOURCE)
def norm_consistent(
    pool: Pool,
    *,
    norm: Norm = "mean",
    across: Annotated[
        Literal["site", "adapter"], Knob("Equalise at each site, or by one ratio for a whole adapter.")
    ] = "site",
) -> Iterator[tuple[str, Factors]]:
    """Weighted sum of the updates after giving all adapters the same size."""
    ratios: dict[str, float] = {}
    if across == "adapter":
        squares = dict.fromkeys(pool.names, 0.0)
        for site in pool.sites():
            for name, f, _ in site.present():
                squares[name] += f.norm() ** 2
        ratios = dict(zip(pool.names, equalised([squares[n] ** 0.5 for n in pool.names], norm), strict=True))
        pool.facts["ratios"] = ratios
    for site in pool.sites():
        rows = site.present()
        own = [ratios[n] for n, _, _ in rows] if ratios else equalised([f.norm() for _, f, _ in rows], norm)
        site.facts["ratios"] = {n: r for (n, _, _), r in zip(rows, own, strict=True)}
        yield site.path, stack([f for _, f, _ in rows], [w * r for (_, _, w), r in zip(rows, own, strict=True)])


@merge_method("orthogonality-checked", space="delta", source=_SOURCE)
def orthogonality_checked(site: SiteInput, *, threshold: Threshold = 0.2) -> Factors:
    """Weighted sum in which an adapter enters only where it is nearly orthogonal to the larger ones.

    Where it is not, it hands its weight to the one it resembles most, so the strength of the whole is kept.
    """
    rows = site.present()
    return stack([f for _, f, _ in rows], handed_over(site, heirs(site, threshold)))


@merge_method("linear-strength", space="delta", source=_SOURCE)
def linear_strength(
    site: SiteInput,
    *,
    norm: Norm = "mean",
    threshold: Threshold = 1.0,
) -> Factors:
    """Norm-consistent sum over adapters that pass the check of orthogonality: exactly linear in the strength of each.

    With threshold 1 all adapters enter. Choose the layers (LiON-LoRA adapts shallow ones) by a schedule of weights.
    """
    rows = site.present()
    ratios = equalised([f.norm() for _, f, _ in rows], norm)
    weights = handed_over(site, heirs(site, threshold)) if threshold < 1 else [w for _, _, w in rows]
    return stack([f for _, f, _ in rows], [w * r for w, r in zip(weights, ratios, strict=True)])
