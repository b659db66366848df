"""The pictures of the vision models' world: things on a grid, written digits, and pages of text.

All arithmetic is in integers, so a picture is the same to the byte on every machine. Outlines, textures and colours
are those of the diffusion models' world.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..diffusion.shapes import (
    COLOURS,
    DARK,
    DIGITS,
    NOVEL_COLOURS,
    NOVEL_OUTLINES,
    NOVEL_TEXTURES,
    OUTLINES,
    SAMPLES,
    TEXTURES,
    UNIT,
    digit_images,
)
from ..world import CONSONANTS, VOWELS, Split, split_of
from .glyphs import CELL, glyph

#: Pictures are SIDE x SIDE pixels, of GRID x GRID places for things and LINE x LINE places for characters.
SIDE, GRID, LINE = 48, 3, 6
#: Pixels of a thing's place in each direction, and a thing's radius; how far a thing may lie from the place's middle.
PLACE, RADIUS, SHIFT = SIDE // GRID, 7, 1
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")

#: What the models were trained on; the rest of the words is held out.
SHAPES, TINTS, FILLS = tuple(OUTLINES), tuple(COLOURS), tuple(TEXTURES)
NOVEL_SHAPES = tuple(name for name in NOVEL_OUTLINES if name not in DIGITS)
NOVEL_TINTS, NOVEL_FILLS = tuple(NOVEL_COLOURS), tuple(NOVEL_TEXTURES)
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "black": (15, 15, 15),
    "grey": (128, 128, 128),
    "sand": (225, 200, 150),
    "sky": (150, 190, 235),
}

_OUTLINES, _TEXTURES, _COLOURS = OUTLINES | NOVEL_OUTLINES, TEXTURES | NOVEL_TEXTURES, COLOURS | NOVEL_COLOURS
#: Digits with a number below this were shown in training; of each digit there are about 178.
SHOWN_DIGITS = 110
MOST_LINES = LINE - 1


@dataclass(frozen=True)
class Thing:
    """A thing in its place.

    Attributes
    ----------
    shape, colour, texture
        Words of the world.
    place
        0 to 8, line after line.
    shift
        From the middle of its place, in pixels across and down, at most one.
    core
        Colour of the inner part, where it is another than the rim's.
    """

    shape: str
    colour: str
    texture: str
    place: int
    shift: tuple[int, int] = (0, 0)
    core: str | None = None

    @property
    def row(self) -> int:
        """0 at the top."""
        return self.place // GRID

    @property
    def column(self) -> int:
        """0 at the left."""
        return self.place % GRID


@dataclass(frozen=True)
class Scene:
    """Things in different places of one background."""

    things: tuple[Thing, ...]
    background: str


@dataclass(frozen=True)
class Written:
    """One of scikit-learn's digits, four times as large, in the middle.

    Attributes
    ----------
    digit
        0 to 9.
    number
        Which of the digit's pictures.
    colour, background
        Words of the world.
    mirrored
        Whether left and right are exchanged.
    """

    digit: int
    number: int
    colour: str
    background: str
    mirrored: bool = False


@dataclass(frozen=True)
class Page:
    """A title over lines of a word of three letters, a space and a number of two figures."""

    title: str
    lines: tuple[tuple[str, int], ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """The title and the lines as they are written."""
        return (self.title, *(f"{word} {number}" for word, number in self.lines))


Picture = Scene | Written | Page


def render(picture: Picture) -> Tensor:
    """The pixels of a picture, the same bytes on every machine.

    Returns
    -------
    Tensor
        (3, 48, 48) in uint8: red, green, blue.

    Raises
    ------
    ValueError
        A page that is too large, or with characters that the world does not have.
    """
    if isinstance(picture, Page):
        return _page(picture)
    canvas = _filled(BACKGROUNDS[picture.background], SIDE + 2 * SHIFT)
    if isinstance(picture, Written):
        ink = digit_images()[picture.digit][picture.number].repeat_interleave(4, 0).repeat_interleave(4, 1)
        ink = ink.flip(1) if picture.mirrored else ink
        _paint(canvas, SHIFT + CELL, SHIFT + CELL, _COLOURS[picture.colour], ink, torch.zeros_like(ink))
    else:
        for thing in picture.things:
            across, down = SHIFT + PLACE * thing.column + thing.shift[0], SHIFT + PLACE * thing.row + thing.shift[1]
            _paint(canvas, across, down, _COLOURS[thing.colour], *_sprite(thing.shape, thing.texture, RADIUS))
            if thing.core is not None:
                _paint(canvas, across, down, _COLOURS[thing.core], *_sprite(thing.shape, "plain", RADIUS - 3))
    return canvas[:, SHIFT:-SHIFT, SHIFT:-SHIFT].to(torch.uint8)


def pictures(given: Iterable[Picture]) -> Tensor:
    """The pixels of some pictures, (pictures, 3, 48, 48) in uint8."""
    return torch.stack([render(one) for one in given])


def _filled(colour: tuple[int, int, int], side: int) -> Tensor:
    return torch.tensor(colour, dtype=torch.int32)[:, None, None].repeat(1, side, side)


@cache
def _sprite(shape: str, texture: str, radius: int) -> tuple[Tensor, Tensor]:
    """How many samples of each pixel of a place a thing's light and dark parts cover."""
    offsets = 2 * torch.arange(PLACE * SAMPLES, dtype=torch.int32) + 1 - PLACE * SAMPLES
    x, y = offsets[None, :], offsets[:, None]
    assert UNIT == 2 * SAMPLES
    inside = _OUTLINES[shape](x, y, radius * UNIT)
    dark = inside & _TEXTURES[texture](x, y)
    counted = [part.view(PLACE, SAMPLES, PLACE, SAMPLES).sum((1, 3), dtype=torch.int32) for part in (inside, dark)]
    return counted[0] - counted[1], counted[1]


