"""The judge: a small classifier that reads the attributes of a picture, so that claims are counted, not looked at.

It knows the novel words as well as the base ones. For each of two places in a scene it names shape, colour and
texture; for the scene it names background, layout and style. With one thing only the first place counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .world import BASE, LAYOUTS, NOVEL, OF_SCENES, OF_THINGS, Attribute, Scene, Thing

#: The words that each head tells apart, in the order of its outputs.
WORDS: dict[Attribute, tuple[str, ...]] = {
    "shape": (*BASE["shape"], *NOVEL["shape"]),
    "colour": (*BASE["colour"], *NOVEL["colour"]),
    "texture": (*BASE["texture"], *NOVEL["texture"]),
    "background": (*BASE["background"], *NOVEL["background"]),
    "layout": BASE["layout"],
    "style": (*BASE["style"], *NOVEL["style"]),
}
#: Heads: an attribute and the place of the thing it speaks of, 0 for those of the scene.
HEADS: tuple[tuple[Attribute, int], ...] = (
    *((name, place) for place in (0, 1) for name in OF_THINGS),
    *((name, 0) for name in OF_SCENES),
)


class Judge(nn.Module):
    """A convolutional classifier of (pictures, 3, 32, 32) in [0, 1], with one head for each attribute and place."""

    def __init__(self) -> None:
        super().__init__()
        widths = (24, 40, 64, 96)
        layers: list[nn.Module] = []
        before = 3
        for level, width in enumerate(widths):
            layers += [nn.Conv2d(before, width, 3, stride=2 if level else 1, padding=1), nn.GroupNorm(8, width)]
            layers += [nn.SiLU()]
            if level:  # at full size one convolution is dear enough
                layers += [nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            before = width
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * 16, 160), nn.SiLU())
        self.heads = nn.ModuleDict({f"{name}_{place}": nn.Linear(160, len(WORDS[name])) for name, place in HEADS})

    def forward(self, pictures: Tensor) -> dict[tuple[Attribute, int], Tensor]:
        """Logits of each head, (pictures, words)."""
        features = self.body(2 * pictures - 1)
        return {(name, place): self.heads[f"{name}_{place}"](features) for name, place in HEADS}


def unit(pictures: Tensor) -> Tensor:
    """Pictures in [0, 1] as float32, from uint8 or from floats that are there already."""
    return pictures.float() / 255 if pictures.dtype == torch.uint8 else pictures.float().clamp(0, 1)


@torch.no_grad()
def read(judge: Judge, pictures: Tensor, batch: int = 256) -> list[Scene]:
    """What the judge sees.

    Parameters
    ----------
    judge
        A trained one: :func:`lorry.pocket.diffusion.load_judge`.
    pictures
        (pictures, 3, 32, 32), uint8 or floats in [0, 1].
    batch
        Pictures in one pass.

    Returns
    -------
    list of Scene
        The likeliest words for each picture, shifts zero.
    """
    scenes = []
    for part in unit(pictures).split(batch):
        chosen = {head: logits.argmax(-1).tolist() for head, logits in judge(part).items()}
        for row in range(len(part)):
            words = {head: WORDS[head[0]][found[row]] for head, found in chosen.items()}
            places = range(len(LAYOUTS[words["layout", 0]]))
            things = tuple(
                Thing(words["shape", place], words["colour", place], words["texture", place]) for place in places
            )
            scenes.append(Scene(things, words["background", 0], words["layout", 0], words["style", 0]))
    return scenes


def agreement(found: Scene, asked: Scene) -> dict[Attribute, bool]:
    """For each attribute whether a scene shows what was asked; of things, all must.

    A scene with too few or too many things has the layout wrong, and the things that are missing.
    """
    if len(found.things) < len(asked.things):
        of_things: dict[Attribute, bool] = dict.fromkeys(OF_THINGS, False)
    else:
        pairs = list(zip(found.things, asked.things, strict=False))
        of_things = {
            "shape": all(one.shape == other.shape for one, other in pairs),
            "colour": all(one.colour == other.colour for one, other in pairs),
            "texture": all(one.texture == other.texture for one, other in pairs),
        }
    return {
        **of_things,
        "background": found.background == asked.background,
        "layout": found.layout == asked.layout,
        "style": found.style == asked.style,
    }


def score(judge: Judge, pictures: Tensor, asked: Sequence[Scene]) -> Mapping[str, float]:
    """The share of pictures that show what was asked.

    Parameters
    ----------
    judge
        A trained one.
    pictures
        (pictures, 3, 32, 32), uint8 or floats in [0, 1].
    asked
        As many scenes.

    Returns
    -------
    mapping
        A share from 0 to 1 for each attribute, ``mean`` of these, and ``all`` for pictures in which every one is right.
    """
    rows = [agreement(found, wanted) for found, wanted in zip(read(judge, pictures), asked, strict=True)]
    names: tuple[Attribute, ...] = (*OF_THINGS, *OF_SCENES)
    shares: dict[str, float] = {name: sum(row[name] for row in rows) / len(rows) for name in names}
    mean = sum(shares.values()) / len(shares)
    return {**shares, "mean": mean, "all": sum(all(row.values()) for row in rows) / len(rows)}


def targets(scenes: Sequence[Scene]) -> dict[tuple[Attribute, int], Tensor]:
    """The index of the right word for each head, (scenes,) in int64; -100 where a scene has no second thing."""
    found: dict[tuple[Attribute, int], list[int]] = {head: [] for head in HEADS}
    for scene in scenes:
        for name, place in HEADS:
            if name in OF_SCENES:
                word = {"background": scene.background, "layout": scene.layout, "style": scene.style}[name]
            elif place < len(scene.things):
                thing = scene.things[place]
                word = {"shape": thing.shape, "colour": thing.colour, "texture": thing.texture}[name]
            else:
                found[name, place].append(-100)
                continue
            found[name, place].append(WORDS[name].index(word))
    return {head: torch.tensor(indices) for head, indices in found.items()}
