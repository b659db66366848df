"""Single answers that are wanted or not, against a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from lorry.training.columns import COMPLETION_COLUMNS, LABEL_COLUMNS, find_column, texts_of, value_at
from lorry.training.data import Record
from lorry.training.data_errors import DataError
from lorry.training.reference import ask, log_probabilities
from lorry.training.rows import IGNORE, Encoded
from lorry.training.tallies import Means
from lorry.training.task import Examples, Setting, digest, register_task

from ._answers import Beside, Judged

_WORDS = {"true": 1, "1": 1, "yes": 1, "good": 1, "false": 0, "0": 0, "no": 0, "bad": 0}


@register_task
@dataclass(frozen=True)
class KTO(Beside):
    """Kahneman-Tversky optimization: answers that are wanted gain on the base, those that are not lose.

    Ethayarajh et al. 2024, equation 7. What gains are measured from is the divergence of adapter and base, estimated
    on the prompts of a micro-batch with the answers of others, so a micro-batch should have several rows.
    """

    name: ClassVar[str] = "kto"
    beta: float = 0.1
    """How strongly the adapter is held to the base."""
    desirable_weight: float = 1.0
    """Weight of the answers that are wanted."""
    undesirable_weight: float = 1.0
    """Weight of the others; with unequal numbers, weight times number should be about equal for both."""
    completion_column: str | None = None
    """Column of the answer; guessed if not named."""
    label_column: str | None = None
    """Column that says whether it is wanted (true or false, 1 or 0); guessed if not named."""

    def encode(
        self, tokenizer: Any, records: Sequence[Record], *, labels: Sequence[str] | None = None
    ) -> Examples[Any]:
        """Encode answers; an example is a row and whether it is wanted."""
        answer = find_column(records, self.completion_column, COMPLETION_COLUMNS, "answer", "completion_column")
        judged = find_column(records, self.label_column, LABEL_COLUMNS, "verdict", "label_column")
        verdicts = [_verdict(value_at(r, judged, i), i, judged) for i, r in enumerate(records)]
        rows = self.answered(tokenizer, self.prompts(records), texts_of(records, answer))
        return self.kept([None if r is None else (r, v) for r, v in zip(rows, verdicts, strict=True)])

    def fingerprint(self, examples: Sequence[Any]) -> str:
        """Return a hash of tokens and verdicts."""
        return f"{super().fingerprint(examples)}-{digest([verdict for _, verdict in examples])}"

    def draw(self, examples: Sequence[Any], generator: Generator, setting: Setting, adapter: str) -> Sequence[Judged]:
        """Return the rows with the reference's log-probabilities, the divergence, and their verdicts."""
        rows = [row for row, _ in examples]
        reference = log_probabilities(*ask(self, setting, rows, None))[0]
        divergence = torch.zeros_like(reference)
        if len(rows) > 1:
            others = [_crossed(row, rows[i - 1], self.max_length) for i, row in enumerate(rows)]
            now, before = (log_probabilities(*ask(self, setting, others, name))[0] for name in (adapter, None))
            divergence += (now - before).mean().clamp(min=0)
        verdicts = torch.tensor([verdict for _, verdict in examples]).to(reference)
        numbers = torch.stack([reference, divergence, verdicts], 1)
        return [Judged((row,), n) for row, n in zip(rows, numbers.split(1), strict=True)]

    def losses(self, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        """Return the loss of each answer."""
        signed, wanted = self._signed(outputs, targets)
        weights = torch.where(wanted, self.desirable_weight, self.undesirable_weight)
        losses = weights * (1 - torch.sigmoid(self.beta * signed))
        return losses, torch.ones_like(losses)

    def tally(self, outputs: Tensor, targets: Any) -> Means:
        """Return the sums for loss, and for the share of answers that moved the right way."""
        signed, _ = self._signed(outputs, targets)
        return Means.of(loss=self.losses(outputs, targets)[0], accuracy=signed > 0)

    def _signed(self, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        """Return how far each answer went the right way, from the divergence on; and which ones are wanted."""
        reference, divergence, verdict = targets["numbers"].unbind(1)
        gain = log_probabilities(outputs, targets["labels"])[0] - reference
        wanted = verdict > 0.5
        return torch.where(wanted, gain - divergence, divergence - gain), wanted


def _verdict(value: Any, index: int, column: str) -> int:
    found = _WORDS.get(str(value).strip().lower())
    if found is None:
        raise DataError(
            f"Record {index}: column {column!r} holds {value!r}, expected whether the answer is wanted: true or false."
        )
    return found


def _crossed(row: Encoded, other: Encoded, most: int) -> Encoded:
    """Return the prompt of one row with the answer of another."""
    assert row.labels is not None and other.labels is not None
    prompt, answer = row.input_ids[row.labels == IGNORE], other.input_ids[other.labels != IGNORE]
    prompt = prompt[-max(1, most - len(answer)) :]
    return Encoded(torch.cat([prompt, answer]), torch.cat([torch.full_like(prompt, IGNORE), answer]))
