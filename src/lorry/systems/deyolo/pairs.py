"""Aligned pairs of pictures with boxes: in memory, and as folders in the formats of COCO and of YOLO.

A folder has ``rgb`` and ``ir`` with pictures of the same names and sizes, and boxes, drawn on RGB, in one of two forms:

- COCO: ``annotations.json`` with ``images``, ``annotations`` (``bbox``: left, top, width, height in pixels) and
  ``categories``;
- YOLO: ``labels/NAME.txt`` with a line for each box (class, then centre and size as parts of the picture's), and
  ``classes.txt`` with a name on each line. A picture without a file has no boxes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from lorry.core.errors import OptionError, some
from lorry.training.checkpoint import write_json

#: What the two folders may be called, the first when written.
RGB, INFRARED = ("rgb", "visible", "vis"), ("ir", "infrared", "thermal")
ANNOTATIONS, LABELS, NAMES = "annotations.json", "labels", "classes.txt"
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})


@dataclass(frozen=True)
class Pairs:
    """Pairs with what is to be found in them.

    Attributes
    ----------
    pictures
        Bytes ``(6, height, width)`` each, RGB first.
    boxes
        Corners in pixels ``(boxes, 4)`` of each picture.
    labels
        Indices into `classes`, ``(boxes,)`` int64.
    classes
        Names.
    names
        Of the pictures, without folder and suffix.
    seen
        For generated pairs which modality shows each box.
    """

    pictures: Sequence[Tensor]
    boxes: Sequence[Tensor]
    labels: Sequence[Tensor]
    classes: tuple[str, ...]
    names: Sequence[str]
    seen: Sequence[Tensor] = field(default=())

    def __len__(self) -> int:
        return len(self.pictures)

    def inputs(self, which: Sequence[int]) -> list[Tensor]:
        """Return pairs within 0 to 1."""
        return [self.pictures[i] / 255 for i in which]

    def targets(self, which: Sequence[int]) -> list[dict[str, Tensor]]:
        """Return boxes and labels as torchvision's detectors take them."""
        return [{"boxes": self.boxes[i], "labels": self.labels[i]} for i in which]


def without(pair: Tensor, modality: str) -> Tensor:
    """Return a pair ``(6, height, width)`` with the pixels of ``rgb`` or ``ir`` at zero: a camera that is off."""
    pair = pair.clone()
    (pair[:3] if modality == "rgb" else pair[3:]).zero_()
    return pair


def augmented(
    pair: Tensor, target: dict[str, Tensor], g: Generator, flip: float = 0.5, light: float = 0.2
) -> tuple[Tensor, dict[str, Tensor]]:
    """Flip both pictures and the boxes together, and change the brightness of each picture by itself.

    Parameters
    ----------
    pair
        ``(6, height, width)`` within 0 to 1.
    target
        ``boxes`` and ``labels``.
    g
        Draws.
    flip
        Probability.
    light
        By which part of it brightness changes at most.
    """
    draws = torch.rand(3, generator=g)
    factors = 1 + light * (2 * draws[1:] - 1)
    pair = (pair * factors.repeat_interleave(3)[:, None, None]).clamp(0, 1)
    if draws[0] >= flip:
        return pair, target
    left, top, right, bottom = target["boxes"].unbind(1)
    width = pair.shape[-1]
    return pair.flip(-1), {**target, "boxes": torch.stack([width - right, top, width - left, bottom], 1)}


