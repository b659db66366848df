"""Pictures side by side as a PNG: ``python -m lorry.pocket.diffusion.grid --out FILE`` draws those of the docs."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .judge import unit
from .loading import NAMES, load, recipe
from .world import caption, draw, pictures


def grid(rows: list[Tensor], enlarge: int = 2, gap: int = 2) -> Tensor:
    """Rows of pictures on one white sheet.

    Parameters
    ----------
    rows
        Each (pictures, 3, height, width), uint8 or floats in [0, 1]; all pictures of one size.
    enlarge
        Pixels of the sheet for each pixel, in both directions.
    gap
        White pixels around each picture, before enlarging.

    Returns
    -------
    Tensor
        (3, height, width) in uint8.
    """
    height, width = rows[0].shape[-2:]
    columns = max(len(row) for row in rows)
    sheet = torch.full((3, len(rows) * (height + gap) + gap, columns * (width + gap) + gap), 255, dtype=torch.uint8)
    for down, row in enumerate(rows):
        top = down * (height + gap) + gap
        for across, picture in enumerate((255 * unit(row)).round().to(torch.uint8)):
            left = across * (width + gap) + gap
            sheet[:, top : top + height, left : left + width] = picture
    return sheet.repeat_interleave(enlarge, 1).repeat_interleave(enlarge, 2)


def image(picture: Tensor) -> Any:
    """A picture, (3, height, width) in uint8, as PIL's."""
    from PIL import Image

    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())


def write_png(picture: Tensor, path: Path) -> None:
    """Write a picture, (3, height, width) in uint8, as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image(picture).save(path, optimize=True)


def main() -> None:
    """Draw scenes above each model's samples for their captions, and print the captions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--count", type=int, default=12, help="pictures in a row, one half of them with two things")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    scenes = [draw(rng, things=1 if place < given.count / 2 else 2) for place in range(given.count)]
    captions = [caption(scene) for scene in scenes]
    rows = [pictures(scenes)]
    for name in NAMES:
        arguments = recipe(name)
        if "negative_prompt" in arguments:
            arguments["negative_prompt"] = [arguments["negative_prompt"]] * given.count
        generator = torch.Generator().manual_seed(given.seed)
        rows.append(load(name)(captions, generator=generator, output_type="pt", **arguments).images)
    write_png(grid(rows), given.out)
    print("\n".join(captions))


if __name__ == "__main__":
    main()
