"""A network without trainable parameters for a while, so that gradients go through it to latents alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lorry.core.life import api


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Freeze parameters of a network and of its adapters; those that were trainable are so again at the end."""
    every = [*network.parameters(), *(p for each in api.adapters(network).values() for p in each.parameters())]
    trainable = [parameter for parameter in every if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
