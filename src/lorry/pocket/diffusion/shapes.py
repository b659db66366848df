"""What can stand in a picture: outlines, textures, colours, backgrounds and styles, all in integer arithmetic.

Integers make a picture the same to the byte on every machine. Outlines and textures are functions of the offsets
from a thing's centre and of its radius, in eighths of a pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

#: Pictures are SIZE x SIZE pixels.
SIZE = 32
#: Offsets, places and radii are counted in this fraction of a pixel.
UNIT = 8
#: Samples in each direction of a pixel, whose share inside a thing is the pixel's coverage.
SAMPLES = 4

Outline = Callable[[Tensor, Tensor, int], Tensor]
Texture = Callable[[Tensor, Tensor], Tensor]


def _circle(x: Tensor, y: Tensor, r: int) -> Tensor:
    return x * x + y * y <= r * r


def _ring(x: Tensor, y: Tensor, r: int) -> Tensor:
    square = x * x + y * y
    return (square <= r * r) & (10 * square >= 3 * r * r)


def _square(x: Tensor, y: Tensor, r: int) -> Tensor:
    return 20 * torch.maximum(x.abs(), y.abs()) <= 17 * r


def _diamond(x: Tensor, y: Tensor, r: int) -> Tensor:
    return x.abs() + y.abs() <= r


def _triangle(x: Tensor, y: Tensor, r: int) -> Tensor:
    return (5 * y <= 4 * r) & (2 * x.abs() <= y + r)


def _cross(x: Tensor, y: Tensor, r: int) -> Tensor:
    x, y = x.abs(), y.abs()
    return (3 * torch.minimum(x, y) <= r) & (torch.maximum(x, y) <= r)


def _star(x: Tensor, y: Tensor, r: int) -> Tensor:
    x, y = 10 * x.abs(), 10 * y.abs()
    left = 13 * r - x - y
    return (4 * x * y <= left * left) & (left >= 0) & (torch.maximum(x, y) <= 10 * r)


def _moon(x: Tensor, y: Tensor, r: int) -> Tensor:
    return (x * x + y * y <= r * r) & (4 * (x - r // 2) ** 2 + 4 * y * y >= 3 * r * r)


def _arrow(x: Tensor, y: Tensor, r: int) -> Tensor:
    shaft = (4 * y.abs() <= r) & (x <= 0) & (x >= -r)
    return shaft | ((x >= 0) & (y.abs() + x <= r))


def _house(x: Tensor, y: Tensor, r: int) -> Tensor:
    walls = (y >= 0) & (10 * y <= 9 * r) & (10 * x.abs() <= 6 * r)
    return walls | ((y <= 0) & (x.abs() <= y + r))


def _tee(x: Tensor, y: Tensor, r: int) -> Tensor:
    inside = (10 * x.abs() <= 9 * r) & (10 * y.abs() <= 9 * r)
    return inside & ((10 * y <= -4 * r) | (4 * x.abs() <= r))


def _hourglass(x: Tensor, y: Tensor, r: int) -> Tensor:
    return (10 * y.abs() <= 9 * r) & (x.abs() <= y.abs() + UNIT // 2)


def _digit(value: int) -> Outline:
    """The outline of one written digit of scikit-learn: half of its ink or more is inside."""

    def outline(x: Tensor, y: Tensor, r: int) -> Tensor:
        picture = digit_images()[value][0]
        across = ((x + r) * 8).div(2 * r, rounding_mode="floor")
        down = ((y + r) * 8).div(2 * r, rounding_mode="floor")
        inside = (across >= 0) & (across < 8) & (down >= 0) & (down < 8)
        return inside & (picture[down.clamp(0, 7), across.clamp(0, 7)] >= 7)

    return outline


@cache
def digit_images() -> tuple[Tensor, ...]:
    """The 8x8 digits of scikit-learn, ink from 0 to 16, for each digit (count, 8, 8) in int32.

    Raises
    ------
    ImportError
        Scikit-learn, which holds the pictures, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("Written digits come from scikit-learn: pip install 'lorry[claims]'.") from error
    data: Any = load_digits()
    pictures = torch.as_tensor(data.images).round().to(torch.int32)
    labels = torch.as_tensor(data.target)
    return tuple(pictures[labels == digit] for digit in range(10))


