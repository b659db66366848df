"""Pictures with their recipes: as PNG files that say how they were made, and as grids."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorry.diffusion.errors import DiffusionError

#: The field of a PNG file that holds the recipe, as JSON.
FIELD = "lorry"


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture and how it was made.

    Attributes
    ----------
    pixels
        ``(3, height, width)``, bytes.
    recipe
        Plain data: prompt, adapters, seed, steps, guidance, size, pipeline.
    facts
        What a sampler has to say of it: counts of what was run, masks.
    """

    pixels: Tensor
    recipe: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)

    def image(self) -> Any:
        """Return it as a PIL image."""
        from PIL import Image

        return Image.fromarray(self.pixels.permute(1, 2, 0).contiguous().numpy())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as PNG with its recipe inside; whole, or not at all."""
        write_png(self.image(), self.recipe, path)


def write_png(image: Any, recipe: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a PIL image as PNG with a recipe inside; whole, or not at all."""
    from PIL.PngImagePlugin import PngInfo

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    info.add_text(FIELD, json.dumps(recipe, ensure_ascii=True, sort_keys=True))
    draft = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        image.save(draft, format="PNG", pnginfo=info)
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the recipe inside a PNG file.

    Raises
    ------
    DiffusionError
        It is no picture that can be read, or has no recipe.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {}).get(FIELD)
    except (OSError, UnidentifiedImageError) as error:
        raise DiffusionError(f"{path} is no picture that can be read: {error}.") from error
    if text is None:
        raise DiffusionError(f"{path} holds no recipe; only PNG files that `lorry sample` wrote have one.")
    found: dict[str, Any] = json.loads(text)
    return found


@dataclass(frozen=True)
class Pictures(Sequence[Picture]):
    """Pictures in the order in which they were asked for."""

    pictures: Sequence[Picture]

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.pictures)

    def __getitem__(self, index: Any) -> Any:
        """Return one picture, or some."""
        return Pictures(self.pictures[index]) if isinstance(index, slice) else self.pictures[index]

    def __iter__(self) -> Iterator[Picture]:
        """Yield them."""
        return iter(self.pictures)

    @property
    def pixels(self) -> Tensor:
        """All pictures, ``(pictures, 3, height, width)``, bytes."""
        return torch.stack([picture.pixels for picture in self.pictures])

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write them as ``000.png``, ``001.png`` and so on; return the paths."""
        digits = max(3, len(str(len(self) - 1)))
        paths = [Path(folder) / f"{index:0{digits}}.png" for index in range(len(self))]
        for path, picture in zip(paths, self.pictures, strict=True):
            picture.save(path)
        return paths

    def grid(self, columns: Sequence[str], rows: Sequence[str]) -> Any:
        """Return a PIL image with all pictures, row after row, and a label for each column and row.

        Raises
        ------
        DiffusionError
            There are more or fewer pictures than places.
        """
        places = len(columns) * len(rows)
        if len(self) != places:
            raise DiffusionError(
                f"A grid of {len(columns)} columns and {len(rows)} rows has {places} places, but there are {len(self)} "
                "pictures."
            )
        return drawn_grid([picture.image() for picture in self.pictures], columns, rows)


def drawn_grid(images: Sequence[Any], columns: Sequence[str], rows: Sequence[str]) -> Any:
    """Return a PIL image of a grid; small pictures are enlarged so that labels can be read."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(14)
    cell = max(128, max(max(image.size) for image in images))
    gap, head = 6, 24
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    side = min(260, max((int(probe.textlength(text, font)) for text in rows), default=0)) + 2 * gap
    canvas = Image.new("RGB", (side + len(columns) * (cell + gap), head + len(rows) * (cell + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for x, text in enumerate(columns):
        draw.text((side + x * (cell + gap), 4), _cut(text, cell, font, probe), "black", font)
    for y, text in enumerate(rows):
        draw.text((gap, head + y * (cell + gap) + cell // 2 - 8), _cut(text, side - gap, font, probe), "black", font)
    for index, image in enumerate(images):
        y, x = divmod(index, len(columns))
        factor = max(1, cell // max(image.size))
        large = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        canvas.paste(large, (side + x * (cell + gap), head + y * (cell + gap)))
    return canvas


def _cut(text: str, width: int, font: Any, probe: Any) -> str:
    """Return as much of a text as fits."""
    if probe.textlength(text, font) <= width:
        return text
    while text and probe.textlength(f"{text}...", font) > width:
        text = text[:-1]
    return f"{text}..."
