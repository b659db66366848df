"""PLoRA: a part of the adapter moves into the merged weight all the time (Meng et al. 2024, arXiv 2402.16141)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lorry.core.options import option
from lorry.training.hooks import Dynamic, Moment, register_dynamic
from lorry.training.merged import ONE_ALONE, dense_part, hold, merging_pairs, put, put_back, remember, trained_rank


@register_dynamic("plora")
@dataclass(frozen=True)
class PLoRA(Dynamic):
    """Merges the part mu of ``scale · B A``, and shrinks A and B by ``sqrt(1 - mu)``, so that the function stays.

    Public code shrinks both by ``1 - mu``, which leaves ``1 - mu + mu²`` of the product; ``preserve: false`` is that.
    What is merged is a frozen part of the adapter's own factors (`lorry.training.merged`); it soon has the full rank of
    the layer, and costs as much as the layer.
    """

    neutral: ClassVar = {"mu": 0.0}
    apart: ClassVar = {"relora": ONE_ALONE, "delta-lora": ONE_ALONE, "lora-fa": "A shrinks with B"}

    mu: float = option(0.1, "Part that is merged.", at_least=0, below=1)
    every: int = option(1, "Steps between.", at_least=1)
    preserve: bool = option(True, "Shrink the factors so that the function stays as it is.")

    def begin(self, at: Moment) -> None:
        """Look whether it can act at every site."""
        if self.mu:
            merging_pairs(at)

    def before_step(self, at: Moment) -> None:
        """Leave what is merged alone."""
        if self.mu:
            hold(at)

    def after_clipping(self, at: Moment) -> None:
        """Keep what is merged."""
        if self.mu:
            remember(at)

    def after_step(self, at: Moment) -> None:
        """Merge a part."""
        if not self.mu:
            return
        put_back(at)
        if (at.step + 1) % self.every:
            return
        keep = 1 - self.mu
        for pair in merging_pairs(at):
            rank = trained_rank(at, pair)
            a, b = pair.a.detach(), pair.b.detach()
            more_a, more_b = dense_part(
                torch.cat([a[rank:], a[:rank]]), torch.cat([b[:, rank:], self.mu * b[:, :rank]], 1)
            )
            by = keep**0.5 if self.preserve else keep
            put(at, pair, torch.cat([a[:rank] * by, more_a]), torch.cat([b[:, :rank] * by, more_b], 1), rank)
