"""Numbers of texts, or of pairs of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lorry.training.columns import TEXT_COLUMNS, find_column, numbers_of, texts_of
from lorry.training.data import Record, require_column
from lorry.training.data_errors import DataError
from lorry.training.encode import encode_classification
from lorry.training.heads import own_outputs
from lorry.training.rows import Encoded, Truncation
from lorry.training.tallies import Values
from lorry.training.task import Batch, Examples, PlainReport, Setting, digest, register_task
from lorry.training.text_task import TextTask

NUMBER_COLUMNS = ("score", "rating", "value", "target", "label", "similarity")


@register_task
@dataclass(frozen=True)
class Regression(TextTask):
    """A number for each text or pair of texts, by squared error. The head has one output."""

    name: ClassVar[str] = "regression"
    task: ClassVar[str | None] = "sequence-classification"
    outputs: ClassVar[int | None] = 1
    best: ClassVar[tuple[str, Literal["min", "max"]]] = ("loss", "min")
    max_length: int = 256
    """Tokens of a row."""
    text_column: str | None = None
    """Column of the text; guessed if not named."""
    pair_column: str | None = None
    """Column of a second text; ``text_pair`` or ``sentence2`` if there is one."""
    number_column: str | None = None
    """Column of the number; guessed if not named."""
    truncation: Truncation = "right"
    """``right`` cuts long texts."""
    scale: float = 1.0
    """Numbers are divided by this for the loss; metrics are of the divided ones."""

    @property
    def family(self) -> str:
        """Rows that have a number."""
        return "text, numbers"

    def encode(
        self, tokenizer: Any, records: Sequence[Record], *, labels: Sequence[str] | None = None
    ) -> Examples[Any]:
        """Encode texts; an example is a row and its number."""
        text = find_column(records, self.text_column, ("sentence1", *TEXT_COLUMNS), "text", "text_column")
        pair = self.pair_column or next((c for c in ("text_pair", "sentence2") if c in records[0]), None)
        if pair is not None:
            require_column(records, pair, "second text")
        number = find_column(records, self.number_column, NUMBER_COLUMNS, "number", "number_column")
        numbers, texts = numbers_of(records, number, "regression"), texts_of(records, text)
        kept = [i for i, t in enumerate(texts) if t.strip()]
        pairs = texts_of(records, pair, empty=True) if pair is not None else None
        made = encode_classification(
            tokenizer,
            [texts[i] for i in kept],
            kept,
            pairs=None if pairs is None else [pairs[i] for i in kept],
            max_length=self.max_length,
            truncation=self.truncation,
        )
        examples = tuple((replace(row, label=0), numbers[row.label or 0] / self.scale) for row in made.examples)
        return Examples(examples, PlainReport(len(records), len(examples)))

    def classes(self, setting: Setting, train: Examples[Any], labels: Sequence[str] | None) -> int | None:
        """Return 1 if the head has more outputs."""
        return own_outputs(setting.model, 1, "output")

    def fingerprint(self, examples: Sequence[Any]) -> str:
        """Return a hash of tokens and numbers."""
        return f"{super().fingerprint(examples)}-{digest([number for _, number in examples])}"

    def collate(self, setting: Setting, examples: Sequence[tuple[Encoded, float]]) -> Batch:
        """Pad the rows; the targets are the numbers."""
        batch = super().collate(setting, examples)
        return replace(batch, targets=torch.tensor([n for _, n in examples], device=setting.device))

    def losses(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the squared error of each row."""
        losses = F.mse_loss(outputs[:, 0].to(targets.dtype), targets, reduction="none")
        return losses, torch.ones_like(losses)

    def loss(self, outputs: Any, targets: Any) -> tuple[Tensor, int]:
        """Return the summed squared error, and the number of rows."""
        losses, _ = self.losses(outputs, targets)
        return losses.sum(), len(losses)

    def tally(self, outputs: Tensor, targets: Tensor) -> Values:
        """Return what loss, R², Spearman's correlation and the mean absolute error need."""
        loss = float(self.losses(outputs, targets)[0].double().sum())
        return Values(loss, outputs[:, 0].double().cpu(), targets.double().cpu())

    def check(self, setting: Setting, examples: Examples[Any], name: str) -> None:
        """Refuse numbers that are all equal, besides what all text tasks refuse."""
        super().check(setting, examples, name)
        if len({number for _, number in examples.examples}) < 2 < len(examples):
            raise DataError(f"All numbers of {name} are equal, so there is nothing to learn; check number_column.")