def write(pairs: Pairs, folder: Path, form: str = "coco") -> None:
    """Write pairs as a folder.

    Parameters
    ----------
    pairs
        What to write.
    folder
        Is made.
    form
        ``coco`` or ``yolo``.

    Raises
    ------
    OptionError
        There is no such form.
    """
    from PIL import Image

    if form not in ("coco", "yolo"):
        raise OptionError(f"A folder of pairs is written as coco or yolo, not {form!r}.")
    for name in (RGB[0], INFRARED[0], *([LABELS] if form == "yolo" else [])):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, picture in zip(pairs.names, pairs.pictures, strict=True):
        for part, pixels in zip((RGB[0], INFRARED[0]), picture.split(3), strict=True):
            Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(folder / part / f"{name}.png")
    if form == "coco":
        write_json(folder / ANNOTATIONS, coco(pairs))
        return
    for i, name in enumerate(pairs.names):
        height, width = pairs.pictures[i].shape[-2:]
        lines = []
        for label, (a, b, c, d) in zip(pairs.labels[i].tolist(), pairs.boxes[i].tolist(), strict=True):
            values = ((a + c) / 2 / width, (b + d) / 2 / height, (c - a) / width, (d - b) / height)
            lines.append(" ".join([str(label), *(f"{value:.6f}" for value in values)]))
        (folder / LABELS / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    (folder / NAMES).write_text("".join(f"{name}\n" for name in pairs.classes), encoding="utf-8")


def coco(pairs: Pairs) -> dict[str, Any]:
    """Return boxes in COCO's form; numbers of pictures and boxes from 1, of classes from 0."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i, (name, picture) in enumerate(zip(pairs.names, pairs.pictures, strict=True)):
        height, width = picture.shape[-2:]
        images.append({"id": i + 1, "file_name": f"{name}.png", "height": height, "width": width})
        for label, (a, b, c, d) in zip(pairs.labels[i].tolist(), pairs.boxes[i].tolist(), strict=True):
            box = [a, b, c - a, d - b]
            found = {"id": len(annotations) + 1, "image_id": i + 1, "category_id": label, "bbox": box}
            annotations.append({**found, "area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": i, "name": name} for i, name in enumerate(pairs.classes)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def read(folder: Path) -> Pairs:
    """Read a folder of pairs in either form.

    Raises
    ------
    OptionError
        Something is missing, unpaired, of unequal size, or a box lies outside of its picture.
    """
    rgb, infrared = _pictures(folder, RGB), _pictures(folder, INFRARED)
    if odd := sorted(set(rgb) ^ set(infrared)):
        raise OptionError(f"{folder}: expected every picture in both modalities, found only one of {some(odd)}.")
    if (folder / ANNOTATIONS).is_file():
        classes, found = _of_coco(folder)
    elif (folder / LABELS).is_dir():
        classes, found = _of_yolo(folder)
    else:
        raise OptionError(f"{folder} has no boxes: expected {ANNOTATIONS} (COCO) or {LABELS}/ with {NAMES} (YOLO).")
    if surplus := sorted(set(found) - set(rgb)):
        raise OptionError(f"{folder}: there are boxes for {some(surplus)}, but no such pictures.")
    pictures, boxes, labels = [], [], []
    for name in sorted(rgb):
        pair = _pair(rgb[name], infrared[name])
        height, width = pair.shape[-2:]
        scale = torch.tensor([width, height, width, height]) if not (folder / ANNOTATIONS).is_file() else torch.ones(4)
        rows = torch.tensor([box for _, box in found.get(name, ())], dtype=torch.float32).reshape(-1, 4) * scale
        _check(rows, folder / name, width, height)
        pictures.append(pair)
        boxes.append(rows)
        labels.append(torch.tensor([label for label, _ in found.get(name, ())], dtype=torch.int64))
    return Pairs(pictures, boxes, labels, classes, sorted(rgb))


def _pictures(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """Name without suffix -> picture, of the first folder there is."""
    for name in names:
        if (folder / name).is_dir():
            found = {file.stem: file for file in (folder / name).iterdir() if file.suffix.lower() in SUFFIXES}
            if not found:
                raise OptionError(f"There are no pictures in {folder / name}.")
            return found
    raise OptionError(f"{folder} is no folder of pairs: expected one of {', '.join(names)} in it.")


def _pair(rgb: Path, infrared: Path) -> Tensor:
    import numpy
    from PIL import Image, UnidentifiedImageError

    parts = []
    for file in (rgb, infrared):
        try:
            with Image.open(file) as picture:
                parts.append(torch.from_numpy(numpy.array(picture.convert("RGB"))).permute(2, 0, 1))
        except (OSError, UnidentifiedImageError) as error:
            raise OptionError(f"{file} is no picture that can be read: {error}") from None
    if parts[0].shape != parts[1].shape:
        sizes = " and ".join(f"{part.shape[2]} x {part.shape[1]}" for part in parts)
        raise OptionError(f"{rgb} and {infrared} are {sizes}; pairs must lie pixel on pixel.")
    return torch.cat(parts)


Found = dict[str, list[tuple[int, list[float]]]]


def _of_coco(folder: Path) -> tuple[tuple[str, ...], Found]:
    """Class names, and for each picture label and corners in pixels."""
    try:
        values = json.loads((folder / ANNOTATIONS).read_text(encoding="utf-8"))
        categories = sorted(values["categories"], key=lambda each: each["id"])
        label = {each["id"]: i for i, each in enumerate(categories)}
        name = {each["id"]: Path(each["file_name"]).stem for each in values["images"]}
        found: Found = {}
        for each in values["annotations"]:
            x, y, width, height = each["bbox"]
            found.setdefault(name[each["image_id"]], []).append(
                (label[each["category_id"]], [x, y, x + width, y + height])
            )
        return tuple(each["name"] for each in categories), found
    except (ValueError, KeyError, TypeError) as error:
        raise OptionError(
            f"{folder / ANNOTATIONS} is not in COCO's form (images, annotations with bbox, categories): "
            f"{type(error).__name__}: {error}"
        ) from None


def _of_yolo(folder: Path) -> tuple[tuple[str, ...], Found]:
    """Class names, and for each picture label and corners as parts of its size."""
    if not (folder / NAMES).is_file():
        raise OptionError(f"{folder} has {LABELS}/ but no {NAMES}; it has the name of a class on each line.")
    classes = tuple((folder / NAMES).read_text(encoding="utf-8").split("\n"))
    classes = tuple(name.strip() for name in classes if name.strip())
    found: Found = {}
    for file in sorted((folder / LABELS).glob("*.txt")):
        rows = found.setdefault(file.stem, [])
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                label, x, y, width, height = (float(word) for word in line.split())
                known = 0 <= label < len(classes) and label == int(label)
            except ValueError:
                known = False
            if not known:
                raise OptionError(
                    f"{file}, line {number}: expected a class from 0 to {len(classes) - 1}, centre and size, found "
                    f"{line!r}."
                )
            rows.append((int(label), [x - width / 2, y - height / 2, x + width / 2, y + height / 2]))
    return classes, found


def _check(boxes: Tensor, where: Path, width: int, height: int) -> None:
    """Refuse boxes without area or outside of the picture, but for a pixel's rounding; those are cut in place."""
    edge = torch.tensor([width, height, width, height])
    bad = ((boxes < -1) | (boxes > edge + 1)).any(1) | (boxes[:, 2:] <= boxes[:, :2]).any(1)
    if bad.any():
        raise OptionError(
            f"{where}: the box {boxes[bad][0].tolist()} has no area or lies outside of the {width} x {height} pixels."
        )
    torch.minimum(boxes.clamp_(min=0), edge, out=boxes)
