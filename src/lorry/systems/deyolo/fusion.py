"""The dual enhancement: channels (DECA) and pixels (DEPA) of each modality weighted by the other, then the sum (DEA).

Source: arXiv 2412.04931. The published code and the paper's figure differ; `variant` says which is meant. The figure
has a softmax on the mixed weights (over channels in DECA, over pixels in DEPA; the axes are our reading), products of
mixed and single weights, and no logistic function at the end. That single weights of pixels pass a logistic function
there is our reading, too; without it a map could be amplified.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorry.core.errors import OptionError, near_misses

from .layers import Conv

VARIANTS = ("code", "figure")
#: ``auto``, as published: the pyramid where a map is at least as large as expected, else the mean; so training on full
#: squares and measuring on other shapes take different ways. ``pyramid``: always, maps brought to the expected size.
PATHS = ("auto", "pyramid", "mean")


def one_of(what: str, given: str, known: Sequence[str]) -> str:
    """Return a word if it is known.

    Raises
    ------
    OptionError
        It is not.
    """
    if given not in known:
        raise OptionError(f"{what} is one of {', '.join(known)}, not {given!r}.{near_misses(given, known)}")
    return given


class DECA(nn.Module):
    """Weigh the channels of each modality by the other's, and by what both together show.

    Parameters
    ----------
    channels
        Of both maps, C.
    size
        Side of the maps expected, K; divisible by the product of `steps`.
    steps
        Strides of the first two convolutions of the pyramid; the last has what remains of K.
    reduction
        Channels to those of the squeezed middle.
    variant, path
        One of `VARIANTS`, one of `PATHS`.
    crossed
        Weigh each modality by the other; by itself if not, for comparison.

    Raises
    ------
    OptionError
        A word is unknown, K is not divisible, or there are fewer channels than `reduction`.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        steps: tuple[int, int] = (5, 4),
        *,
        reduction: int = 16,
        variant: str = "code",
        path: str = "auto",
        crossed: bool = True,
    ) -> None:
        super().__init__()
        self.variant, self.path = one_of("variant", variant, VARIANTS), one_of("path", path, PATHS)
        self.size, self.crossed = size, crossed
        if size < 1 or size % math.prod(steps):
            raise OptionError(
                f"The expected size of a map is {size}, which steps of {steps[0]} and {steps[1]} do not divide. Give "
                f"pictures whose maps are a multiple of {math.prod(steps)} wide, or other steps."
            )
        if channels < reduction:
            raise OptionError(f"{channels} channels cannot be reduced {reduction} times. Lower `reduction`.")
        squeezed = channels // reduction
        self.squeeze = nn.Sequential(
            nn.Linear(channels, squeezed, bias=False),
            nn.ReLU(),
            nn.Linear(squeezed, channels, bias=False),
            nn.Sigmoid(),
        )
        self.compress = Conv(2 * channels, channels, 3)
        strides = (*steps, size // math.prod(steps))
        self.pyramid = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(channels, channels, stride, stride, groups=channels), nn.SiLU())
                for stride in strides
            )
        )

    def forward(self, rgb: Tensor, infrared: Tensor) -> tuple[Tensor, Tensor]:
        """Maps ``(pictures, C, height, width)`` of the same shapes in and out."""
        own = [self.squeeze(x.mean((2, 3)))[:, :, None, None] for x in (rgb, infrared)]
        mixed = self.mixed(self.compress(torch.cat([rgb, infrared], 1)))
        if self.crossed:
            own.reverse()
        if self.variant == "code":
            return rgb * (own[0] * mixed).sigmoid(), infrared * (own[1] * mixed).sigmoid()
        mixed = mixed.softmax(1)
        return rgb * (own[0] * mixed), infrared * (own[1] * mixed)

    def mixed(self, both: Tensor) -> Tensor:
        """What a map of both ``(pictures, C, height, width)`` says of each channel, ``(pictures, C, 1, 1)``."""
        mean = self.path == "mean" or (self.path == "auto" and min(both.shape[-2:]) < self.size)
        if mean:
            return both.mean((2, 3), keepdim=True)
        if self.path == "pyramid" and both.shape[-2:] != (self.size, self.size):
            both = nn.functional.adaptive_avg_pool2d(both, self.size)
        # a map of twice the expected size leaves several cells
        found: Tensor = self.pyramid(both).mean((2, 3), keepdim=True)
        return found


class _Pixels(nn.Module):
    """A weight for each pixel from a map of one modality, at two sizes of the kernel."""

    def __init__(self, channels: int, kernels: tuple[int, int]) -> None:
        super().__init__()
        self.small, self.large = (Conv(channels, 1, kernel) for kernel in kernels)
        self.mix = Conv(2, 1, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(pictures, C, height, width)`` to ``(pictures, 1, height, width)``."""
        y: Tensor = self.mix(torch.cat([self.small(x), self.large(x)], 1))
        return y


class DEPA(nn.Module):
    """Weigh the pixels of each modality by the other's, and by what both together show.

    Parameters
    ----------
    channels
        Of both maps, C. It has ``134 C + 116`` parameters with the published kernels.
    kernels
        Sides of the two kernels, m.
    variant, crossed
        See `DECA`.
    """

    def __init__(
        self, channels: int, kernels: tuple[int, int] = (3, 7), *, variant: str = "code", crossed: bool = True
    ) -> None:
        super().__init__()
        self.variant, self.crossed = one_of("variant", variant, VARIANTS), crossed
        self.of_rgb, self.of_infrared = _Pixels(channels, kernels), _Pixels(channels, kernels)
        self.compress_rgb, self.compress_infrared = Conv(channels, 1, 3), Conv(channels, 1, 3)

    def forward(self, rgb: Tensor, infrared: Tensor) -> tuple[Tensor, Tensor]:
        """Maps ``(pictures, C, height, width)`` of the same shapes in and out."""
        own = [self.of_rgb(rgb), self.of_infrared(infrared)]
        if self.crossed:
            own.reverse()
        both = self.compress_rgb(rgb), self.compress_infrared(infrared)
        if self.variant == "code":
            mixed = (both[0] + both[1]).sigmoid()
            return rgb * (mixed + own[0]).sigmoid(), infrared * (mixed + own[1]).sigmoid()
        product = both[0] * both[1]
        mixed = product.flatten(2).softmax(-1).view_as(product)
        return rgb * (mixed * own[0].sigmoid()), infrared * (mixed * own[1].sigmoid())


class DEA(nn.Module):
    """One map of two: DECA, DEPA, the sum, and in the code a logistic function of it.

    Parameters
    ----------
    channels, size, steps, reduction, path
        See `DECA`.
    variant, crossed
        Of both parts.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        steps: tuple[int, int] = (5, 4),
        *,
        reduction: int = 16,
        variant: str = "code",
        path: str = "auto",
        crossed: bool = True,
    ) -> None:
        super().__init__()
        self.variant = variant
        self.channels = DECA(channels, size, steps, reduction=reduction, variant=variant, path=path, crossed=crossed)
        self.pixels = DEPA(channels, variant=variant, crossed=crossed)

    def forward(self, rgb: Tensor, infrared: Tensor) -> Tensor:
        """Two maps ``(pictures, C, height, width)`` to one; within (0, 1) in the code's variant."""
        a, b = self.pixels(*self.channels(rgb, infrared))
        return (a + b).sigmoid() if self.variant == "code" else a + b


class Sum(nn.Module):
    """The sum of two maps, for comparison."""

    def forward(self, rgb: Tensor, infrared: Tensor) -> Tensor:
        """Two maps ``(pictures, C, height, width)`` to one."""
        return rgb + infrared