def _paint(canvas: Tensor, across: int, down: int, colour: tuple[int, int, int], light: Tensor, dark: Tensor) -> None:
    """Mix a colour and its dark tone into the canvas, by how many samples of each pixel they cover."""
    bright = torch.tensor(colour, dtype=torch.int32)[:, None, None]
    dim = (bright * DARK[0]).div(DARK[1], rounding_mode="floor")
    part = canvas[:, down : down + light.shape[0], across : across + light.shape[1]]
    whole = SAMPLES * SAMPLES
    mixed = part * (whole - light - dark) + bright * light + dim * dark + whole // 2
    part.copy_(mixed.div(whole, rounding_mode="floor"))


def _page(page: Page) -> Tensor:
    """The title bright on dark, the lines dark on bright."""
    if len(page.lines) > MOST_LINES or any(len(text) > LINE for text in page.texts):
        raise ValueError(
            f"A page holds {MOST_LINES} lines of {LINE} characters under a title of {LINE}, found "
            f"{len(page.lines)} lines and {max(map(len, page.texts))} characters: shorten it."
        )
    canvas = _filled((240, 240, 230), SIDE)
    canvas[:, :CELL] = _filled((40, 60, 110), SIDE)[:, :CELL]
    for row, text in enumerate(page.texts):
        ink = torch.tensor((240, 240, 230) if row == 0 else (30, 30, 30), dtype=torch.int32)[:, None, None]
        for column, character in enumerate(text):
            cell = canvas[:, CELL * row : CELL * (row + 1), CELL * column : CELL * (column + 1)]
            cell.copy_(torch.where(glyph(character), ink, cell))
    return canvas.to(torch.uint8)


def draw_scene(
    rng: random.Random,
    things: int,
    shapes: Sequence[str] = SHAPES,
    tints: Sequence[str] = TINTS,
    fills: Sequence[str] = FILLS,
    *,
    cores: bool = False,
    alike: bool = False,
) -> Scene:
    """Draw a scene.

    Parameters
    ----------
    rng
        Where the choices come from.
    things
        How many, at most 9.
    shapes, tints, fills
        Words to draw from.
    cores
        Whether things have an inner part of another colour.
    alike
        Whether things may share a shape or a colour. Otherwise no two do, as long as there are words.
    """
    places = rng.sample(range(GRID * GRID), things)
    if alike:
        forms, hues = rng.choices(shapes, k=things), rng.choices(tints, k=things)
    else:
        forms, hues = _spread(rng, shapes, things), _spread(rng, tints, things)
    made = []
    for place, form, hue in zip(places, forms, hues, strict=True):
        core = rng.choice([tint for tint in tints if tint != hue]) if cores else None
        fill = "plain" if cores else rng.choice(fills)
        made.append(Thing(form, hue, fill, place, (rng.randint(-SHIFT, SHIFT), rng.randint(-SHIFT, SHIFT)), core))
    return Scene(tuple(made), rng.choice(list(BACKGROUNDS)))


def _spread(rng: random.Random, words: Sequence[str], count: int) -> list[str]:
    """As many words, none of them twice before all were taken."""
    return [word for _ in range(0, count, len(words)) for word in rng.sample(words, len(words))][:count]


def draw_written(rng: random.Random, split: Split = "train", *, mirrored: bool = False) -> Written:
    """Draw a written digit; those of the test split were never shown to a model."""
    digit = rng.randrange(10)
    count = len(digit_images()[digit])
    number = rng.randrange(SHOWN_DIGITS) if split == "train" else rng.randrange(SHOWN_DIGITS, count)
    return Written(digit, number, rng.choice(TINTS), rng.choice(["white", "black", "grey"]), mirrored)


def word(rng: random.Random, length: int, split: Split) -> str:
    """A word of consonants and vowels in turn that belongs to a split."""
    while True:
        found = "".join(rng.choice(CONSONANTS if place % 2 == 0 else VOWELS) for place in range(length))
        if split_of(found) == split:
            return found


def draw_page(rng: random.Random, split: Split = "train", *, lines: int | None = None) -> Page:
    """Draw a page of two to five lines; the words of its lines differ, and so do their numbers.

    No title of one split is one of the other.
    """
    count = rng.randint(2, MOST_LINES) if lines is None else lines
    words: dict[str, None] = {}
    while len(words) < count:
        # three letters are too few words to be split
        words["".join((rng.choice(CONSONANTS), rng.choice(VOWELS), rng.choice(CONSONANTS)))] = None
    return Page(
        word(rng, rng.randint(4, LINE), split), tuple(zip(words, rng.sample(range(10, 100), count), strict=True))
    )


def caption(rng: random.Random, picture: Scene | Written, *, full: bool = False) -> str:
    """Words for a picture, with some of its properties left out at random.

    Parameters
    ----------
    rng
        Decides what is left out.
    picture
        A scene or a digit; pages have no caption.
    full
        Leave nothing out.
    """
    keep = 1.0 if full else rng.choice((1.0, 0.8, 0.4))

    def said(text: str) -> str:
        return text if rng.random() < keep else ""

    if isinstance(picture, Written):
        parts = [f"a {said(picture.colour)} {rng.choice(('digit', 'number'))} {DIGITS[picture.digit]}"]
    else:
        parts = [
            f"a {said(thing.colour)} {said(thing.texture)} {thing.shape} "
            + said(f"at the {ROWS[thing.row]} {COLUMNS[thing.column]}")
            for thing in picture.things
        ]
        parts = [" and ".join(parts)]
    text = " ".join((*parts, said(f"on a {picture.background} background")))
    return " ".join(text.split())
