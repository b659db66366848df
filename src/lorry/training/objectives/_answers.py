"""What objectives on answers to prompts have in common: their columns, their rows, and the reference beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from lorry.training.columns import PROMPT_COLUMNS, find_column, texts_of
from lorry.training.data import Record
from lorry.training.data_errors import DataError
from lorry.training.encode import completion_rows
from lorry.training.reference import ask, log_probabilities
from lorry.training.rows import IGNORE, Encoded, Truncation
from lorry.training.tallies import Means
from lorry.training.task import Batch, Examples, PlainReport, Setting
from lorry.training.text_task import TextTask

CHOSEN_COLUMNS = ("chosen", "preferred", "accepted", "winner")
REJECTED_COLUMNS = ("rejected", "dispreferred", "refused", "loser")


@dataclass(frozen=True, eq=False)
class Judged:
    """Rows with numbers that were worked out beside the pass.

    Attributes
    ----------
    rows
        Of one example.
    numbers
        ``(rows, 3)``: the reference's log-probability of the labels, and two more that the objective knows.
    """

    rows: tuple[Encoded, ...]
    numbers: Tensor


@dataclass(frozen=True)
class Answers(TextTask):
    """Options of all objectives on answers to prompts."""

    task: ClassVar[str | None] = "causal-lm"
    max_length: int = 512
    """Tokens of a row, prompt and answer together."""
    prompt_column: str | None = None
    """Column of the prompt; guessed if not named."""
    separator: str = ""
    """Text between prompt and answer."""
    truncation: Truncation = "right"
    """What is cut off a row that is too long: ``right``, ``left``, or ``drop`` the example."""
    add_eos: bool = True
    """End each answer with the end-of-text token."""

    def prompts(self, records: Sequence[Record]) -> list[str]:
        """Return the prompt of each record, separator included."""
        column = find_column(records, self.prompt_column, PROMPT_COLUMNS, "prompt", "prompt_column")
        return [text + self.separator for text in texts_of(records, column)]

    def answered(self, tokenizer: Any, prompts: Sequence[str], answers: Sequence[str]) -> list[Encoded | None]:
        """Return a row for each prompt with its answer; None where nothing is left to predict."""
        return completion_rows(
            tokenizer,
            list(zip(prompts, answers, strict=True)),
            max_length=self.max_length,
            truncation=self.truncation,
            add_eos=self.add_eos,
        )

    def kept(self, found: Sequence[Any]) -> Examples[Any]:
        """Return what is not None of what became of the records.

        Raises
        ------
        DataError
            Nothing is.
        """
        examples = tuple(example for example in found if example is not None)
        if not examples:
            raise DataError(
                f"None of the {len(found)} records can be trained on: their answers are empty or were cut off; check "
                f"the columns, or raise max_length (now {self.max_length})."
            )
        return Examples(examples, PlainReport(len(found), len(examples)))

    def loss(self, outputs: Any, targets: Any) -> tuple[Tensor, int]:
        """Return the summed loss of examples, and their number."""
        losses, _ = self.losses(outputs, targets)
        return losses.sum(), len(losses)

    def count(self, example: Any) -> int:
        """Return 1: an example is judged once."""
        return 1


@dataclass(frozen=True)
class Pairs(Answers):
    """Options of objectives on a better and a worse answer to one prompt; examples are two rows."""

    chosen_column: str | None = None
    """Column of the better answer; guessed if not named."""
    rejected_column: str | None = None
    """Column of the worse answer; guessed if not named."""

    def encode(
        self, tokenizer: Any, records: Sequence[Record], *, labels: Sequence[str] | None = None
    ) -> Examples[Any]:
        """Encode prompts with both answers; a record of which one answer has no tokens left is left out."""
        chosen = find_column(records, self.chosen_column, CHOSEN_COLUMNS, "better answer", "chosen_column")
        rejected = find_column(records, self.rejected_column, REJECTED_COLUMNS, "worse answer", "rejected_column")
        prompts = self.prompts(records)
        good = self.answered(tokenizer, prompts, texts_of(records, chosen))
        bad = self.answered(tokenizer, prompts, texts_of(records, rejected))
        return self.kept([None if a is None or b is None else (a, b) for a, b in zip(good, bad, strict=True)])


class Beside(Answers):
    """Tasks whose examples are `Judged` when they go through the base; all of them may share a pass."""

    @property
    def family(self) -> str:
        """Rows of tokens with numbers beside them."""
        return "text, causal-lm, judged"

    def collate(self, setting: Setting, examples: Sequence[Judged]) -> Batch:
        """Pad the rows; the targets are labels, all tokens as labels, and the numbers."""
        batch = super().collate(setting, examples)
        tokens = batch.inputs["input_ids"].masked_fill(~batch.facts["padding_mask"], IGNORE)
        numbers = torch.cat([e.numbers for e in examples]).to(setting.device)
        return replace(batch, targets={"labels": batch.targets, "tokens": tokens, "numbers": numbers})


class Compared(Pairs, Beside):
    """Tasks on pairs of answers that a reference has judged: the base without the adapter."""

    def draw(self, examples: Sequence[Any], generator: Generator, setting: Setting, adapter: str) -> Sequence[Judged]:
        """Return the pairs with the reference's log-probabilities."""
        logits, labels = ask(self, setting, [row for pair in examples for row in pair], None)
        numbers = F.pad(log_probabilities(logits, labels)[0][:, None], (0, 2)).view(-1, 2, 3)
        return [Judged(tuple(pair), n) for pair, n in zip(examples, numbers, strict=True)]

    def gains(self, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        """Return how much likelier each answer became than the reference has it, and its tokens: two ``(n, 2)``."""
        found, counts = log_probabilities(outputs, targets["labels"])
        return (found - targets["numbers"][:, 0]).view(-1, 2), counts.view(-1, 2)

    def tally(self, outputs: Tensor, targets: Any) -> Means:
        """Return the sums for loss, accuracy of preference, and margin (of log-probabilities, before beta)."""
        gains, _ = self.gains(outputs, targets)
        margin = gains[:, 0] - gains[:, 1]
        return Means.of(loss=self.losses(outputs, targets)[0], accuracy=margin > 0, margin=margin)
