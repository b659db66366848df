"""Folders of pictures with a folder for each class, as few-shot learners read them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from ..diffusion.grid import write_png
from ..diffusion.shapes import DIGITS, digit_images
from .world import NOVEL_SHAPES, NOVEL_TINTS, SHAPES, SHOWN_DIGITS, TINTS, Picture, Written, draw_scene, render


def _of_shape(rng: random.Random, name: str, number: int) -> Picture:
    return draw_scene(rng, 1, (name,), (*TINTS, *NOVEL_TINTS))


def _of_digit(rng: random.Random, name: str, number: int) -> Picture:
    digit = DIGITS.index(name)
    chosen = SHOWN_DIGITS + number % (len(digit_images()[digit]) - SHOWN_DIGITS)
    return Written(digit, chosen, rng.choice(("red", "green", "blue", "purple")), "white")


#: Name of an album -> its classes, and what draws a picture of one.
ALBUMS: dict[str, tuple[tuple[str, ...], Callable[[random.Random, str, int], Picture]]] = {
    "shapes": ((*SHAPES, *NOVEL_SHAPES), _of_shape),
    "digits": (DIGITS, _of_digit),
}


def write_album(name: str, folder: Path, count: int, seed: int) -> Path:
    """Write an album.

    Parameters
    ----------
    name
        ``shapes``: twelve shapes of any colour and texture, of which the models know one half, in known colours.
        ``digits``: scikit-learn's digits that no model was shown.
    folder
        Gets a folder for each class, ``circle``, ``star`` and so on.
    count
        Pictures of each class.
    seed
        Of the draw.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ValueError
        There is no such album.
    """
    if name not in ALBUMS:
        raise ValueError(f"Expected an album among {', '.join(ALBUMS)}, found {name!r}: write one of these.")
    rng = random.Random(f"{name} {seed}")
    classes, draw = ALBUMS[name]
    for kind in classes:
        for number in range(count):
            write_png(render(draw(rng, kind, number)), folder / kind / f"{number:03}.png")
    return folder
