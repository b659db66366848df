"""Norms and singular values of low-rank updates, from their factors: the dense update is never built."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def singular_values(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """Return the singular values of ``scale · B A`` in falling order.

    With ``B = Q_b R_b`` and ``Aᵀ = Q_a R_a`` the update is ``Q_b (R_b R_aᵀ) Q_aᵀ``, so its singular values are those of the small
    core in the middle: O((in + out) rank²) instead of O(in · out · rank).

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
    return torch.linalg.svdvals(abs(scale) * (r_b @ r_a.mT))


def summary(values: Tensor) -> dict[str, Any]:
    """Return the norms that follow from singular values ``(*lead, k)``.

    For a bank (``lead`` not empty) the norm is that of the whole bank and the spectrum the root mean square over its members.
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
