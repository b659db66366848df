"""A model that scores answers, learned from pairs of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lorry.training.data import Record
from lorry.training.heads import own_outputs
from lorry.training.tallies import Means
from lorry.training.task import Examples, Setting, register_task

from ._answers import Pairs


@register_task
@dataclass(frozen=True)
class Reward(Pairs):
    """Reward model: one number for an answer, higher for the better one of a pair.

    Bradley and Terry: ``-log sigmoid(score(chosen) - score(rejected))``. The head has one output.
    """

    name: ClassVar[str] = "reward"
    task: ClassVar[str | None] = "sequence-classification"
    outputs: ClassVar[int | None] = 1
    center: float = 0.0
    """Weight of ``(score(chosen) + score(rejected))²``, which keeps the scores around zero."""

    def encode(
        self, tokenizer: Any, records: Sequence[Record], *, labels: Sequence[str] | None = None
    ) -> Examples[Any]:
        """Encode prompts with both answers; the rows are 1 for the better one and 0 for the other."""
        found = super().encode(tokenizer, records, labels=labels)
        pairs = [tuple(replace(row, labels=None, label=1 - i) for i, row in enumerate(pair)) for pair in found.examples]
        return Examples(tuple(pairs), found.report)

    def classes(self, setting: Setting, train: Examples[Any], labels: Sequence[str] | None) -> int | None:
        """Return 1 if the head has more outputs."""
        return own_outputs(setting.model, 1, "output")

    def losses(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each pair."""
        scores = self._scores(outputs)
        losses = -F.logsigmoid(scores[:, 0] - scores[:, 1]) + self.center * scores.sum(1).square()
        return losses, torch.ones_like(losses)

    def tally(self, outputs: Tensor, targets: Tensor) -> Means:
        """Return the sums for loss, accuracy of preference, and margin of the scores."""
        scores = self._scores(outputs)
        margin = scores[:, 0] - scores[:, 1]
        return Means.of(loss=self.losses(outputs, targets)[0], accuracy=margin > 0, margin=margin)

    @staticmethod
    def _scores(outputs: Tensor) -> Tensor:
        found = outputs[:, 0].view(-1, 2)
        return found.to(torch.promote_types(found.dtype, torch.float32))
