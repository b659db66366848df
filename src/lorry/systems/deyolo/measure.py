"""Mean average precision, by pycocotools, and boxes drawn."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .pairs import Pairs, coco

#: A side of a drawn picture has at least so many pixels.
DRAWN = 256
COLOURS = ("#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#46f0f0", "#f032e6")
#: Pairs that are searched at once.
BATCH = 32


def found(model: nn.Module, pairs: Pairs, change: Callable[[Tensor], Tensor] | None = None) -> list[dict[str, Tensor]]:
    """Return boxes, labels and scores of each pair.

    Parameters
    ----------
    model
        A detector; it is put into evaluation mode.
    pairs
        Where to look.
    change
        What happens to each pair before, e.g. one modality is removed.
    """
    model.eval()
    answers: list[dict[str, Tensor]] = []
    with torch.no_grad():
        for start in range(0, len(pairs), BATCH):
            inputs = pairs.inputs(range(start, min(start + BATCH, len(pairs))))
            answers += model([change(each) for each in inputs] if change else inputs)
    return answers


def precision(pairs: Pairs, answers: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Return mean average precision as COCO defines it.

    Parameters
    ----------
    pairs
        With the true boxes.
    answers
        Boxes, labels and scores for each pair.

    Returns
    -------
    dict
        ``map`` (mean over thresholds of overlap from 0.5 to 0.95), ``map50``, ``map75`` and ``recall50``, each within
        0 to 1.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rows: list[dict[str, Any]] = []
    for i, answer in enumerate(answers):
        for (a, b, c, d), label, score in _each(answer):
            rows.append({"image_id": i + 1, "category_id": label, "bbox": [a, b, c - a, d - b], "score": score})
    if not rows:
        return {"map": 0.0, "map50": 0.0, "map75": 0.0, "recall50": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = coco(pairs)
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(rows), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    values = {"map": judge.stats[0], "map50": judge.stats[1], "map75": judge.stats[2]}
    recalls = judge.eval["recall"][0, :, 0, -1]
    values["recall50"] = recalls[recalls > -1].mean()
    return {name: float(value) for name, value in values.items()}


def _each(answer: dict[str, Tensor]) -> Iterator[tuple[list[float], int, float]]:
    """Corners, label and score of each box that was found."""
    boxes, labels, scores = (answer[key].tolist() for key in ("boxes", "labels", "scores"))
    yield from zip(boxes, labels, scores, strict=True)


def draw(pairs: Pairs, answers: Sequence[dict[str, Tensor]], path: Path, least: float = 0.3, rows: int = 4) -> None:
    """Draw both modalities of some pairs with true boxes (white, thin) and found ones (coloured, with scores).

    Parameters
    ----------
    pairs, answers
        As in `precision`.
    path
        PNG to write.
    least
        Score from which a found box is drawn.
    rows
        How many pairs, the first.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(14)
    lines = []
    for i in range(min(rows, len(pairs))):
        height, width = pairs.pictures[i].shape[-2:]
        factor = max(1, -(-DRAWN // min(height, width)))
        panels = []
        for pixels in pairs.pictures[i].split(3):
            panel = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
            panel = panel.resize((width * factor, height * factor), Image.Resampling.NEAREST)
            pen = ImageDraw.Draw(panel)
            for box in (pairs.boxes[i] * factor).tolist():
                pen.rectangle(box, outline="white", width=1)
            for box, label, score in _each(answers[i]):
                if score < least:
                    continue
                corners = [value * factor for value in box]
                colour = COLOURS[label % len(COLOURS)]
                pen.rectangle(corners, outline=colour, width=3)
                text = f"{pairs.classes[label]} {score:.2f}"
                at = (min(corners[0] + 4, panel.width - pen.textlength(text, font=font)), corners[1] + 4)
                pen.text(at, text, fill="white", font=font, stroke_width=2, stroke_fill="black")
            panels.append(panel)
        lines.append(panels)
    _sheet(lines).save(path)


def _sheet(lines: Sequence[Sequence[Any]], gap: int = 6) -> Any:
    """Lay pictures out in lines, as wide as the widest."""
    from PIL import Image

    width = max(sum(each.width + gap for each in line) for line in lines) - gap
    sheet = Image.new("RGB", (width, sum(max(e.height for e in line) + gap for line in lines) - gap), "white")
    y = 0
    for line in lines:
        x = 0
        for each in line:
            sheet.paste(each, (x, y))
            x += each.width + gap
        y += max(each.height for each in line) + gap
    return sheet
