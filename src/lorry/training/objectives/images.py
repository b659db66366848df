"""Classes of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lorry.training.columns import LABEL_COLUMNS, class_index, class_names, find_column, value_at
from lorry.training.data import Record
from lorry.training.data_errors import DataError
from lorry.training.heads import check_head, own_outputs
from lorry.training.losses import ClassTally, class_tally
from lorry.training.task import Batch, Examples, PlainReport, Setting, Task, register_task

IMAGE_COLUMNS = ("image", "picture", "img", "file", "path", "pixel_values")


@register_task
@dataclass(frozen=True)
class ImageClassification(Task):
    """A class for each picture: a file, a PIL image, or a tensor ``(channels, height, width)`` that is ready."""

    name: ClassVar[str] = "image-classification"
    task: ClassVar[str | None] = "image-classification"
    unit: ClassVar[str] = "pictures"
    best: ClassVar[tuple[str, Literal["min", "max"]]] = ("accuracy", "max")
    image_column: str | None = None
    """Column of the picture; guessed if not named."""
    label_column: str | None = None
    """Column of the class; guessed if not named."""

    def labels_of(self, records: Sequence[Record]) -> tuple[str, ...]:
        """Return the classes of the training records: numbers by value, names by alphabet."""
        column = find_column(records, self.label_column, LABEL_COLUMNS, "class", "label_column")
        return class_names([value_at(r, column, i) for i, r in enumerate(records)], column)

    def examples(
        self, setting: Setting, records: Sequence[Record], labels: Sequence[str] | None = None
    ) -> Examples[Any]:
        """Prepare the pictures as the base's image processor does."""
        image = find_column(records, self.image_column, IMAGE_COLUMNS, "picture", "image_column")
        column = find_column(records, self.label_column, LABEL_COLUMNS, "class", "label_column")
        names = list(labels) if labels is not None else list(self.labels_of(records))
        classes = class_index([value_at(r, column, i) for i, r in enumerate(records)], column, names)
        pictures = [_picture(value_at(r, image, i), i, image, setting.processor) for i, r in enumerate(records)]
        shapes = {tuple(p.shape) for p in pictures}
        if len(shapes) > 1:
            raise DataError(
                f"The pictures differ in shape ({', '.join(map(str, sorted(shapes)))}); give the base's image "
                "processor, or tensors of one shape."
            )
        return Examples(tuple(zip(pictures, classes, strict=True)), PlainReport(len(records), len(pictures)))

    def check_model(self, setting: Setting) -> None:
        """Refuse a model that has another head."""
        check_head(self.task, setting.model, self.name)

    def classes(self, setting: Setting, train: Examples[Any], labels: Sequence[str] | None) -> int | None:
        """Return the number of the job's classes if the head has more; `DataError` if it has fewer."""
        return own_outputs(setting.model, len(labels) if labels else 1 + max(label for _, label in train.examples))

    def collate(self, setting: Setting, examples: Sequence[tuple[Tensor, int]]) -> Batch:
        """Stack the pictures."""
        pictures = torch.stack([picture for picture, _ in examples]).to(setting.device)
        dtype = next(p.dtype for p in setting.model.parameters() if p.is_floating_point())
        labels = torch.tensor([label for _, label in examples], device=setting.device)
        return Batch({"pixel_values": pictures.to(dtype)}, labels)

    def forward(self, setting: Setting, batch: Batch) -> Tensor:
        """Return the model's logits."""
        logits: Tensor = setting.model(**batch.inputs).logits
        return logits

    def losses(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of each picture."""
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        losses = F.cross_entropy(outputs, targets, reduction="none")
        return losses, torch.ones_like(losses)

    def tally(self, outputs: Tensor, targets: Tensor) -> ClassTally:
        """Return the sums for loss, accuracy and macro F1."""
        return class_tally(outputs, targets)


def _picture(value: Any, index: int, column: str, processor: Any) -> Tensor:
    """Return a picture as the base takes it, ``(channels, height, width)``."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3:
        return value
    if isinstance(value, str | Path):
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(value) as opened:
                value = opened.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(
                f"Record {index}: column {column!r}: {value} is no picture that can be read: {error}."
            ) from error
    if processor is None or not hasattr(value, "size"):
        raise DataError(
            f"Record {index}: column {column!r} holds a {type(value).__name__}; expected a file, a PIL image with the "
            "base's image processor, or a floating tensor (channels, height, width)."
        )
    found: Tensor = processor(images=value, return_tensors="pt")["pixel_values"][0]
    return found
