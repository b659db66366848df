"""Delta-LoRA: the weight moves with the product of the factors (Zi et al. 2023, arXiv 2309.02411)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lorry.core.options import option
from lorry.training.hooks import Dynamic, Moment, register_dynamic
from lorry.training.merged import ONE_ALONE, hold, merging_pairs, put, put_back, remember, trained_rank
from lorry.training.schedule import warmup_steps


@register_dynamic("delta-lora")
@dataclass(frozen=True)
class DeltaLoRA(Dynamic):
    """After a start, ``W += amount · scale · (B A - B' A')`` at each step, with B' and A' from before the step.

    The sum telescopes to ``amount · scale · (B A - B_0 A_0)`` from the factors at the start, so it is a frozen part of
    twice the rank in the adapter's own factors (`lorry.training.merged`), and the base stays as it is. Gradients are
    those of ``scale · B A`` alone. The paper drops dropout.
    """

    neutral: ClassVar = {"amount": 0.0}
    apart: ClassVar = {"relora": ONE_ALONE, "plora": ONE_ALONE}

    amount: float = option(2.0, "How much of each change the weight takes.", at_least=0)
    start: float = option(500, "Step at which it begins (a fraction of the run if below 1).", at_least=0)

    def begin(self, at: Moment) -> None:
        """Look whether it can act at every site, and begin where that is at once."""
        if self.amount:
            merging_pairs(at)
            self._start(at, 0)

    def _start(self, at: Moment, step: int) -> None:
        if step != warmup_steps(self.start, at.total):
            return
        for pair in merging_pairs(at):
            a, b = pair.a.detach(), pair.b.detach()
            parts = [b, self.amount * b, -self.amount * b]
            put(at, pair, torch.cat([a, a, a]), torch.cat(parts, 1), len(a))

    def before_step(self, at: Moment) -> None:
        """Leave what is merged alone."""
        if self.amount:
            hold(at)

    def after_clipping(self, at: Moment) -> None:
        """Keep what is merged."""
        if self.amount:
            remember(at)

    def after_step(self, at: Moment) -> None:
        """Let the weight follow."""
        if not self.amount:
            return
        put_back(at)
        for pair in merging_pairs(at):
            rank = trained_rank(at, pair)
            if rank < len(pair.a):
                pair.a[rank : 2 * rank] = pair.a[:rank]
                pair.b[:, rank : 2 * rank] = self.amount * pair.b[:, :rank]
        if not any(key.endswith("/rank") for key in at.state):
            self._start(at, at.step + 1)
