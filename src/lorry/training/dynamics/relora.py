"""ReLoRA: merge, begin again, and so rise in rank (Lialin et al. 2023, arXiv 2307.05695)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorry.core.options import option
from lorry.training.hooks import Dynamic, Moment, register_dynamic
from lorry.training.merged import ONE_ALONE, dense_part, hold, merging_pairs, put, put_back, remember, trained_rank


@register_dynamic("relora")
@dataclass(frozen=True)
class ReLoRA(Dynamic):
    """Every so many steps, merges ``scale · B A``, draws A anew with B zero, and prunes the optimizer's moments.

    What is merged is a frozen part of the adapter's own factors (`lorry.training.merged`), so the base stays as it is
    and the function does not change at a restart; the adapter's rank grows by its own at each, up to the width of the
    layer and its rank.
    """

    neutral: ClassVar = {"every": 0}
    apart: ClassVar = {"plora": ONE_ALONE, "delta-lora": ONE_ALONE, "lora-fa": "A is drawn anew at each restart"}

    every: int = option(500, "Steps between restarts; 0 never restarts.", at_least=0)
    prune: float = option(0.999, "Part of the optimizer's moments that a restart sets to zero.", at_least=0, at_most=1)
    by: str = option("magnitude", "Which part: the smallest, or a random one.", choices=("magnitude", "random"))
    warmup: int = option(0, "Steps after a restart in which the rate rises again, linearly.", at_least=0)

    def begin(self, at: Moment) -> None:
        """Look whether it can act at every site."""
        if self.every:
            merging_pairs(at)

    def before_step(self, at: Moment) -> None:
        """Leave what is merged alone."""
        if self.every:
            hold(at)

    def after_clipping(self, at: Moment) -> None:
        """Keep what is merged, and let the rate rise again after a restart."""
        if not self.every:
            return
        remember(at)
        since = at.step % self.every
        if at.step >= self.every and since < self.warmup:
            for group in at.groups.optimizer.param_groups:
                group["lr"] *= (since + 1) / (self.warmup + 1)

    def after_step(self, at: Moment) -> None:
        """Restart where it is time."""
        if not self.every:
            return
        put_back(at)
        if (at.step + 1) % self.every or at.step + 1 >= at.total:
            return
        for pair in merging_pairs(at):
            rank = trained_rank(at, pair)
            a, b = dense_part(pair.a.detach(), pair.b.detach())
            new = torch.rand(rank, pair.a.shape[1], generator=at.generator(pair.path)) * 2 - 1
            new = new.to(pair.a) / math.sqrt(pair.a.shape[1])  # as LoRA draws it

            def resize(name: str, key: str, value: Tensor, to: Tensor, rank: int = rank) -> Tensor:
                made = torch.zeros_like(to, dtype=value.dtype, requires_grad=False)
                part = (slice(rank), slice(None)) if name.endswith(".A") else (slice(None), slice(rank))
                made[part] = self.pruned(value[part], at.generator(name, key))
                return made

            put(at, pair, torch.cat([new, a]), torch.cat([torch.zeros_like(b[:, :rank]), b], 1), rank, resize)

    def pruned(self, moments: Tensor, generator: torch.Generator) -> Tensor:
        """Return moments of which a part is zero."""
        drop = round(self.prune * moments.numel())
        if self.by == "magnitude":
            order = moments.abs().flatten().argsort(stable=True)
        else:
            order = torch.randperm(moments.numel(), generator=generator).to(moments.device)
        kept = moments.flatten().clone()
        kept[order[:drop]] = 0.0
        return kept.view_as(moments)
