"""What torchvision needs to be imported where its compiled operators do not load, and suppression of boxes.

A package index may offer one build of torchvision, made for another build of torch (with CUDA beside one without). Its
shared library then fails to load, and so does ``import torchvision``, since a part of it asks for operators that the
library would have declared; and with it every import of transformers and diffusers that looks whether torchvision is
there. Missing at that place are two operators that suppress boxes; models and transforms are Python over torch.

`watch` lets `complete` run just before torchvision is imported, whoever imports it, and costs nothing until then. Where
the compiled operators load, nothing is defined.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch is imported when it is used: `import lorry` alone does not wait for it
    from torch import Tensor

#: Operators that torchvision's library declares, with these arguments; the second takes integers of quantised boxes.
DECLARED = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
#: Boxes that are held against each other at once: a square of this side is kept in memory.
AT_ONCE = 2048
_defined: list[Any] = []


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Return which boxes remain when each, best first, removes those that overlap it too much.

    Whether a box remains depends on better ones alone, so the answer is the only one that agrees with itself: it is
    found by asking all boxes at once until nothing changes. That takes as many rounds as the longest chain of boxes
    that remove each other, mostly a handful.

    Parameters
    ----------
    boxes
        Corners ``(boxes, 4)``: left, top, right, bottom.
    scores
        ``(boxes,)``; of equal ones the first counts as better.
    iou_threshold
        Intersection over union above which the worse of two is removed.

    Returns
    -------
    Tensor
        Indices int64, best first.
    """
    order = scores.argsort(descending=True, stable=True)
    left = boxes[order]
    if not left.is_floating_point() or left.dtype.itemsize < 4:
        left = left.float()
    remaining: list[Tensor] = []
    while len(order):
        some, rest = left[:AT_ONCE], left[AT_ONCE:]
        keep = _consistent(_overlaps(some, some) > iou_threshold)
        remaining.append(order[:AT_ONCE][keep])
        free = ~(_overlaps(some[keep], rest) > iou_threshold).any(0)
        order, left = order[AT_ONCE:][free], rest[free]
    return order.new_empty(0).long() if not remaining else _cat(remaining)


def _cat(parts: Sequence[Tensor]) -> Tensor:
    import torch

    return torch.cat(list(parts))


def _overlaps(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union ``(first, second)``; not a number for two boxes without an area."""
    low = first[:, None, :2].maximum(second[None, :, :2])
    high = first[:, None, 2:].minimum(second[None, :, 2:])
    shared = (high - low).clamp_(min=0).prod(-1)
    area, others = ((b[:, 2:] - b[:, :2]).prod(-1) for b in (first, second))
    return shared / (area[:, None] + others[None] - shared)


def _consistent(over: Tensor) -> Tensor:
    """Which rows remain, if a row that remains removes those below it that it overlaps ``(rows, rows)``."""
    over = over.triu(1)
    keep = ~over.new_zeros(len(over))
    while True:
        again = ~(over & keep[:, None]).any(0)
        if bool((again == keep).all()):
            return keep
        keep = again


@cache
def complete() -> bool:
    """Define what torchvision asks for at its import, unless its compiled operators load.

    Returns
    -------
    bool
        Whether the operators here are in use; False also where there is no torchvision.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return False
    import torch

    for library in sorted(Path(found.origin).parent.glob("_C*.*")):
        try:
            torch.ops.load_library(str(library))
        except (OSError, RuntimeError):  # another build of torch, or none of its libraries
            continue
        return False
    if hasattr(torch.ops.torchvision, "nms"):
        return False
    made = torch.library.Library("torchvision", "FRAGMENT")
    for name in DECLARED:
        made.define(name + SCHEMA)
        for device in ("CPU", "CUDA"):
            made.impl(name, nms, device)
    _defined.append(made)  # what it defines lives as long as it does
    return True


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Finds nothing; is asked for torchvision before those that do."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        """Complete torchvision when it is asked for the first time."""
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            complete()


def watch() -> None:
    """Let `complete` run when torchvision is imported."""
    if "torchvision" not in sys.modules and not any(isinstance(each, _BeforeTorchvision) for each in sys.meta_path):
        sys.meta_path.insert(0, _BeforeTorchvision())
