"""Classes of tensors as a task of the training engine, so that digits and hidden states can be trained on by jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lorry.training.losses import ClassTally, class_tally
from lorry.training.task import Batch, Examples, PlainReport, Setting, Task


@dataclass(frozen=True)
class TensorClasses(Task):
    """Classes of tensors: an example is the positional arguments of the base for one row, and its label."""

    name: ClassVar[str] = "tensor-classes"
    best: ClassVar[tuple[str, Literal["min", "max"]]] = ("accuracy", "max")

    def examples(self, setting: Setting, records: Sequence[Any], labels: Any = None) -> Examples[Any]:
        """Take rows as they are."""
        return Examples(tuple((r["x"], r["label"]) for r in records), PlainReport(len(records), len(records)))

    def collate(self, setting: Setting, examples: Sequence[Any]) -> Batch:
        """Pad rows to the longest, with a mask where they have a length."""
        rows, labels = [x for x, _ in examples], torch.tensor([label for _, label in examples])
        if rows[0].dim() == 1:
            return Batch({"x": torch.stack(rows)}, labels)
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(x)) for x in rows], batch_first=True)
        return Batch({"x": nn.utils.rnn.pad_sequence(rows, batch_first=True), "mask": mask}, labels)

    def forward(self, setting: Setting, batch: Batch) -> Tensor:
        """Run the base."""
        outputs: Tensor = setting.model(*batch.inputs.values())
        return outputs

    def losses(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each row."""
        return nn.functional.cross_entropy(outputs, targets, reduction="none"), torch.ones(len(outputs))

    def tally(self, outputs: Tensor, targets: Tensor) -> ClassTally:
        """Count right answers too."""
        return class_tally(outputs, targets)

    def cost(self, example: Any) -> int:
        """Tokens of a row."""
        return len(example[0]) if example[0].dim() == 2 else 1
