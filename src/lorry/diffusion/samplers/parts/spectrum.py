"""How much of a picture's spectrum lies at high frequencies (CMLoRA, arXiv 2502.04923)."""

from __future__ import annotations

import torch
from torch import Tensor

from lorry.core.errors import OptionError


def radial_profile(maps: Tensor) -> Tensor:
    """Return the mean magnitude of the spectrum in rings around frequency zero.

    Parameters
    ----------
    maps
        ``(rows, height, width)``.

    Returns
    -------
    ``(rows, rings)`` on the CPU in float32; ring r holds the frequencies whose distance from zero, in whole
    waves across the map, is at least r and below r + 1.
    """
    height, width = maps.shape[-2:]
    found = torch.fft.fftshift(torch.fft.fft2(maps.detach().to("cpu", torch.float32)), dim=(-2, -1)).abs()
    down = torch.arange(height) - height // 2
    across = torch.arange(width) - width // 2
    rings = (down[:, None].square() + across[None, :].square()).float().sqrt().floor().long().reshape(-1)
    count = int(rings.max()) + 1
    sums = torch.zeros(len(found), count).index_add_(1, rings, found.flatten(1))
    # every ring holds a frequency: a step along an axis or the diagonal never skips a whole number
    return sums / torch.bincount(rings, minlength=count).clamp_min(1)


def high_share(latents: Tensor, cut: float = 0.2, radius: int | None = None) -> Tensor:
    """Return H_h, the mean of the normed radial profile beyond a radius: near 1 for noise, near 0 for smooth maps.

    Parameters
    ----------
    latents
        ``(rows, channels, height, width)``; the mean over channels is measured.
    cut
        h: the radius as a share of the largest one.
    radius
        A fixed radius in place of it, as in the released code. Where the map has none so large, H is NaN.

    Returns
    -------
    ``(rows,)``, from 0 to 1; it does not depend on the scale of the latents.

    Raises
    ------
    OptionError
        The latents are not four-dimensional.
    """
    if latents.ndim != 4:
        raise OptionError(f"Expected latents (rows, channels, height, width), found shape {tuple(latents.shape)}.")
    profile = radial_profile(latents.detach().float().mean(1))
    normed = profile / profile.amax(1, keepdim=True).clamp_min(torch.finfo(profile.dtype).tiny)
    largest = profile.shape[1] - 1
    first = cut * largest if radius is None else radius
    return normed[:, torch.arange(largest + 1) >= first].mean(1)


def early_change(shares: Tensor, fraction: float, distance: int = 1) -> float:
    """Return the mean of |ΔH| over the early part of a run.

    Parameters
    ----------
    shares
        H after each step, ``(steps,)``.
    fraction
        Which part of the run is early.
    distance
        z: steps between the two values that are compared.

    Raises
    ------
    OptionError
        The early part is too short for the distance.
    """
    early = shares[: max(1, round(fraction * len(shares)))]
    if len(early) <= distance:
        raise OptionError(
            f"The early part of the run has {len(early)} steps, too few for changes over {distance}; take more steps."
        )
    return float((early[distance:] - early[:-distance]).abs().mean())


def split_by_change(changes: dict[str, float]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split adapters into those that change high frequencies early and those that do not, at the widest gap.

    Parameters
    ----------
    changes
        Adapter -> its early change of H.

    Returns
    -------
    The high set and the low set, each by falling change; the low set is empty if all changes are equal.
    """
    names = sorted(changes, key=lambda name: -changes[name])
    gaps = [changes[a] - changes[b] for a, b in zip(names, names[1:], strict=False)]
    if not gaps or max(gaps) <= 0:
        return tuple(names), ()
    at = gaps.index(max(gaps)) + 1
    return tuple(names[:at]), tuple(names[at:])
