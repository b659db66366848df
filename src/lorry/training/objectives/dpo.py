"""Preference between two answers against a reference: DPO, and IPO, which does not saturate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lorry.training.task import register_task

from ._answers import Compared


@register_task
@dataclass(frozen=True)
class DPO(Compared):
    """Direct preference optimization: the better answer gains more on the base than the worse one.

    Rafailov et al. 2023, equation 7: ``-log sigmoid(beta (gain(chosen) - gain(rejected)))``, where the gain is the
    log-probability under the adapter minus that of the base without it. There is no second copy of the base.
    """

    name: ClassVar[str] = "dpo"
    beta: float = 0.1
    """How strongly the adapter is held to the base."""
    form: Literal["sigmoid", "hinge"] = "sigmoid"
    """``sigmoid``, or ``hinge``: ``max(0, 1 - beta margin)`` (SLiC)."""

    def losses(self, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        """Return the loss of each pair."""
        gains, _ = self.gains(outputs, targets)
        margin = self.beta * (gains[:, 0] - gains[:, 1])
        losses = torch.relu(1 - margin) if self.form == "hinge" else -F.logsigmoid(margin)
        return losses, torch.ones_like(losses)


@register_task
@dataclass(frozen=True)
class IPO(Compared):
    """Identity preference optimization: the margin goes to a fixed value, so that it cannot grow without end.

    Azar et al. 2023, equation 17: ``(margin - 1 / (2 beta))²``, with gains for each token of an answer as its authors
    recommend for answers of different lengths.
    """

    name: ClassVar[str] = "ipo"
    beta: float = 0.1
    """The paper's tau: the margin that is aimed at is 1 / (2 beta)."""

    def losses(self, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        """Return the loss of each pair."""
        gains, counts = self.gains(outputs, targets)
        each = gains / counts.clamp(min=1)
        losses = (each[:, 0] - each[:, 1] - 1 / (2 * self.beta)).square()
        return losses, torch.ones_like(losses)
