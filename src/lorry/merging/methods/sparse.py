"""Sparsifying merges as a table: which entries stay, how adapters agree, how what stays is rescaled, and in which
space.

The same rows run in three spaces, told apart by the name: on the updates (``ties``), on A and B separately
(``factor-ties``), and on coordinates in the joint singular basis of all updates (``knots-ties``, KnOTS, arXiv
2410.19735, equations 3 to 5).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from lorry.core.options import option
from lorry.merging.factors import NUMERICAL_ZERO, Factors, decompose_dense
from lorry.merging.inputs import SiteInput
from lorry.merging.registry import Space, add, alias, options_class

Keep = Literal["all", "largest", "random", "random by rank", "middle"]
Rescale = Literal["none", "density", "l1"]


@dataclass(frozen=True)
class Row:
    """A published combination.

    Attributes
    ----------
    keep
        Which entries stay; `elect` whether entries must agree in sign; `rescale` how the others make up for the
        dropped ones.
    density
        The default share of entries kept.
    """

    slug: str
    keep: Keep
    elect: bool
    rescale: Rescale
    density: float
    source: str
    help: str


TABLE = (
    Row(
        "magnitude-prune",
        "largest",
        False,
        "none",
        0.2,
        "PEFT's type magnitude_prune",
        "Largest entries of each, summed",
    ),
    Row(
        "ties",
        "largest",
        True,
        "none",
        0.2,
        "arXiv 2306.01708",
        "Largest entries of each; sign by majority; mean of those that agree",
    ),
    Row("dare", "random", False, "density", 0.7, "arXiv 2311.03099", "Random entries of each, rescaled, summed"),
    Row(
        "dare-ties",
        "random",
        True,
        "density",
        0.7,
        "arXiv 2311.03099",
        "Random entries of each, rescaled; then as TIES",
    ),
    Row(
        "della",
        "random by rank",
        True,
        "density",
        0.7,
        "arXiv 2406.11617",
        "Random entries, the larger the likelier; then as TIES",
    ),
    Row(
        "della-linear",
        "random by rank",
        False,
        "density",
        0.7,
        "arXiv 2406.11617",
        "Random entries, the larger the likelier, summed",
    ),
    Row("breadcrumbs", "middle", False, "none", 0.9, "arXiv 2312.06795", "Entries neither outliers nor small, summed"),
    Row(
        "breadcrumbs-ties",
        "middle",
        True,
        "none",
        0.9,
        "arXiv 2312.06795",
        "Entries neither outliers nor small; then as TIES",
    ),
)


def largest(values: Tensor, count: int) -> Tensor:
    """Return the mask of the `count` entries of largest magnitude; equal ones at the border all stay."""
    flat = values.abs().flatten()
    if count >= flat.numel():
        return torch.ones_like(values, dtype=torch.bool)
    if count <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    return values.abs() >= flat.kthvalue(flat.numel() - count + 1).values


def middle(values: Tensor, density: float, outliers: float) -> Tensor:
    """Return the mask without the share `outliers` of largest entries and without the smallest, `density` of them
    staying.
    """
    top = round(values.numel() * outliers)
    keep = max(min(int(values.numel() * density), values.numel() - top), 1)
    mask = largest(values, top + keep)
    return mask & ~largest(values, top) if top else mask


def by_rank(values: Tensor, density: float, spread: float) -> Tensor:
    """Return for each entry the probability to stay: `density` ∓ ``spread / 2``, growing with its magnitude's rank in
    its row.
    """
    count = values.shape[-1]
    ranks = values.abs().argsort(dim=-1, stable=True).argsort(dim=-1, stable=True).to(values.dtype)
    centred = ranks / max(count - 1, 1) - 0.5 if count > 1 else torch.zeros_like(values)
    return (density + spread * centred).clamp(1e-6, 1.0)


def sparsified(values: Tensor, row: Row, options: dict[str, Any], generator: Generator) -> Tensor:
    """Return `values` with the entries that the row drops set to 0 and the others rescaled."""
    density, rescale = options["density"], options["rescale"]
    chance: Tensor | float = density
    if density >= 1 and not options.get("outliers"):
        return values
    if row.keep == "largest":
        mask = largest(values, max(int(density * values.numel()), 1))
    elif row.keep == "middle":
        mask = middle(values, density, options["outliers"])
    else:
        if row.keep == "random by rank":
            chance = by_rank(values, density, options["spread"])
        mask = torch.rand(values.shape, generator=generator, dtype=torch.float64) < chance
    kept = values * mask
    if rescale == "density":
        return kept / chance
    if rescale == "l1":
        return kept * (values.abs().sum() / kept.abs().sum().clamp_min(torch.finfo(values.dtype).tiny))
    return kept


def agreed(values: Sequence[Tensor], weights: Sequence[float], majority: str) -> Tensor:
    """Return the weighted mean of the entries that have the elected sign, times the sum of all ``|w|``.

    With weights 1/n this is the disjoint mean of TIES (section 3); one adapter with weight w gives w times itself.
    """
    signed = [v if w >= 0 else -v for v, w in zip(values, weights, strict=True)]
    sizes = [abs(w) for w in weights]
    votes = sum((s.sign() if majority == "frequency" else s) * w for s, w in zip(signed, sizes, strict=True))
    assert isinstance(votes, Tensor)
    elected = torch.where(votes >= 0, 1.0, -1.0).to(votes.dtype)
    total, share = torch.zeros_like(votes), torch.zeros_like(votes)
    for value, size in zip(signed, sizes, strict=True):
        match = (value.sign() == elected).to(votes.dtype)
        total += size * value * match
        share += size * match
    return total / torch.where(share > 0, share, torch.ones_like(share)) * sum(sizes)


def consensus(values: Sequence[Tensor], weights: Sequence[float], row: Row, options: dict[str, Any]) -> Tensor:
    """Return the sum, or the mean of those that agree."""
    if row.elect:
        return agreed(values, weights, options["majority"])
    total = torch.zeros_like(values[0])
    for value, weight in zip(values, weights, strict=True):
        total += weight * value
    return total


def in_delta_space(site: SiteInput, *, row: Row, **options: Any) -> Factors:
    """Run a row on the dense updates; the result is reduced to `rank`, the sum of the ranks if not given."""
    rows = site.present()
    kept = []
    for name, f, _ in rows:
        dense = f.dense()
        kept.append(sparsified(dense, row, options, site.generator(options["seed"], name)))
        _count(site, kept[-1], dense)
    result = consensus(kept, [w for _, _, w in rows], row, options)
    rank = options["rank"] or min(sum(site.ranks()), *site.shape)
    d = decompose_dense(result, rank)
    total = float(result.square().sum())
    if total:
        site.facts["energy_dropped"] = max(1 - float(d.s.square().sum()) / total, 0.0)
    return d.truncated(rank)


def in_factor_space(site: SiteInput, *, row: Row, **options: Any) -> Factors:
    """Run a row on A and B separately; A's by shares, B's by weights, smaller ranks padded with zeros."""
    rows, rank = site.present(), max(site.ranks())
    sides: list[list[Tensor]] = [[], []]
    for name, f, _ in rows:
        generator = site.generator(options["seed"], name)
        for side, values in zip(sides, (f.padded(rank).a, f.padded(rank).b), strict=True):
            side.append(sparsified(values, row, options, generator))
            _count(site, side[-1], values)
    a = consensus(sides[0], site.shares(), row, options)
    return Factors(a, consensus(sides[1], [w for _, _, w in rows], row, options))


def in_joint_basis(site: SiteInput, *, row: Row, **options: Any) -> Factors:
    """Run a row on the coordinates Z of each update in the left singular basis U of ``[ΔW₁ ... ΔWₙ]``, so ``ΔW = U Z``.

    U and Z come from thin QRs and a core of side R, and the result keeps its rank, so nothing is cut off.
    """
    rows, joint = site.present(), site.joint
    cores = [rb @ ra.mT for rb, ra in zip(joint.rb, joint.ra, strict=True)]
    u, s, vt = torch.linalg.svd(torch.cat(cores, dim=1), full_matrices=False)
    k = max(int((s > NUMERICAL_ZERO * s[0]).sum()), 1)
    blocks = (s[:k, None] * vt[:k]).split(joint.qa.shape[1], dim=1)
    z = []
    for (name, _, _), block in zip(rows, blocks, strict=True):
        aligned = block @ joint.qa.mT
        z.append(sparsified(aligned, row, options, site.generator(options["seed"], name)))
        _count(site, z[-1], aligned)
    return Factors(consensus(z, [w for _, _, w in rows], row, options), joint.qb @ u[:, :k])


def _count(site: SiteInput, kept: Tensor, values: Tensor) -> None:
    """Note how many of the entries were dropped."""
    counts = site.facts.setdefault("entries", [0, 0])
    counts[0] += int((kept == 0).sum() - (values == 0).sum())
    counts[1] += values.numel()


def _options(row: Row, space: Space, slug: str) -> type:
    fields: list[tuple[str, Any, Any]] = [
        ("density", "float", option(row.density, "Share of entries that stay.", above=0, at_most=1)),
        (
            "rescale",
            "str",
            option(
                row.rescale,
                "Make up for dropped entries by 1/density, by the ratio of L1 norms, or not.",
                choices=("none", "density", "l1"),
            ),
        ),
    ]
    if row.keep == "random by rank":
        fields.append(
            (
                "spread",
                "float",
                option(0.2, "Density of the largest entries minus that of the smallest.", at_least=0, at_most=1),
            )
        )
    if row.keep == "middle":
        fields.append(
            ("outliers", "float", option(0.01, "Share of the largest entries, which are dropped.", at_least=0, below=1))
        )
    if row.elect:
        choices = ("total", "frequency")
        fields.append(
            (
                "majority",
                "str",
                option("total", "Elect the sign of the weighted sum, or that of most adapters.", choices=choices),
            )
        )
    if space == "delta":
        help = "Rank of the result; the sum of the ranks of the inputs if not given."
        fields.append(("rank", "int | None", option(None, help, at_least=1)))
    fields.append(
        ("seed", "int", option(0, "Seed of the random masks; each depends on seed, site and adapter name.", at_least=0))
    )
    return options_class(slug, fields)


def _register() -> None:
    spaces: tuple[tuple[str, Space, Callable[..., Factors], str], ...] = (
        ("", "delta", in_delta_space, "on the updates"),
        ("factor-", "factor", in_factor_space, "on A and B separately"),
        ("knots-", "aligned", in_joint_basis, "in the joint singular basis (KnOTS)"),
    )
    for prefix, space, function, where in spaces:
        for row in TABLE:
            slug = prefix + row.slug
            plain = {"density": 1.0, **({"outliers": 0.0} if row.keep == "middle" else {})}
            source = row.source + (", arXiv 2410.19735" if space == "aligned" else "")
            bound = functools.partial(function, row=row)
            add(
                slug,
                bound,
                _options(row, space, slug),
                help=f"{row.help}; {where}.",
                space=space,
                scope="site",
                source=source,
                plain=plain,
            )
    alias("knots", "knots-ties")


_register()
