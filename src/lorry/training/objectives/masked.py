"""Tokens that are hidden in a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from lorry.training.columns import TEXT_COLUMNS, find_column, texts_of
from lorry.training.data import Record
from lorry.training.data_errors import DataError
from lorry.training.encode import encode_classification
from lorry.training.losses import TokenTally
from lorry.training.rows import IGNORE, Encoded
from lorry.training.task import Examples, PlainReport, Setting, register_task

from ._in_place import InPlace


@register_task
@dataclass(frozen=True)
class MaskedLM(InPlace):
    """Masked language modelling: which tokens were hidden. Others are hidden at each step.

    Devlin et al. 2019: of the tokens that are to be found, eight in ten become the mask, one in ten another token, one
    in ten stays. The same number of each text is hidden at every step.
    """

    name: ClassVar[str] = "masked"
    task: ClassVar[str | None] = "masked-lm"
    max_length: int = 256
    """Tokens of a row; longer texts are cut."""
    text_column: str | None = None
    """Column of the text; guessed if not named."""
    hidden: float = 0.15
    """Share of the tokens that are hidden; at least one of each text."""

    def __post_init__(self) -> None:
        """Refuse shares that hide nothing or everything."""
        if not 0 < self.hidden < 1:
            raise DataError(f"The option hidden is a share between 0 and 1, found {self.hidden}.")

    def encode(
        self, tokenizer: Any, records: Sequence[Record], *, labels: Sequence[str] | None = None
    ) -> Examples[Any]:
        """Encode texts; the labels of a row are the tokens that may be hidden."""
        if tokenizer.mask_token_id is None:
            raise DataError("The tokenizer has no mask token, so this base was not made for masked language modelling.")
        column = find_column(records, self.text_column, TEXT_COLUMNS, "text", "text_column")
        made = encode_classification(
            tokenizer, texts_of(records, column), [0] * len(records), max_length=self.max_length
        )
        special = torch.tensor(sorted(tokenizer.all_special_ids))
        rows = [
            Encoded(row.input_ids, row.input_ids.masked_fill(torch.isin(row.input_ids, special), IGNORE))
            for row in made.examples
        ]
        kept = tuple(row for row in rows if row.labels is not None and bool((row.labels != IGNORE).any()))
        if not kept:
            raise DataError(f"None of the {len(records)} records has tokens to hide; check the column {column!r}.")
        return Examples(kept, PlainReport(len(records), len(kept)))

    def count(self, example: Encoded) -> int:
        """Return how many tokens of the row are hidden."""
        assert example.labels is not None
        return max(1, round(self.hidden * int((example.labels != IGNORE).sum())))

    def draw(self, examples: Sequence[Encoded], generator: Generator, setting: Setting, adapter: str) -> list[Encoded]:
        """Hide tokens."""
        tokenizer, drawn = setting.processor, []
        for row in examples:
            assert row.labels is not None
            may = (row.labels != IGNORE).nonzero()[:, 0]
            places = may[torch.randperm(len(may), generator=generator)[: self.count(row)]]
            ids, labels = row.input_ids.clone(), torch.full_like(row.labels, IGNORE)
            labels[places] = row.labels[places]
            how = torch.rand(len(places), generator=generator)
            others = torch.randint(len(tokenizer), (len(places),), generator=generator).to(ids.dtype)
            ids[places[how < 0.8]] = tokenizer.mask_token_id
            ids[places[how >= 0.9]] = others[how >= 0.9]
            drawn.append(Encoded(ids, labels))
        return drawn

    def tally(self, outputs: Tensor, targets: Tensor) -> TokenTally:
        """Return the sums for loss, perplexity and accuracy of the tokens to find."""
        losses, counts = self.losses(outputs, targets)
        right = (outputs.argmax(-1) == targets).sum()  # -100 is no token
        return TokenTally(float(losses.double().sum()), int(counts.sum()), int(right))