OUTLINES: dict[str, Outline] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "cross": _cross,
    "ring": _ring,
}
NOVEL_OUTLINES: dict[str, Outline] = {
    "star": _star,
    "moon": _moon,
    "arrow": _arrow,
    "house": _house,
    "tee": _tee,
    "hourglass": _hourglass,
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NOVEL_OUTLINES |= {word: _digit(value) for value, word in enumerate(DIGITS)}


def _cells(offset: Tensor, width: int) -> Tensor:
    return offset.div(width, rounding_mode="floor") % 2 == 0


def _plain(x: Tensor, y: Tensor) -> Tensor:
    return torch.zeros(torch.broadcast_shapes(x.shape, y.shape), dtype=torch.bool)


def _striped(x: Tensor, y: Tensor) -> Tensor:
    return _cells(x, 2 * UNIT) | (y > UNIT * SIZE)


def _checked(x: Tensor, y: Tensor) -> Tensor:
    return _cells(x, 3 * UNIT) ^ _cells(y, 3 * UNIT)


def _dotted(x: Tensor, y: Tensor) -> Tensor:
    x, y = (x + 20) % 40 - 20, (y + 20) % 40 - 20
    return x * x + y * y <= 12 * 12


def _banded(x: Tensor, y: Tensor) -> Tensor:
    return _cells(y, 2 * UNIT) | (x > UNIT * SIZE)


def _slanted(x: Tensor, y: Tensor) -> Tensor:
    return _cells(x + y, 3 * UNIT)


def _netted(x: Tensor, y: Tensor) -> Tensor:
    return ((x + 16) % 32 < 10) | ((y + 16) % 32 < 10)


def _halved(x: Tensor, y: Tensor) -> Tensor:
    return (y >= 0) | (x > UNIT * SIZE)


#: Where a thing shows its dark tone.
TEXTURES: dict[str, Texture] = {"plain": _plain, "striped": _striped, "checked": _checked, "dotted": _dotted}
NOVEL_TEXTURES: dict[str, Texture] = {"banded": _banded, "slanted": _slanted, "netted": _netted, "halved": _halved}

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 50),
    "purple": (150, 50, 190),
    "orange": (245, 130, 30),
}
NOVEL_COLOURS = {"pink": (250, 140, 190), "cyan": (40, 200, 210), "brown": (130, 80, 40), "lime": (170, 240, 60)}
#: A texture's dark tone is this share of the colour, numerator and denominator.
DARK = (2, 5)


def _solid(red: int, green: int, blue: int) -> Tensor:
    return torch.tensor([red, green, blue], dtype=torch.int32)[:, None, None].expand(3, SIZE, SIZE)


def _sky() -> Tensor:
    down = torch.arange(SIZE, dtype=torch.int32)[None, :, None].expand(3, SIZE, SIZE)
    return (_solid(100, 160, 225) * (SIZE - 1 - down) + _solid(205, 228, 250) * down).div(
        SIZE - 1, rounding_mode="floor"
    )


def _brick() -> Tensor:
    down, across = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    shifted = across + 4 * (down.div(5, rounding_mode="floor") % 2)
    mortar = (down % 5 == 4) | (shifted % 8 == 7)
    return torch.where(mortar, _solid(205, 195, 185), _solid(165, 85, 70))


def _sea() -> Tensor:
    down, across = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    wave = (down + (across % 8 - 4).abs()) % 6 < 2
    return torch.where(wave, _solid(170, 215, 225), _solid(40, 110, 150))


def _night() -> Tensor:
    down, across = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    return torch.where((7 * down + 11 * across) % 37 == 0, _solid(250, 245, 200), _solid(20, 25, 75))


BACKGROUNDS: dict[str, Callable[[], Tensor]] = {
    "white": lambda: _solid(245, 245, 245),
    "black": lambda: _solid(15, 15, 15),
    "grey": lambda: _solid(128, 128, 128),
    "sand": lambda: _solid(225, 200, 150),
    "sky": _sky,
}
NOVEL_BACKGROUNDS: dict[str, Callable[[], Tensor]] = {"brick": _brick, "sea": _sea, "night": _night}


def _lined(picture: Tensor) -> Tensor:
    dark = (torch.arange(SIZE) % 4 == 0)[None, :, None]
    return torch.where(dark, picture.div(3, rounding_mode="floor"), picture)


def _framed(picture: Tensor) -> Tensor:
    place = torch.arange(SIZE)
    edge = (place < 2) | (place >= SIZE - 2)
    return torch.where(edge[None, :, None] | edge[None, None, :], _solid(190, 150, 40), picture)


def _faded(picture: Tensor) -> Tensor:
    return 150 + (picture - 128).div(3, rounding_mode="floor")


def _vignetted(picture: Tensor) -> Tensor:
    place = 2 * torch.arange(SIZE, dtype=torch.int32) - (SIZE - 1)
    far = place[None, :] ** 2 + place[:, None] ** 2
    return (picture * (1800 - far).clamp(150, 1100)).div(1100, rounding_mode="floor")


def _speckled(picture: Tensor) -> Tensor:
    down, across = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    return torch.where((3 * down + 8 * across) % 13 == 0, 255 - picture, picture)


#: Looks of a whole picture; the base knows ``none`` alone.
STYLES: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda picture: picture}
NOVEL_STYLES: dict[str, Callable[[Tensor], Tensor]] = {
    "lined": _lined,
    "framed": _framed,
    "faded": _faded,
    "vignetted": _vignetted,
    "speckled": _speckled,
}
