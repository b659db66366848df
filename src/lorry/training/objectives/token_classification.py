"""Classes of the words of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from lorry.training.columns import class_index, class_names, find_column, value_at
from lorry.training.data import Record
from lorry.training.data_errors import DataError
from lorry.training.heads import own_outputs
from lorry.training.losses import ClassTally, class_tally
from lorry.training.rows import IGNORE, Encoded, ints
from lorry.training.task import Examples, PlainReport, Setting, register_task

from ._in_place import InPlace

WORD_COLUMNS = ("tokens", "words")
TAG_COLUMNS = ("tags", "ner_tags", "pos_tags", "labels")


@register_task
@dataclass(frozen=True)
class TokenClassification(InPlace):
    """A class for each word; a word of several tokens is judged by its first."""

    name: ClassVar[str] = "token-classification"
    task: ClassVar[str | None] = "token-classification"
    best: ClassVar[tuple[str, Literal["min", "max"]]] = ("macro_f1", "max")
    max_length: int = 256
    """Tokens of a row; longer texts are cut."""
    words_column: str | None = None
    """Column of the words, a list or a text with spaces; guessed if not named."""
    tags_column: str | None = None
    """Column of their classes, likewise; guessed if not named."""

    def encode(
        self, tokenizer: Any, records: Sequence[Record], *, labels: Sequence[str] | None = None
    ) -> Examples[Any]:
        """Encode words and classes; `labels` are the names of the classes in the order of the head."""
        words, tags, column = self._columns(records)
        names = list(labels) if labels is not None else list(class_names([t for line in tags for t in line], column))
        numbers = iter(class_index([t for line in tags for t in line], column, names))
        rows = []
        for line in words:
            own = [next(numbers) for _ in line]
            coded = tokenizer(
                line, is_split_into_words=True, truncation=True, max_length=self.max_length, return_attention_mask=False
            )
            places, before, found = coded.word_ids(0), None, []
            for place in places:
                found.append(own[place] if place is not None and place != before else IGNORE)
                before = place
            if any(label != IGNORE for label in found):
                rows.append(Encoded(ints(coded["input_ids"]), ints(found)))
        if not rows:
            raise DataError(f"None of the {len(records)} records has words; check the column {column!r}.")
        return Examples(tuple(rows), PlainReport(len(records), len(rows)))

    def _columns(self, records: Sequence[Record]) -> tuple[list[list[str]], list[list[Any]], str]:
        words = find_column(records, self.words_column, WORD_COLUMNS, "words", "words_column")
        tags = find_column(records, self.tags_column, TAG_COLUMNS, "classes of words", "tags_column")
        read = [tuple(_list(value_at(r, c, i), i, c) for c in (words, tags)) for i, r in enumerate(records)]
        for i, (line, classes) in enumerate(read):
            if len(line) != len(classes):
                raise DataError(
                    f"Record {i} has {len(line)} words in {words!r} and {len(classes)} classes in {tags!r}; give one "
                    "class for each word."
                )
        return [[str(w) for w in line] for line, _ in read], [classes for _, classes in read], tags

    def labels_of(self, records: Sequence[Record]) -> tuple[str, ...]:
        """Return the classes of the training records: numbers by value, names by alphabet."""
        _, tags, column = self._columns(records)
        return class_names([tag for line in tags for tag in line], column)

    def classes(self, setting: Setting, train: Examples[Any], labels: Sequence[str] | None) -> int | None:
        """Return the number of the job's classes if the head has more; `DataError` if it has fewer."""
        count = len(labels) if labels else 1 + max(int(row.labels.max()) for row in train.examples)
        return own_outputs(setting.model, count)

    def count(self, example: Encoded) -> int:
        """Return the number of words."""
        assert example.labels is not None
        return int((example.labels != IGNORE).sum())

    def tally(self, outputs: Tensor, targets: Tensor) -> ClassTally:
        """Return the sums for loss, accuracy and macro F1 over words."""
        return class_tally(outputs.flatten(0, 1), targets.flatten())


def _list(value: Any, index: int, column: str) -> list[Any]:
    if isinstance(value, str):
        return list(value.split())
    if isinstance(value, Sequence):
        return list(value)
    raise DataError(f"Record {index}: column {column!r} holds a {type(value).__name__}, expected a list of words.")
