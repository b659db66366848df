"""Sheets of small pictures in records: kept as one PNG of few colours, drawn with labels beside the plots."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from .ledger import Sheet

#: Colours of a kept sheet; pictures of the pocket world have few.
COLOURS = 64


def sheet(title: str, pictures: Tensor, columns: Sequence[str], rows: Sequence[str]) -> Sheet:
    """Keep pictures, ``(rows * columns, 3, size, size)`` in bytes, row after row.

    Raises
    ------
    ValueError
        There are more or fewer pictures than places, or they are not square.
    """
    from PIL import Image

    count, _, size, width = pictures.shape
    if count != len(columns) * len(rows) or size != width:
        raise ValueError(
            f"Expected {len(columns) * len(rows)} square pictures for {title}, found {count} of {size} x {width}."
        )
    joined = pictures.unflatten(0, (len(rows), len(columns))).permute(0, 3, 1, 4, 2).reshape(len(rows) * size, -1, 3)
    kept = io.BytesIO()
    Image.fromarray(joined.contiguous().numpy()).quantize(COLOURS).save(kept, format="PNG", optimize=True)
    return Sheet(title, tuple(columns), tuple(rows), size, base64.b64encode(kept.getvalue()).decode())


def write_sheet(shown: Sheet, path: Path) -> None:
    """Draw a sheet with its labels; whole, or not at all."""
    from PIL import Image

    from lorry.diffusion.pictures import drawn_grid

    with Image.open(io.BytesIO(base64.b64decode(shown.png))) as opened:
        whole = opened.convert("RGB")
    size = shown.size
    places = [(x * size, y * size) for y in range(len(shown.rows)) for x in range(len(shown.columns))]
    cells = [whole.crop((left, top, left + size, top + size)) for left, top in places]
    part = path.with_name(f".{path.name}")
    drawn_grid(cells, shown.columns, shown.rows).quantize(COLOURS).save(part, format="PNG", optimize=True)
    os.replace(part, path)
