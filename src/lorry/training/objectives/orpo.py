"""Preference between two answers without a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from lorry.training.reference import log_probabilities
from lorry.training.tallies import Means
from lorry.training.task import Setting, register_task

from ._answers import Beside, Judged, Pairs


@register_task
@dataclass(frozen=True)
class ORPO(Pairs, Beside):
    """Odds-ratio preference optimization: learns the better answer, and that it is likelier than the worse one.

    Hong et al. 2024, equation 6: the loss of the better answer for each of its tokens, minus ``beta log sigmoid`` of
    the log of the odds ratio. It asks no reference.
    """

    name: ClassVar[str] = "orpo"
    beta: float = 0.1
    """Weight of the odds ratio (the paper's lambda)."""
    learned: Literal["answer", "all"] = "answer"
    """What is learned beside the preference: the better ``answer``, or ``all``, with its prompt (as TRL does)."""

    def draw(self, examples: Sequence[Any], generator: Generator, setting: Setting, adapter: str) -> Sequence[Judged]:
        """Return the pairs; there is no reference to ask."""
        return [Judged(tuple(pair), torch.zeros(2, 3)) for pair in examples]

    def losses(self, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        """Return the loss of each pair."""
        mean, ratio = self._odds(outputs, targets)
        if self.learned == "all":
            found, counts = log_probabilities(outputs[::2], targets["tokens"][::2])
            learned = found / counts
        else:
            learned = mean[:, 0]
        losses = -learned - self.beta * F.logsigmoid(ratio)
        return losses, torch.ones_like(losses)

    def tally(self, outputs: Tensor, targets: Any) -> Means:
        """Return the sums for loss, accuracy of preference, and log of the odds ratio."""
        _, ratio = self._odds(outputs, targets)
        return Means.of(loss=self.losses(outputs, targets)[0], accuracy=ratio > 0, log_odds_ratio=ratio)

    @staticmethod
    def _odds(outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        """Return the mean log-probability of the tokens of each answer, and the log of the odds ratio."""
        found, counts = log_probabilities(outputs, targets["labels"])
        mean = (found / counts.clamp(min=1)).view(-1, 2)
        odds = mean - _log1mexp(mean)
        return mean, odds[:, 0] - odds[:, 1]


def _log1mexp(value: Tensor) -> Tensor:
    """Return ``log(1 - exp(value))`` of negative values, exact at both ends."""
    value = value.clamp(max=-torch.finfo(value.dtype).eps)
    return torch.where(value > -0.6931, torch.log(-torch.expm1(value)), torch.log1p(-torch.exp(value)))
