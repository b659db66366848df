"""A codec for the latents of a pipeline: what its autoencoder makes of pictures, and pictures of latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lorry.diffusion.families import family_of
from lorry.diffusion.families.base import device_of

_AT_ONCE = 16


@torch.no_grad()
def latents_of(pipeline: Any, pixels: Tensor) -> Tensor:
    """Return the latents ``(n, channels, h, w)`` of pictures ``(n, 3, height, width)`` from -1 to 1, as the network
    takes them, on the CPU.
    """
    family, device = family_of(pipeline), device_of(pipeline.vae)
    return torch.cat([family.posterior(pipeline, part.to(device))[0].float().cpu() for part in pixels.split(_AT_ONCE)])


@contextmanager
def decoding(pipeline: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    """Give a function from latents to pictures, with gradients to the latents and none to the autoencoder."""
    family, device = family_of(pipeline), device_of(pipeline.vae)
    trained = [p for p in pipeline.vae.parameters() if p.requires_grad]

    def decode(latents: Tensor) -> Tensor:
        return family.pixels(pipeline, latents.to(device)).float().to(latents.device)

    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield decode
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
