"""Pictures of classes: a folder for each class, shots of each, and the halves of base and new classes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorry.core.errors import LorryError

#: Ends of files that are read as pictures.
ENDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


@dataclass(frozen=True)
class Pictures:
    """Pictures as a model sees them, and their classes.

    Attributes
    ----------
    pixels
        ``(pictures, 3, height, width)``, as the processor makes them.
    labels
        ``(pictures,)``, places in `names`.
    names
        Of the classes, as they stand in a prompt.
    """

    pixels: Tensor
    labels: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.labels)

    def rows(self, chosen: Tensor) -> Pictures:
        """Return some of the pictures, of the same classes."""
        return Pictures(self.pixels[chosen], self.labels[chosen], self.names)

    def of_classes(self, wanted: Sequence[str]) -> Pictures:
        """Return the pictures of some classes, with these alone as names."""
        places = [self.names.index(name) for name in wanted]
        kept = torch.isin(self.labels, torch.tensor(places))
        renamed = torch.full((len(self.names),), -1)
        renamed[places] = torch.arange(len(places))
        return Pictures(self.pixels[kept], renamed[self.labels[kept]], tuple(wanted))


def read_folder(folder: Path, processor: Any, most: int | None = None, seed: int = 0) -> Pictures:
    """Read a folder that holds a folder of pictures for each class; a folder's name, ``_`` as space, is the class's.

    Parameters
    ----------
    folder
        With at least two classes.
    processor
        Of the model, for its sizes and its normalisation.
    most
        Pictures of each class at most, drawn by the seed.
    seed
        Of that draw.

    Raises
    ------
    LorryError
        There are not two classes with pictures, or a file is no picture.
    """
    from PIL import Image, UnidentifiedImageError

    found: dict[str, list[Path]] = {}
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else ():
        files = sorted(path for path in inner.iterdir() if path.suffix.lower() in ENDS)
        if files:
            name = inner.name.replace("_", " ")
            kept = len(files) if most is None else min(most, len(files))
            found[name] = sorted(random.Random(f"{name}/{seed}").sample(files, kept))
    if len(found) < 2:
        raise LorryError(
            f"Expected at least two folders of pictures in {folder}, one for each class, found {len(found)}: give a "
            "folder such as pets/cat/1.png, pets/dog/1.png."
        )
    tensors = []
    for path in (path for files in found.values() for path in files):
        try:
            with Image.open(path) as picture:
                tensors.append(processor(images=picture.convert("RGB"), return_tensors="pt")["pixel_values"][0])
        except (UnidentifiedImageError, OSError) as error:
            raise LorryError(f"{path} cannot be read as a picture: {error}. Remove it or write it anew.") from error
    labels = [place for place, files in enumerate(found.values()) for _ in files]
    return Pictures(torch.stack(tensors), torch.tensor(labels), tuple(found))


def shots_of(data: Pictures, shots: int, seed: int) -> tuple[Pictures, Pictures]:
    """Return so many pictures of each class, and all others.

    Fewer shots of a seed are among its more.

    Raises
    ------
    LorryError
        A class has no picture left to test with.
    """
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    counts = torch.bincount(data.labels, minlength=len(data.names))
    if int(counts.min()) <= shots:
        least = data.names[int(counts.argmin())]
        raise LorryError(
            f"{shots} shots of each class leave no picture of '{least}' to test with, which has {int(counts.min())}: "
            "ask for fewer shots, or add pictures."
        )
    taken = torch.cat([order[data.labels[order] == label][:shots] for label in range(len(data.names))])
    left = torch.ones(len(data), dtype=torch.bool)
    left[taken] = False
    return data.rows(taken), data.rows(left.nonzero().squeeze(1))


def halves(names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the base classes, which are learned, and the new ones, which are not: the first half and the second."""
    middle = (len(names) + 1) // 2
    return tuple(names[:middle]), tuple(names[middle:])
