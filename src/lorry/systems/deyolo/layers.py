"""The convolution that everything here is made of, and a stage of a backbone."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Conv(nn.Sequential):
    """A convolution without a bias that keeps the size (halves it at stride 2), batch normalisation, SiLU.

    Parameters
    ----------
    inputs, outputs
        Channels.
    kernel
        Side of the kernel, odd.
    stride, groups
        Of the convolution.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            nn.SiLU(),
        )


class Stage(nn.Module):
    """Half of the channels pass residual blocks, the outcome of each is kept, and all are mixed.

    Parameters
    ----------
    channels
        In and out, even.
    blocks
        Residual blocks of two convolutions.
    """

    def __init__(self, channels: int, blocks: int = 1) -> None:
        super().__init__()
        half = channels // 2
        self.enter = Conv(channels, channels, 1)
        self.blocks = nn.ModuleList(nn.Sequential(Conv(half, half, 3), Conv(half, half, 3)) for _ in range(blocks))
        self.leave = Conv(half * (2 + blocks), channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(pictures, channels, height, width)`` of the same shape in and out."""
        kept = list(self.enter(x).chunk(2, 1))
        for block in self.blocks:
            kept.append(kept[-1] + block(kept[-1]))
        y: Tensor = self.leave(torch.cat(kept, 1))
        return y
