"""Objectives whose outputs stand in the place of their labels, not one before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lorry.training.reference import row_sums
from lorry.training.rows import IGNORE
from lorry.training.text_task import TextTask


class InPlace(TextTask):
    """Cross-entropy of ``outputs[:, t]`` and ``targets[:, t]``, where the latter is not -100."""

    def losses(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of each row, summed over its labels, and how many they are."""
        scored = targets != IGNORE
        chosen = outputs[scored]
        chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
        each = F.cross_entropy(chosen, targets[scored], reduction="none")
        return row_sums(each, scored.nonzero()[:, 0], len(outputs)), scored.sum(1)

    def loss(self, outputs: Any, targets: Any) -> tuple[Tensor, int]:
        """Return the summed cross-entropy, and the number of labels."""
        losses, counts = self.losses(outputs, targets)
        return losses.sum(), int(counts.sum())
