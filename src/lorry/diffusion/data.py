"""Pictures for training: opened, cut to one size or to buckets of sizes, and their prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorry.training.data_errors import DataError

IMAGE_COLUMNS = ("image", "file_name", "picture", "img", "file", "path")
CAPTION_COLUMNS = ("text", "caption", "prompt")


@dataclass(frozen=True, eq=False)
class Cut:
    """A picture, cut.

    Attributes
    ----------
    pixels
        ``(3, height, width)`` from -1 to 1.
    original
        Height and width before.
    corner
        Upper left corner of the cut in the picture as it was resized: row and column.
    """

    pixels: Tensor
    original: tuple[int, int]
    corner: tuple[int, int]


def buckets(resolution: int, step: int, longest: float = 2.0) -> list[tuple[int, int]]:
    """Return sizes ``(height, width)`` of at most ``resolution ** 2`` pixels, one for each shape up to `longest`.

    Parameters
    ----------
    resolution
        Side of the square.
    step
        Sides are multiples of it.
    longest
        Largest ratio of sides.
    """
    square = resolution // step * step
    found = {(square, square)}
    width = square
    while width + step <= resolution * longest**0.5 + step / 2:
        width += step
        height = resolution * resolution // width // step * step
        if height >= step and width / height <= longest + 1e-6:
            found |= {(height, width), (width, height)}
    return sorted(found)


def bucket_of(size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the size whose shape is nearest to that of a picture, the larger of two."""
    ratio = size[0] / size[1]
    return min(sizes, key=lambda s: (max(s[0] / s[1] / ratio, ratio * s[1] / s[0]), -s[0] * s[1]))


def opened(value: Any, where: str) -> Any:
    """Return a picture as PIL's, in RGB, turned as its camera says.

    Parameters
    ----------
    value
        A path, a PIL image, bytes, or what ``datasets`` gives: ``{bytes, path}``.
    where
        For errors: which record.

    Raises
    ------
    DataError
        It cannot be read.
    """
    import io

    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(value, Mapping) and ("bytes" in value or "path" in value):
        value = value.get("bytes") or value.get("path")
    try:
        if isinstance(value, Image.Image):
            return ImageOps.exif_transpose(value).convert("RGB")
        if isinstance(value, bytes):
            value = io.BytesIO(value)
        with Image.open(value) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, UnidentifiedImageError, AttributeError, ValueError, TypeError) as error:
        shown = value if isinstance(value, str) else f"a {type(value).__name__}"
        raise DataError(
            f"{where}: {shown} is no picture that can be read: {error}. Replace it or take it out."
        ) from None


def cut(image: Any, size: tuple[int, int]) -> Cut:
    """Return a PIL image resized until it covers a size, and cut around its middle."""
    from PIL import Image

    height, width = size
    factor = max(height / image.height, width / image.width)
    tall, wide = max(height, round(image.height * factor)), max(width, round(image.width * factor))
    original = (image.height, image.width)
    if (tall, wide) != original:
        image = image.resize((wide, tall), Image.Resampling.BILINEAR)
    top, left = (tall - height) // 2, (wide - width) // 2
    image = image.crop((left, top, left + width, top + height))
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3)
    return Cut(values.permute(2, 0, 1).float() / 127.5 - 1, original, (top, left))


def prompt_of(template: str | None, trigger: str | None, caption: str | None, where: str) -> str:
    """Return the prompt of a picture.

    Parameters
    ----------
    template
        With ``{caption}`` and ``{trigger}``; the caption alone, after the trigger, if not given.
    trigger
        The words by which what is learned is called.
    caption
        Of the picture.
    where
        For errors: which record.

    Raises
    ------
    DataError
        There is neither caption nor template, or the template asks for what is not given.
    """
    if template is None:
        if caption is None and trigger is None:
            raise DataError(
                f"{where} has no caption. Put a text file of the same name beside the picture, write a metadata.jsonl "
                "with file_name and text, or give the objective a prompt."
            )
        return ", ".join(part for part in (trigger, caption) if part)
    for name, value in (("{caption}", caption), ("{trigger}", trigger)):
        if name in template and value is None:
            raise DataError(f"{where}: the prompt '{template}' asks for {name}, which is not given.")
    return template.replace("{caption}", caption or "").replace("{trigger}", trigger or "")
