"""Scaling the update of a site, and giving it another rank, on tensors alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lorry.core.errors import AdapterError
from lorry.core.method.base import Method
from lorry.core.method.declared import plain_lora
from lorry.core.method.families import Bottleneck
from lorry.core.method.spec import kaiming
from lorry.core.sites.site import Site
from lorry.formats.updates import doubled, is_plain

_DOWN, _UP = "A", "B"


@dataclass(frozen=True)
class Changed:
    """A site after a change: its method, its tensors, and the squared norms of what was lost and of what was there.

    Attributes
    ----------
    largest
        Largest absolute entry of what was lost.
    """

    method: Method
    tensors: dict[str, Tensor]
    lost: float = 0.0
    size: float = 0.0
    largest: float = 0.0


def rescaled(method: Method, tensors: Mapping[str, Tensor], site: Site, factor: float) -> Changed:
    """Return the site with its update times `factor`.

    The factor goes into alpha, so that no tensor is rounded; its sign, and zero, into B.

    Raises
    ------
    AdapterError
        The factor is not finite, or the update is not proportional to an option alpha.
    """
    if not math.isfinite(factor):
        raise AdapterError(f"An adapter is scaled by a finite number, found {factor}.")
    if not method.scaled_by_alpha:
        raise AdapterError(
            f"The update of {type(method).__name__} at '{site.path}' is not proportional to an option alpha, so it "
            "cannot be scaled in the file. Give the weight where the adapter is activated."
        )
    changed = dict(tensors)
    if factor <= 0:
        if not is_plain(method) or _UP not in tensors or getattr(method, "peft_form", None) is None:
            raise AdapterError(
                f"The update of {type(method).__name__} at '{site.path}' can be scaled by positive numbers only, found "
                f"{factor}. Give the weight where the adapter is activated."
            )
        for name in (n for n in tensors if n.startswith(_UP)):
            changed[name] = tensors[name] * (0.0 if factor == 0 else -1.0)
    size = abs(factor) or 1.0
    if isinstance(method, Bottleneck):
        return Changed(_of_scale(method, site, method.scale(site) * size), changed)
    alpha = getattr(method, "alpha", None)
    return Changed(
        method.with_options(alpha=float(getattr(method, "rank", 1) if alpha is None else alpha) * size), changed
    )


def resized(
    method: Method, tensors: Mapping[str, Tensor], site: Site, rank: int, generator: Generator | None = None
) -> Changed:
    """Return the site with its update at another rank and the same scale.

    A larger rank appends rank units of zeros, so that the update stays as it is. A smaller one keeps the leading
    singular values (Eckart and Young), each divided evenly between A and B.

    Parameters
    ----------
    method, tensors, site
        What is there.
    rank
        At least 1, at most the smaller side of the site.
    generator
        Draws the rows that a larger rank appends to A, as LoRA draws them, so that training can use them; zeros
        without it. B's columns are zeros in any case.

    Raises
    ------
    AdapterError
        The rank does not fit, or the update is not a product of two factors.
    """
    most = min(site.out_features, site.in_features)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most:
        raise AdapterError(f"The rank at '{site.path}' must be a whole number from 1 to {most}, found {rank!r}.")
    if not isinstance(method, Bottleneck) or not method.constant:
        raise AdapterError(
            f"The update of {type(method).__name__} at '{site.path}' is not a product of two factors, so it has no "
            "rank to change. Export it as a plain LoRA first (lorry.formats.export.export_plain)."
        )
    if not method.plain and (method.peft_form is None or not method.peft_form.exact):
        raise AdapterError(f"{type(method).__name__} at '{site.path}' scales the base too and cannot be resized.")
    a, b = method.factors(tensors, site)
    if a.shape[-2] == rank:
        return Changed(method, dict(tensors))
    lost = size = largest = 0.0
    if rank > a.shape[-2]:
        a, b = _padded(a, b, rank, generator)
    else:
        a, b, lost, size, largest = _truncated(method, tensors, site, rank)
    own = method.peft_form is not None and method.peft_form.exact and {_DOWN, _UP} <= tensors.keys()
    kept = {n: t for n, t in tensors.items() if n not in (_DOWN, _UP)} if own else {}
    return Changed(of_rank(method, site, rank, own=own), {**kept, _DOWN: a, _UP: b}, lost, size, largest)


def _padded(a: Tensor, b: Tensor, rank: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
    more = torch.zeros(*a.shape[:-2], rank - a.shape[-2], a.shape[-1])
    if generator is not None:
        kaiming(more, generator)
    return torch.cat([a, more.to(a)], dim=-2), torch.cat([b, b.new_zeros(*b.shape[:-1], rank - b.shape[-1])], dim=-1)


def _truncated(
    method: Bottleneck, tensors: Mapping[str, Tensor], site: Site, rank: int
) -> tuple[Tensor, Tensor, float, float, float]:
    """Return the best product of rank `rank`, the squared norms of what it lacks and of the update, and the largest
    error; both norms with the scale.
    """
    dtype = next(t.dtype for t in method.factors(tensors, site))
    a, b = method.factors(doubled(tensors), site)
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.mT)
    u, s, vt = torch.linalg.svd(rb @ ra.mT, full_matrices=False)
    root = s[..., :rank].sqrt()
    small_b = (qb @ u[..., :rank] * root.unsqueeze(-2)).to(dtype)
    small_a = (root.unsqueeze(-1) * (vt[..., :rank, :] @ qa.mT)).to(dtype)
    scale = method.scale(site)
    gap = (b @ a - small_b.double() @ small_a.double()) * scale
    total = float(s.square().sum()) * scale**2
    return small_a, small_b, float(gap.square().sum()), total, float(gap.abs().max())


def of_rank(method: Bottleneck, site: Site, rank: int, *, own: bool) -> Method:
    """Return the method at another rank with the same scale: of its own sort if `own`, else plain LoRA."""
    made = method.with_options(rank=rank) if own else plain_lora(rank, dropout=method.dropout)
    assert isinstance(made, Bottleneck)
    return _of_scale(made, site, method.scale(site))


def _of_scale(method: Bottleneck, site: Site, scale: float) -> Bottleneck:
    """Return the method with the alpha that gives a scale; alpha / rank rounds, so its neighbours are tried too."""
    alpha = scale / method.with_options(alpha=1.0).scale(site)
    for candidate in (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, 0.0)):
        trial = method.with_options(alpha=candidate)
        if trial.scale(site) == scale:
            return trial
    return method.with_options(alpha=alpha)
