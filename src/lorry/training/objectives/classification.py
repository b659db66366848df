"""Classes of texts, or of pairs of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from lorry.training.columns import (
    LABEL_COLUMNS,
    TEXT_COLUMNS,
    class_index,
    class_names,
    find_column,
    texts_of,
    value_at,
)
from lorry.training.data import Record, require_column
from lorry.training.encode import encode_classification
from lorry.training.heads import own_outputs
from lorry.training.losses import ClassTally, class_tally, classification_loss
from lorry.training.rows import Encoded, EncodedSet, Truncation
from lorry.training.task import Examples, Setting, register_task
from lorry.training.text_task import TextTask


@register_task
@dataclass(frozen=True)
class Classification(TextTask):
    """Classes of texts or pairs of texts."""

    name: ClassVar[str] = "classification"
    task: ClassVar[str | None] = "sequence-classification"
    best: ClassVar[tuple[str, Literal["min", "max"]]] = ("accuracy", "max")
    max_length: int = 256
    """Tokens of a row."""
    text_column: str | None = None
    """Column of the text; guessed if not named."""
    pair_column: str | None = None
    """Column of a second text; ``text_pair``, ``sentence2``, ``hypothesis`` or ``passage`` if there is
    one."""
    label_column: str | None = None
    """Column of the class; guessed if not named."""
    truncation: Truncation = "right"
    """``right`` cuts long texts, ``drop`` leaves them out."""

    def label_names(self, records: Sequence[Record]) -> tuple[str, ...]:
        """The classes of the training records in a stable order: numbers by value, names by alphabet.

        Raises
        ------
        DataError
            Fewer than two classes, a label that is missing, or a fraction.
        """
        column = find_column(records, self.label_column, LABEL_COLUMNS, "label", "label_column")
        return class_names([value_at(r, column, i) for i, r in enumerate(records)], column)

    def encode(self, tokenizer: Any, records: Sequence[Record], *, labels: Sequence[str] | None = None) -> EncodedSet:
        """Encode texts and classes (`encode_classification`).

        Parameters
        ----------
        tokenizer
            A Hugging Face tokenizer.
        records
            The examples.
        labels
            Classes in the model's order; None takes those of these records (`label_names`). Give the
            training set's here for evaluation data.
        """
        first = ("text", "sentence", "sentence1", "premise", "question", *TEXT_COLUMNS)
        text = find_column(records, self.text_column, first, "text", "text_column")
        pair = self.pair_column or next(
            (c for c in ("text_pair", "sentence2", "hypothesis", "passage") if c in records[0] and c != text),
            None,
        )
        if pair is not None:
            require_column(records, pair, "second text")
        column = find_column(records, self.label_column, LABEL_COLUMNS, "label", "label_column")
        names = list(labels) if labels is not None else list(self.label_names(records))
        classes = class_index([value_at(r, column, i) for i, r in enumerate(records)], column, names)
        return encode_classification(
            tokenizer,
            texts_of(records, text),
            classes,
            pairs=texts_of(records, pair, empty=True) if pair is not None else None,
            max_length=self.max_length,
            truncation=self.truncation,
        )

    def labels_of(self, records: Sequence[Record]) -> tuple[str, ...]:
        """Return the classes of the training records (`label_names`)."""
        return self.label_names(records)

    def classes(self, setting: Setting, train: Examples[Encoded], labels: Sequence[str] | None) -> int | None:
        """Return the number of the job's classes if the head has more.

        Raises
        ------
        DataError
            The head has fewer.
        """
        count = len(labels) if labels else max(row.label or 0 for row in train.examples) + 1
        return own_outputs(setting.model, count)

    def loss(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        """Return the summed cross-entropy and the number of examples (`classification_loss`)."""
        return classification_loss(outputs, targets)

    def tally(self, outputs: Tensor, targets: Tensor) -> ClassTally:
        """Return the sums for loss, accuracy and macro F1 (`class_tally`)."""
        return class_tally(outputs, targets)
