"""The bi-directional decoupled focus: convolutions over the two checkerboards of a map.

Source: arXiv 2412.04931, where a backbone has it at stride 4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorry.core.errors import OptionError

from .layers import Conv


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two checkerboards of a map, each compacted along the width.

    Row ``i`` of the even one holds ``x[i, 2k + i % 2]``, of the odd one ``x[i, 2k + 1 - i % 2]``.

    Parameters
    ----------
    x
        ``(..., height, width)``, both even.

    Returns
    -------
    tuple
        Even and odd, each ``(..., height, width / 2)``.

    Raises
    ------
    OptionError
        Height or width is odd.
    """
    height, width = x.shape[-2:]
    if height % 2 or width % 2:
        raise OptionError(
            f"A map of {height} x {width} has no two equal checkerboards. Pad the pictures so that both sides are even "
            "here: to a multiple of twice the stride."
        )
    cells = x.unflatten(-1, (width // 2, 2)).unflatten(-3, (height // 2, 2))
    even = torch.stack([cells[..., 0, :, 0], cells[..., 1, :, 1]], -2)
    odd = torch.stack([cells[..., 0, :, 1], cells[..., 1, :, 0]], -2)
    return even.flatten(-3, -2), odd.flatten(-3, -2)


def join(even: Tensor, odd: Tensor) -> Tensor:
    """Write two compacted checkerboards back to their pixels; undoes `split`."""
    rows = even.shape[-2] // 2
    a, b = (board.unflatten(-2, (rows, 2)) for board in (even, odd))
    upper = torch.stack([a[..., 0, :], b[..., 0, :]], -1)
    lower = torch.stack([b[..., 1, :], a[..., 1, :]], -1)
    return torch.stack([upper, lower], -3).flatten(-2).flatten(-3, -2)


class Boards(nn.Module):
    """One convolution for each checkerboard, compacted along the width or along the height.

    Parameters
    ----------
    channels
        In and out.
    upright
        Compact along the height.
    """

    def __init__(self, channels: int, upright: bool) -> None:
        super().__init__()
        self.upright = upright
        self.even, self.odd = Conv(channels, channels, 3), Conv(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(pictures, channels, height, width)`` of the same shape in and out."""
        if not self.upright:
            even, odd = split(x)
            return join(self.even(even), self.odd(odd))
        even, odd = split(x.mT)
        return join(self.even(even.mT).mT, self.odd(odd.mT).mT).mT


class BiFocus(nn.Module):
    """A map beside what both directions of its checkerboards give, mixed.

    Parameters
    ----------
    channels
        In and out. It has ``39 C^2 + 43 C`` parameters.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.along_width, self.along_height = Boards(channels, False), Boards(channels, True)
        self.near = Conv(3 * channels, 3 * channels, 3, groups=3 * channels)
        self.mix = Conv(3 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(pictures, channels, height, width)`` of the same shape in and out, both sides even."""
        y: Tensor = self.mix(self.near(torch.cat([x, self.along_width(x), self.along_height(x)], 1)))
        return y
