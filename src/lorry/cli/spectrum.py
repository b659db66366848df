"""Norms and singular values of low-rank updates, from their factors: the dense update is never built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lorry.formats.file import AdapterFile


def singular_values(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """Return the singular values of ``scale · B A`` in falling order.

    With ``B = Q_b R_b`` and ``Aᵀ = Q_a R_a`` the update is ``Q_b (R_b R_aᵀ) Q_aᵀ``, so its singular values
    are those of the small core in the middle: O((in + out) rank²) instead of O(in · out · rank).

    Parameters
    ----------
    a
        ``(*lead, rank, in)``.
    b
        ``(*lead, out, rank)``.
    scale
        Constant factor of the update.

    Returns
    -------
    Float64 ``(*lead, k)`` with k = min(rank, in, out).
    """
    r_b = torch.linalg.qr(b.detach().double(), mode="r").R
    r_a = torch.linalg.qr(a.detach().double().mT, mode="r").R
    values: Tensor = torch.linalg.svdvals(abs(scale) * (r_b @ r_a.mT))
    return values


def summary(values: Tensor) -> dict[str, Any]:
    """Return the norms that follow from singular values ``(*lead, k)``.

    For a bank (``lead`` not empty) the norm is that of the whole bank and the spectrum the root mean square
    over its members.
    """
    squares = values.square()
    norm = float(squares.sum().sqrt())
    flat = squares.reshape(-1, values.shape[-1])
    spectrum = flat.mean(0).sqrt()
    total = float(spectrum.square().sum())
    largest = float(spectrum[0]) if len(spectrum) else 0.0
    share = spectrum.square() / total if total else torch.zeros_like(spectrum)
    entropy = float(-(share * share.clamp_min(1e-300).log()).sum())
    return {
        "norm": norm,
        "spectral_norm": float(values.max()) if values.numel() else 0.0,
        "stable_rank": total / largest**2 if largest else 0.0,
        "effective_rank": float(torch.tensor(entropy).exp()) if total else 0.0,
        "singular_values": spectrum.tolist(),
    }


def site_facts(path: Path) -> list[dict[str, Any]]:
    """Return the facts of every site of an adapter file that has a spectrum."""
    from lorry.formats.reader import open_adapter

    with open_adapter(path) as file:
        return [s for s in (facts_of(file, name) for name in file.sites) if s.get("singular_values")]


def facts_of(file: AdapterFile, path: str) -> dict[str, Any]:
    """Return what a file says of one site, with norms and singular values where they follow from the
    file alone.
    """
    from lorry.core.method.families import Bottleneck
    from lorry.core.sites.stacks import split_at_number

    part = file.sites[path]
    tensors: Mapping[str, Tensor] = file.all_tensors(path)
    method = part.method
    site = _stand_in(path, part.kind, part.shape, tensors)
    facts: dict[str, Any] = {
        "path": path,
        "layer": place[1] if (place := split_at_number(path)) else None,
        "kind": part.kind or "linear",
        "shape": list(part.shape or site.shape),
        "method": method.to_dict(),
        "parameters": sum(t.numel() for t in tensors.values()),
        "tensors": {name: {"shape": list(t.shape), "norm": float(t.double().norm())} for name, t in tensors.items()},
    }
    if isinstance(method, Bottleneck) and method.constant:
        try:
            a, b = method.factors(tensors, site)
        except (KeyError, AttributeError):
            facts["note"] = "the update needs the base weight too"
            return facts
        facts |= {"rank": int(a.shape[-2]), "scale": method.scale(site)}
        facts |= summary(singular_values(a, b, method.scale(site)))
        if not method.plain:
            facts["note"] = "low-rank part alone; its output gain needs the base weight"
    return facts


def _stand_in(path: str, kind: str | None, shape: tuple[int, ...] | None, tensors: Mapping[str, Tensor]) -> Any:
    """Return a site without a model, which tells a method the sizes."""
    from torch import nn

    from lorry.core.sites.kinds import kind_named
    from lorry.core.sites.site import Site

    if shape is None:
        a, b = tensors.get("A"), tensors.get("B")
        known = a is not None and b is not None and a.ndim > 1 and b.ndim > 1
        shape = (*b.shape[:-2], b.shape[-2], a.shape[-1]) if known and a is not None and b is not None else (0, 0)
    module = nn.Module()
    found = kind_named(kind or "linear")
    return Site(path, found, module, module, "", shape[-2], shape[-1], tuple(shape[:-2]))
