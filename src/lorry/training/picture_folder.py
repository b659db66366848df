"""Folders of pictures: records of files, with captions from text files or a metadata file beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .data_errors import DataError

#: Endings of files that are taken for pictures.
PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_METADATA = "metadata.jsonl"


def is_picture_folder(path: Path) -> bool:
    """Whether a folder holds pictures, or says in a metadata file where they are."""
    if (path / _METADATA).is_file():
        return '"file_name"' in (path / _METADATA).read_text(encoding="utf-8", errors="replace")[:10_000]
    return any(file.suffix.lower() in PICTURES for file in path.iterdir())


def read_pictures(path: Path) -> list[dict[str, Any]]:
    """Return a record for each picture of a folder: ``image`` (its path), and ``text`` where there is a caption.

    Captions come from ``metadata.jsonl`` (``file_name`` and further columns), or from a text file of its name.

    Raises
    ------
    DataError
        A line of the metadata that is no record, or names a picture that is not there.
    """
    metadata = path / _METADATA
    if metadata.is_file():
        return [_of_line(line, number, path) for number, line in _lines(metadata)]
    found = []
    for file in sorted(path.iterdir()):
        if file.suffix.lower() in PICTURES:
            caption = file.with_suffix(".txt")
            text = {"text": caption.read_text(encoding="utf-8").strip()} if caption.is_file() else {}
            found.append({"image": str(file), **text})
    return found


def _lines(metadata: Path) -> list[tuple[int, str]]:
    lines = metadata.read_text(encoding="utf-8").splitlines()
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _of_line(line: str, number: int, folder: Path) -> dict[str, Any]:
    where = f"{folder / _METADATA}:{number}"
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is no JSON: {error}.") from None
    if not isinstance(record, dict) or not isinstance(record.get("file_name"), str):
        raise DataError(f"{where} must be an object with a file_name, found {line[:80]}.")
    name = record.pop("file_name")
    file = folder / name
    if not file.is_file():
        raise DataError(f"{where} names the picture {name}, which is not in {folder}.")
    return {"image": str(file), **record}
