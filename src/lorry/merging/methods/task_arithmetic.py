"""The exact weighted sum of updates, kept whole or reduced to a rank: task arithmetic, concatenation, SVD."""

from __future__ import annotations

from typing import Annotated

from lorry.merging.factors import Factors, stack
from lorry.merging.inputs import SiteInput
from lorry.merging.registry import Knob, merge_method


def weighted_sum(site: SiteInput) -> Factors:
    """Return ``Σ w ΔW`` exactly, at the sum of the ranks."""
    rows = site.present()
    return stack([f for _, f, _ in rows], [w for _, _, w in rows])


def reduced(site: SiteInput, rank: int | None) -> Factors:
    """Return the best approximation of ``Σ w ΔW`` at `rank` (None: the numerical rank), noting what was cut off."""
    d = site.joint.decompose([w for _, _, w in site.present()], rank)
    keep = d.s.shape[0] if rank is None else rank
    total = float(d.s.square().sum())
    if total:
        site.facts["energy_dropped"] = float(d.s[keep:].square().sum()) / total
    return d.truncated(keep)


@merge_method("task-arithmetic", space="delta", source="arXiv 2212.04089", exact=True)
def task_arithmetic(site: SiteInput) -> Factors:
    """Weighted sum of the updates, exact, at the smallest rank that holds it."""
    return reduced(site, None)


@merge_method("cat", space="delta", source="PEFT's add_weighted_adapter, type cat", exact=True)
def cat(site: SiteInput) -> Factors:
    """Weighted sum of the updates, exact, by stacking the factors; the rank is the sum of the ranks."""
    whole = weighted_sum(site)
    small = stack(site.joint.parts(), [w for _, _, w in site.present()])
    return Factors(whole.a, whole.b, (small.b, small.a))


@merge_method("svd", space="delta", source="PEFT's add_weighted_adapter, type svd; Eckart and Young 1936")
def svd(
    site: SiteInput,
    *,
    rank: Annotated[
        int | None, Knob("Rank of the result; the largest rank of the inputs if not given.", at_least=1)
    ] = None,
) -> Factors:
    """Best approximation, of a given rank, of the weighted sum of the updates."""
    return reduced(site, rank or max(site.ranks()))
