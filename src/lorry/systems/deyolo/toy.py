"""A generated set of pairs on real pixels: handwritten digits on crops of photographs, each seen by one modality.

Backgrounds are crops of the two photographs that ship with scikit-learn, in "infrared" their inverted, flattened
brightness; digits are of its set of 1,797. Every second digit is pasted into RGB alone, the others into infrared
alone, so that one modality finds half of them at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Generator, Tensor

from .pairs import Pairs

SIDE = 64
#: Digits that are pasted, and their names as classes.
DIGITS = (0, 1)
CLASSES = tuple(f"digit {digit}" for digit in DIGITS)
#: By how much a digit of 8 x 8 pixels is enlarged, at least and at most.
SCALES = (2, 3)
MOST = 3


@cache
def _sources() -> tuple[Tensor, Tensor, Tensor]:
    """Photographs ``(2, 3, height, width)`` and digits ``(count, 8, 8)`` within 0 to 1, and their values."""
    from sklearn.datasets import load_digits, load_sample_images

    photos = torch.stack([torch.from_numpy(each.copy()) for each in load_sample_images().images])
    found = load_digits()
    return photos.permute(0, 3, 1, 2) / 255, torch.from_numpy(found.images).float() / 16, torch.from_numpy(found.target)


def toy(count: int, seed: int, held_out: bool = False) -> Pairs:
    """Draw pairs with one to three digits each.

    Parameters
    ----------
    count
        Of pairs.
    seed
        Of all that is drawn.
    held_out
        From the right third of the photographs and the last 500 digits, that no other pair is made of.

    Returns
    -------
    Pairs
        ``seen`` of each box says which modality shows it: 0 RGB, 1 infrared.
    """
    g = Generator().manual_seed(2 * seed + held_out)
    pictures, boxes, labels, seen = [], [], [], []
    for _ in range(count):
        pair = _background(g, held_out)
        places = _places(g)
        kinds = torch.randint(len(DIGITS), (len(places),), generator=g)
        first = int(torch.randint(2, (1,), generator=g))
        shown = (torch.arange(len(places)) + first) % 2
        for (x, y, side), kind, modality in zip(places, kinds.tolist(), shown.tolist(), strict=True):
            _paste(pair, _digit(kind, side, g, held_out), x, y, modality, g)
        corners = [(x, y, x + side, y + side) for x, y, side in places]
        pictures.append((pair.clamp(0, 1) * 255).round().byte())
        boxes.append(torch.tensor(corners, dtype=torch.float32))
        labels.append(kinds)
        seen.append(shown)
    names = [f"{i:05d}" for i in range(count)]
    return Pairs(pictures, boxes, labels, CLASSES, names, seen)


def _background(g: Generator, held_out: bool) -> Tensor:
    photos, _, _ = _sources()
    height, width = photos.shape[-2:]
    border = width * 2 // 3
    low, high = (border, width - SIDE) if held_out else (0, border - SIDE)
    which = int(torch.randint(2, (1,), generator=g))
    x, y = (int(torch.randint(a, b + 1, (1,), generator=g)) for a, b in ((low, high), (0, height - SIDE)))
    rgb = photos[which, :, y : y + SIDE, x : x + SIDE]
    infrared = 0.55 - 0.35 * rgb.mean(0, keepdim=True) + 0.03 * torch.randn(1, SIDE, SIDE, generator=g)
    return torch.cat([rgb, infrared.expand(3, -1, -1)])


def _places(g: Generator) -> list[tuple[int, int, int]]:
    """Left, top and side of squares that do not overlap; at least one."""
    wanted = int(torch.randint(1, MOST + 1, (1,), generator=g))
    places: list[tuple[int, int, int]] = []
    for _ in range(8 * wanted):
        side = 8 * int(torch.randint(SCALES[0], SCALES[1] + 1, (1,), generator=g))
        x, y = torch.randint(SIDE - side + 1, (2,), generator=g).tolist()
        if all(_apart((x, y, side), other) for other in places):
            places.append((x, y, side))
        if len(places) == wanted:
            break
    return places


def _apart(a: Sequence[int], b: Sequence[int]) -> bool:
    return any(a[k] + a[2] <= b[k] or b[k] + b[2] <= a[k] for k in (0, 1))


def _digit(kind: int, side: int, g: Generator, held_out: bool) -> Tensor:
    _, images, values = _sources()
    of_kind = images[-500:][values[-500:] == DIGITS[kind]] if held_out else images[:-500][values[:-500] == DIGITS[kind]]
    one = of_kind[int(torch.randint(len(of_kind), (1,), generator=g))]
    return torch.nn.functional.interpolate(one[None, None], size=(side, side), mode="bilinear")[0, 0]


def _paste(pair: Tensor, digit: Tensor, x: int, y: int, modality: int, g: Generator) -> None:
    """Lay a digit in one colour (in infrared: bright) over the pixels of one modality, in place."""
    side = len(digit)
    where = pair[3 * modality : 3 * modality + 3, y : y + side, x : x + side]
    colour = torch.ones(3) if modality else torch.rand(3, generator=g)
    if not modality:  # far from what lies behind it, in one direction
        colour = torch.where(where.mean() > 0.5, 0.35 * colour, 1 - 0.35 * colour)
    where.lerp_(colour[:, None, None].expand_as(where), digit)
