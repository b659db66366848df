"""DO-Merging: make the adapters' factors more orthogonal, then merge lengths and directions of columns apart."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from lorry.merging.factors import Factors, decompose
from lorry.merging.inputs import SiteInput
from lorry.merging.registry import Knob, merge_method

Axis = Literal["column", "row", "matrix"]


def orthogonalised(
    rows: list[Tensor], gamma: float, steps: int, cap: float | None
) -> tuple[list[Tensor], dict[str, float]]:
    """Move the rows of several matrices ``(r_t, d)`` a little, so that those of different matrices become orthogonal.

    Minimises ``Σ_{t≠u} ‖A_t A_uᵀ‖² + gamma Σ ‖dA_t‖²`` with both terms divided by mean squared norms, so that gamma
    has no unit: gamma 1 in the published form is ``1 / mean ‖A_t‖²`` here, a few thousandths for entries of unit size.
    The gradient never leaves the span of all rows, so the search runs on coordinates in it, whatever d is.

    Parameters
    ----------
    rows
        The matrices.
    gamma, steps
        Weight of staying near, and most steps of the search (L-BFGS).
    cap
        Largest ``‖dA‖ / ‖A‖``; a larger displacement is shortened to it.
    """
    q = torch.linalg.qr(torch.cat(rows).mT).Q
    start = [r @ q for r in rows]
    sizes = [s.shape[0] for s in start]
    joint = torch.cat(start)
    unit = float(joint.square().sum()) / len(rows)
    owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(sizes))
    between = (owner[:, None] != owner[None, :]).double()
    move = torch.zeros_like(joint, requires_grad=True)
    if unit == 0 or len(rows) == 1:
        return rows, {"before": 0.0, "after": 0.0, "displacement": 0.0}

    def cross(values: Tensor) -> Tensor:
        return ((values @ values.mT) * between).square().sum() / unit**2

    optimizer = torch.optim.LBFGS(
        [move], max_iter=steps, line_search_fn="strong_wolfe", tolerance_grad=1e-12, tolerance_change=1e-14
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross(joint + move) + gamma * move.square().sum() / unit
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    found = move.detach()
    share = float(found.norm() / joint.norm())
    if cap is not None and share > cap:
        found, share = found * (cap / share), cap
    facts = {"before": float(cross(joint)), "after": float(cross(joint + found)), "displacement": share}
    moved = (found @ q.mT).split(sizes)
    return [r + m for r, m in zip(rows, moved, strict=True)], facts


def lengths(f: Factors, axis: Axis) -> Tensor:
    """Return the norms of the columns ``(in,)`` or rows ``(out,)`` of ``B A``, or of the whole ``(1,)``, by small Gram
    matrices.
    """
    if axis == "column":
        return ((f.b.mT @ f.b @ f.a) * f.a).sum(0).clamp_min(0).sqrt()
    if axis == "row":
        return ((f.b @ (f.a @ f.a.mT)) * f.b).sum(1).clamp_min(0).sqrt()
    return torch.tensor([f.norm()], dtype=torch.float64)


def scaled(f: Factors, values: Tensor, axis: Axis) -> Factors:
    """Return ``B A`` with its columns, rows, or the whole multiplied."""
    return Factors(f.a, f.b * values[:, None]) if axis == "row" else Factors(f.a * values, f.b)


def decoupled(parts: list[Factors], shares: list[float], axis: Axis, renormalise: bool, floor: float) -> Factors:
    """Return mean length times mean direction of each column (section on decoupling), as factors of the summed rank."""
    norms = [lengths(f, axis) for f in parts]
    mean = sum(s * n for s, n in zip(shares, norms, strict=True))
    assert isinstance(mean, Tensor)
    pieces = []
    for f, share, norm in zip(parts, shares, norms, strict=True):
        dead = norm <= floor * norm.max()
        inverse = torch.where(dead, torch.zeros_like(norm), share / norm.clamp_min(torch.finfo(norm.dtype).tiny))
        pieces.append(scaled(f, inverse, axis))
    direction = Factors(torch.cat([p.a for p in pieces]), torch.cat([p.b for p in pieces], dim=1))
    if renormalise:
        length = lengths(direction, axis)
        mean = mean * torch.where(length > 1e-12, 1 / length.clamp_min(1e-12), torch.zeros_like(length))
    return scaled(direction, mean, axis)


@merge_method("do-merging", space="delta", source="arXiv 2505.15875", plain={"steps": 0})
def do_merging(
    site: SiteInput,
    *,
    steps: Annotated[int, Knob("Most steps of the orthogonalisation; 0 leaves it out.", at_least=0)] = 100,
    gamma: Annotated[
        float, Knob("Weight of staying near the given factors, relative to the overlap.", at_least=0)
    ] = 1e-3,
    cap: Annotated[float | None, Knob("Largest displacement of the factors, relative to their norm.", above=0)] = None,
    axis: Annotated[
        Axis, Knob("Whose length and direction are merged apart: input columns, output rows, or the whole matrix.")
    ] = "column",
    renormalise: Annotated[bool, Knob("Bring the mean directions back to unit length.")] = False,
    floor: Annotated[
        float, Knob("Columns shorter than this share of the longest have no direction.", at_least=0, below=1)
    ] = 1e-9,
) -> Factors:
    """Orthogonalise between adapters, then multiply the mean length of each column by its mean direction.

    With weights 1/n this is ``1/n² (Σ V) diag(Σ α)``; other weights enter as shares of both means, their sum as the
    strength.
    """
    rows = site.present()
    parts = [f if w >= 0 else f.times(-1) for _, f, w in rows]
    if steps and len(parts) > 1:
        # singular split: the overlap of factors then depends on the updates alone, and both factors are of one size
        parts = [decompose(f).truncated(f.rank) for f in parts]
        a, facts_a = orthogonalised([f.a for f in parts], gamma, steps, cap)
        b, facts_b = orthogonalised([f.b.mT for f in parts], gamma, steps, cap)
        site.facts.update(overlap_a=facts_a, overlap_b=facts_b)
        parts = [Factors(x, y.mT) for x, y in zip(a, b, strict=True)]
    return decoupled(parts, site.shares(), axis, renormalise, floor).times(site.strength)
