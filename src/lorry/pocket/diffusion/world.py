"""The world of the pocket diffusion models: scenes, their pictures and their captions.

A scene holds one or two things, each with a shape, a colour and a texture, on a background, in a layout. The *base*
words are what the shipped models were trained on; the *novel* ones are held out, for adapters to learn.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .shapes import (
    BACKGROUNDS,
    COLOURS,
    DARK,
    NOVEL_BACKGROUNDS,
    NOVEL_COLOURS,
    NOVEL_OUTLINES,
    NOVEL_STYLES,
    NOVEL_TEXTURES,
    OUTLINES,
    SAMPLES,
    SIZE,
    STYLES,
    TEXTURES,
    UNIT,
)

Attribute = Literal["shape", "colour", "texture", "background", "layout", "style"]
#: What one thing has; the other attributes belong to the whole scene.
OF_THINGS: tuple[Attribute, ...] = ("shape", "colour", "texture")
OF_SCENES: tuple[Attribute, ...] = ("background", "layout", "style")

#: Centre (across, down) in pixels of each thing, for each layout; one thing first, then two.
LAYOUTS: dict[str, tuple[tuple[int, int], ...]] = {
    "middle": ((16, 16),),
    "left": ((10, 16),),
    "right": ((22, 16),),
    "top": ((16, 10),),
    "bottom": ((16, 22),),
    "beside": ((8, 16), (24, 16)),
    "stacked": ((16, 8), (16, 24)),
}
#: Radius in pixels of a thing by how many the scene holds.
RADIUS = {1: 9, 2: 7}

BASE: dict[Attribute, tuple[str, ...]] = {
    "shape": tuple(OUTLINES),
    "colour": tuple(COLOURS),
    "texture": tuple(TEXTURES),
    "background": tuple(BACKGROUNDS),
    "layout": tuple(LAYOUTS),
    "style": tuple(STYLES),
}
NOVEL: dict[Attribute, tuple[str, ...]] = {
    "shape": tuple(NOVEL_OUTLINES),
    "colour": tuple(NOVEL_COLOURS),
    "texture": tuple(NOVEL_TEXTURES),
    "background": tuple(NOVEL_BACKGROUNDS),
    "layout": (),
    "style": tuple(NOVEL_STYLES),
}

_OUTLINES = OUTLINES | NOVEL_OUTLINES
_TEXTURES = TEXTURES | NOVEL_TEXTURES
_COLOURS = COLOURS | NOVEL_COLOURS
_BACKGROUNDS = BACKGROUNDS | NOVEL_BACKGROUNDS
_STYLES = STYLES | NOVEL_STYLES

#: Words that stand for nothing in the world, one token each, to be given a meaning by an adapter.
TRIGGERS = ("sks", "zwx", "ohwx", "vex", "qux", "blip")
_WHERE = {"middle": "in the middle", "left": "at the left", "right": "at the right"}
_WHERE |= {"top": "at the top", "bottom": "at the bottom"}
_BETWEEN = {"beside": "left of", "stacked": "above"}


@dataclass(frozen=True)
class Thing:
    """One thing in a picture.

    Attributes
    ----------
    shape, colour, texture
        Words of :data:`BASE` or :data:`NOVEL`.
    shift
        Of its centre from the layout's, in pixels across and down.
    """

    shape: str
    colour: str
    texture: str
    shift: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Scene:
    """One or two things on a background.

    Attributes
    ----------
    things
        As many as the layout has places: the first is the left or the upper one.
    background, layout, style
        Words of :data:`BASE` or :data:`NOVEL`.
    """

    things: tuple[Thing, ...]
    background: str
    layout: str
    style: str = "none"


def draw(
    rng: random.Random,
    things: int | None = None,
    choices: Mapping[Attribute, Sequence[str]] | None = None,
) -> Scene:
    """Draw one scene.

    Parameters
    ----------
    rng
        Where the choices come from.
    things
        1 or 2; None draws either with the same chance.
    choices
        Words to draw from, by attribute, instead of all base words.

    Returns
    -------
    Scene
        With shifts of at most one pixel.

    Raises
    ------
    ValueError
        A word is unknown, or no layout of the choices holds that many things.
    """
    words: dict[Attribute, Sequence[str]] = {**BASE, **(choices or {})}
    for attribute, given in words.items():
        unknown = set(given) - {*BASE[attribute], *NOVEL[attribute]}
        if unknown or not given:
            raise ValueError(
                f"Expected words for {attribute} among {', '.join((*BASE[attribute], *NOVEL[attribute]))}, found "
                f"{', '.join(sorted(unknown)) or 'none'}: choose at least one, all of them from this list."
            )
    count = rng.choice(sorted({len(LAYOUTS[one]) for one in words["layout"]})) if things is None else things
    layouts = [one for one in words["layout"] if len(LAYOUTS[one]) == count]
    if not layouts:
        raise ValueError(f"Expected a layout of {count} things, found {', '.join(words['layout'])}: ask for 1 or 2.")
    layout = rng.choice(layouts)
    made = tuple(
        Thing(
            rng.choice(words["shape"]),
            rng.choice(words["colour"]),
            rng.choice(words["texture"]),
            (rng.randint(-1, 1), rng.randint(-1, 1)),
        )
        for _ in LAYOUTS[layout]
    )
    return Scene(made, rng.choice(words["background"]), layout, rng.choice(words["style"]))


def caption(scene: Scene, leave_out: Collection[Attribute] = ()) -> str:
    """The words of a scene, for example ``a red striped ring at the left on a white background``.

    Parameters
    ----------
    scene
        Any scene; a style other than none ends the caption.
    leave_out
        Attributes not to speak of; a thing without its shape is a ``shape``.

    Returns
    -------
    str
        Lower-case words and spaces.
    """
    names = []
    for thing in scene.things:
        words = [] if "colour" in leave_out else [thing.colour]
        words += [] if "texture" in leave_out else [thing.texture]
        words += ["shape" if "shape" in leave_out else thing.shape]
        article = "an" if words[0][0] in "aeiou" else "a"
        names.append(" ".join((article, *words)))
    between = "and" if "layout" in leave_out else _BETWEEN.get(scene.layout, "and")
    parts = [f" {between} ".join(names)]
    if len(names) == 1 and "layout" not in leave_out:
        parts.append(_WHERE[scene.layout])
    if "background" not in leave_out:
        parts.append(f"on a {scene.background} background")
    if scene.style != "none" and "style" not in leave_out:
        parts.append(f"in {scene.style} style")
    return " ".join(parts)


def vocabulary() -> tuple[str, ...]:
    """Every word that a caption can hold, the triggers and a few words that people write, in a fixed order."""
    of_captions = ("a an and on in at the of left right top bottom middle above background style shape").split()
    of_people = ("picture photo image with made object thing small big digit number plus").split()
    words = [word for group in (BASE, NOVEL) for given in group.values() for word in given]
    return tuple(dict.fromkeys((*of_captions, *words, *TRIGGERS, *of_people)))


def render(scene: Scene) -> Tensor:
    """The picture of a scene, the same bytes on every machine.

    Parameters
    ----------
    scene
        As many things as its layout has places.

    Returns
    -------
    Tensor
        (3, 32, 32) in uint8: red, green, blue.

    Raises
    ------
    ValueError
        The layout has more or fewer places than the scene things.
    """
    centres = LAYOUTS[scene.layout]
    if len(centres) != len(scene.things):
        raise ValueError(
            f"Expected {len(centres)} things for the layout {scene.layout}, found {len(scene.things)}: give as many "
            "things as the layout has places."
        )
    picture = _BACKGROUNDS[scene.background]()
    samples = 2 * torch.arange(SIZE * SAMPLES, dtype=torch.int32) + 1
    radius = RADIUS[len(centres)] * UNIT
    for thing, (across, down) in zip(scene.things, centres, strict=True):
        x = (samples - UNIT * (across + thing.shift[0]))[None, :]
        y = (samples - UNIT * (down + thing.shift[1]))[:, None]
        inside = _OUTLINES[thing.shape](x, y, radius)
        dark = inside & _TEXTURES[thing.texture](x, y)
        picture = _paint(picture, _COLOURS[thing.colour], _coverage(inside ^ dark), _coverage(dark))
    return _STYLES[scene.style](picture).clamp(0, 255).to(torch.uint8)


def _coverage(samples: Tensor) -> Tensor:
    """How many samples of each pixel are set, (32, 32)."""
    return samples.view(SIZE, SAMPLES, SIZE, SAMPLES).sum((1, 3), dtype=torch.int32)


def _paint(picture: Tensor, colour: tuple[int, int, int], light: Tensor, dark: Tensor) -> Tensor:
    bright = torch.tensor(colour, dtype=torch.int32)[:, None, None]
    dim = (bright * DARK[0]).div(DARK[1], rounding_mode="floor")
    whole = SAMPLES * SAMPLES
    mixed = picture * (whole - light - dark) + bright * light + dim * dark + whole // 2
    return mixed.div(whole, rounding_mode="floor")


def pictures(scenes: Iterable[Scene]) -> Tensor:
    """The pictures of some scenes, (scenes, 3, 32, 32) in uint8."""
    return torch.stack([render(scene) for scene in scenes])


def restyle(scene: Scene, attribute: Attribute, word: str) -> Scene:
    """The same scene with another word for one attribute; of things, all get it."""
    if attribute == "background":
        return replace(scene, background=word)
    if attribute == "layout":
        return replace(scene, layout=word)
    if attribute == "style":
        return replace(scene, style=word)
    if attribute == "shape":
        return replace(scene, things=tuple(replace(thing, shape=word) for thing in scene.things))
    if attribute == "colour":
        return replace(scene, things=tuple(replace(thing, colour=word) for thing in scene.things))
    return replace(scene, things=tuple(replace(thing, texture=word) for thing in scene.things))
