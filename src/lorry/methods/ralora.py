"""RaLoRA: as many small LoRAs along the diagonal as the gradient of each layer has directions for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lorry.core.errors import OptionError
from lorry.core.method.base import Method
from lorry.core.method.registry import preset, register
from lorry.core.method.spec import Observed
from lorry.core.options import option
from lorry.methods.melora import MELoRA
from lorry.methods.parts.allocation import effective_rank, gradient_of, ranks_by_importance


@register(
    "ralora", paper="ICLR 2026, openreview.net/forum?id=kObvnQ6pUx", kinds=lambda kind: not (kind.whole or kind.indexed)
)
@dataclass(frozen=True)
class RaLoRA(MELoRA):
    """``ΔW = scale · diag(B_1 A_1, …, B_k A_k)`` with ``k = 2^⌊log2(erank(G) / rank)⌋`` blocks of rank `rank` each at
    every layer, where ``erank = exp(entropy of the singular values)`` of the layer's gradient G.

    Calibration finds k; at any k a layer has the ``rank · (in + out)`` values of a LoRA, and its update the rank
    ``k · rank``. The scale stays what it was. k is halved until it divides both widths. With `budget` the layers' ranks
    are handed out anew, in proportion to the norms of their gradients, before k is worked out (D-RaLoRA); the published
    program takes the weight's change in a few full steps in the gradient's place. Before calibration it is LoRA.

    Use it where some batches can be shown first, and the layers' gradients have more directions than a LoRA's rank.
    """

    blocks: int = option(1, "Number k of small LoRAs before calibration finds it.", at_least=1)
    most_blocks: int = option(16, "Largest k.", at_least=1)
    budget: bool = option(False, "Hand out the ranks by importance as well (D-RaLoRA).")
    least_rank: int = option(1, "Smallest rank that a layer gets from the budget.", at_least=1)
    most_rank: int = option(64, "Largest rank that a layer gets from the budget.", at_least=1)

    def check(self) -> None:
        """Refuse bounds that contradict each other."""
        super().check()
        if self.least_rank > self.most_rank:
            raise OptionError(
                f"RaLoRA: least_rank must be at most most_rank, found {self.least_rank} and {self.most_rank}."
            )

    @property
    def calibration(self) -> Literal["none", "gradients", "inputs"]:
        """The gradient of each weight."""
        return "gradients"

    def allocate(self, seen: Mapping[str, Observed]) -> dict[str, Method | None]:
        """Return the layers whose blocks or ranks change."""
        gradients = {path: gradient_of(observed, path) for path, observed in seen.items()}
        ranks = dict.fromkeys(gradients, self.rank)
        if self.budget:
            norms = {path: float(g.norm()) for path, g in gradients.items()}
            shapes = {path: tuple(g.shape) for path, g in gradients.items()}
            ranks = ranks_by_importance(norms, shapes, self.rank, self.least_rank, self.most_rank)
        chosen = {path: self._of(ranks[path], self._count(g, ranks[path])) for path, g in gradients.items()}
        return {path: method for path, method in chosen.items() if method != self}

    def _count(self, gradient: Tensor, rank: int) -> int:
        """Return the number of blocks of a rank."""
        out, inner = gradient.shape[-2:]
        wanted = min(effective_rank(gradient) / rank, self.most_blocks, min(out, inner) / rank)
        k = 2 ** max(0, math.floor(math.log2(wanted))) if wanted >= 1 else 1
        while out % k or inner % k:
            k //= 2
        return int(k)

    def _of(self, rank: int, k: int) -> Method:
        """Return the method with k blocks of a rank and the scale that it has now."""
        alpha, old, new = self.alpha, self.rank, rank * k
        if alpha is not None or self.rank_stabilized:
            ratio = new / old
            alpha = (old if alpha is None else alpha) * (math.sqrt(ratio) if self.rank_stabilized else ratio)
        return self.with_options(rank=new, blocks=k, alpha=alpha)


preset("d-ralora", of="ralora", paper="ICLR 2026, openreview.net/forum?id=kObvnQ6pUx", budget=True)
