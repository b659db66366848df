"""What happens to pictures on their way, with gradients, for pictures ``(rows, channels, h, w)`` from -1 to 1."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from lorry.core.errors import OptionError, near_misses

Distortion = Callable[[Tensor, Generator], Tensor]


def _uniform(low: float, high: float, generator: Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def noise(pictures: Tensor, generator: Generator) -> Tensor:
    """Add Gaussian noise of a deviation up to 0.15."""
    drawn = torch.randn(pictures.shape, generator=generator).to(pictures)
    return pictures + _uniform(0, 0.15, generator) * drawn


def blur(pictures: Tensor, generator: Generator) -> Tensor:
    """Blur by a 3 x 3 binomial window, partly."""
    channels = pictures.shape[1]
    line = torch.tensor([0.25, 0.5, 0.25]).to(pictures)
    window = (line[:, None] * line).expand(channels, 1, 3, 3)
    soft = F.conv2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), window, groups=channels)
    return torch.lerp(pictures, soft, _uniform(0, 1, generator))


def crop(pictures: Tensor, generator: Generator) -> Tensor:
    """Cut out at least 4/5 of each side, and resize to the size before."""
    return cropped(pictures, _uniform(0.8, 1, generator), generator)


def colour(pictures: Tensor, generator: Generator) -> Tensor:
    """Change contrast and brightness by up to a fifth."""
    return pictures * _uniform(0.8, 1.2, generator) + _uniform(-0.2, 0.2, generator)


def jpeg(pictures: Tensor, generator: Generator) -> Tensor:
    """Compress as JPEG of a quality from 50 to 95; the gradient passes as if nothing happened."""
    quality = round(_uniform(50, 95, generator))
    return pictures + (compressed(pictures.detach(), quality) - pictures).detach()


DISTORTIONS: dict[str, Distortion] = {"noise": noise, "blur": blur, "crop": crop, "colour": colour, "jpeg": jpeg}


def chosen(names: Sequence[str]) -> list[Distortion]:
    """Return distortions by name.

    Raises
    ------
    OptionError
        An unknown name, with near misses.
    """
    for name in names:
        if name not in DISTORTIONS:
            raise OptionError(
                f"There is no distortion '{name}'.{near_misses(name, DISTORTIONS)} There are {', '.join(DISTORTIONS)}."
            )
    return [DISTORTIONS[name] for name in names]


def cropped(pictures: Tensor, share: float, generator: Generator) -> Tensor:
    """Return a window of `share` of each side at a drawn place, resized to the size before."""
    height, width = pictures.shape[-2:]
    h, w = max(1, round(height * share)), max(1, round(width * share))
    top = int(torch.randint(height - h + 1, (), generator=generator))
    left = int(torch.randint(width - w + 1, (), generator=generator))
    window = pictures[..., top : top + h, left : left + w]
    return F.interpolate(window, (height, width), mode="bilinear", align_corners=False)


def compressed(pictures: Tensor, quality: int) -> Tensor:
    """Return pictures after a JPEG of this quality, for one or three channels."""
    from PIL import Image

    def one(picture: Tensor) -> Tensor:
        levels = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
        image: Any = Image.fromarray(levels[0].numpy() if len(levels) == 1 else levels.permute(1, 2, 0).numpy())
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        with Image.open(io.BytesIO(buffer.getvalue())) as back:
            raw = torch.frombuffer(bytearray(back.tobytes()), dtype=torch.uint8)
            found = raw.view(back.height, back.width, len(back.getbands()))
        return found.permute(2, 0, 1).to(pictures) / 127.5 - 1

    return torch.stack([one(picture) for picture in pictures])
